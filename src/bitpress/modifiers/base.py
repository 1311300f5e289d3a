"""The base of all modifiers: fields that are checked, and the events that a modifier may answer."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.modifiers.foreign import OF_ALL, Foreign
from bitpress.modifiers.state import Measured, State, Writing
from bitpress.quantization import QuantizationScheme
from bitpress.statistics import Statistic


class FieldError(BitpressError):
    """A modifier's field that is unknown or has a value it cannot have."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class Modifier(BaseModel):
    """One step of a recipe.

    A subclass states its fields as pydantic does and answers the events it cares for. It is known to recipes by its
    class name as soon as it is defined.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    known: ClassVar[dict[str, type["Modifier"]]] = {}
    # Fields of other tools' recipes, by name.
    foreign: ClassVar[Mapping[str, Foreign]] = OF_ALL

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        Modifier.known[cls.__name__] = cls

    def __init__(self, **fields: Any) -> None:
        """Check the fields; an unknown name or a wrong value is a BitpressError that says which."""
        fields = type(self).translated(fields)
        for name in fields:
            if name not in type(self).model_fields:
                message = f"{type(self).__name__} has no field {name!r}{nearest(name, list(type(self).model_fields))}"
                raise FieldError(message, name)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            # A problem of several fields together has no place.
            places = (("".join(f"{part}." for part in e["loc"])[:-1], e["msg"]) for e in error.errors())
            problems = "; ".join(f"{place}: {message}" if place else message for place, message in places)
            field = str(next(iter(error.errors()[0]["loc"]), ""))
            raise FieldError(f"{type(self).__name__}: {problems}", field) from error

    @classmethod
    def translated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Of ``fields`` by name, those without the ones of llm-compressor that have no meaning here.

        Raises:
            FieldError: one that asks for what is not done.
        """
        own = {}
        for name, value in fields.items():
            if name in cls.model_fields or name not in cls.foreign:
                own[name] = value
                continue
            problem = cls.foreign[name].take(name, value, cls.__name__)
            if problem is not None:
                raise FieldError(problem, name)
        return own

    @property
    def states_scheme(self) -> bool:
        """True if this modifier says which layers are quantized, and how."""
        return False

    @property
    def may_state_scheme(self) -> bool:
        """True if it can say so where no other modifier of the recipe does."""
        return self.states_scheme

    @property
    def keeps_fused(self) -> bool:
        """True if layers that servers fuse must have one scheme."""
        return True

    @property
    def chooses(self) -> bool:
        """True if it will choose the schemes of its layers itself, once the model is measured."""
        return False

    @property
    def needs_whole_model(self) -> bool:
        """True if all weights must be there at once: then the model cannot stay on the disk."""
        return False

    @property
    def writes(self) -> Writing | None:
        """How much calibration text the model is to write itself; none by default."""
        return None

    @property
    def learns_blocks(self) -> bool:
        """True if a solved block is to learn from what it gave in the original model: see ``state.rounding``."""
        return False

    def resolve_schemes(self, model: nn.Module) -> dict[str, QuantizationScheme]:
        """The layers of ``model`` that this modifier would quantize, by name, with their schemes; none by default.

        Raises:
            BitpressError: a target that matches nothing, a scheme that does not fit a layer.
        """
        return {}

    def resolve_attentions(self, model: nn.Module) -> dict[str, Any]:
        """The attentions of ``model`` whose states this modifier would quantize, by name; none by default.

        Raises:
            BitpressError: compressed-tensors cannot quantize the states of the model's attention.
        """
        return {}

    def candidates(self, model: nn.Module, names: Collection[str]) -> dict[str, list[QuantizationScheme]]:
        """The schemes among which this modifier will choose for its own layers, by name; none by default.

        Args:
            model: the model.
            names: of the layers that are this modifier's.
        """
        return {}

    def on_initialize(self, state: State) -> None:
        """Before any computing: ``state`` has schemes and blocks, one batch has run. Refuse here what is wrong."""

    def required_statistics(self, state: State, name: str) -> Statistic:
        """What the calibration must remember of the input of layer ``name``, or of what the tap of that name receives.

        A range is that of the block with its new weights, and is there in :meth:`on_solved`; the rest is what the block
        as it was is fed. What is quantized, and how, ``state.schemes`` and ``state.owners`` know.
        """
        return Statistic.NONE

    def measured_layers(self, state: State) -> Collection[str]:
        """Layers of which the gradients of the loss must be seen before anything is solved; none by default.

        Args:
            state: as :meth:`on_initialize` has left it.
        """
        return ()

    def on_gradient(self, state: State, name: str, gradient: Tensor) -> None:
        """One draw's gradient at the weight of a measured layer; see :func:`bitpress.pipelines.measure`.

        Args:
            state: the compression.
            name: of the layer.
            gradient: (out, in), any float dtype: of the loss that :class:`Measured` names, summed over the draw.
        """

    def on_measured(self, state: State, measured: Measured) -> None:
        """After the last draw, before the first block: the last moment to change ``state.schemes``.

        Args:
            state: the compression.
            measured: what the gradients were of.
        """

    def on_block(self, state: State, block: Block) -> None:
        """Solve one block: write the new weights to the layers of ``block``, whose ``state.statistics`` are filled."""

    def on_solved(self, state: State, block: Block) -> None:
        """All modifiers have solved ``block``, and it has run: ``state.statistics`` holds the ranges."""

    def on_finalize(self, state: State) -> None:
        """After the last block, for what is to be left in ``state``."""


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: the known name that is most like ``name``, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f". Known: {', '.join(sorted(known))}."
