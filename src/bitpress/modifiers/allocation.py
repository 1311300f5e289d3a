"""Bit allocation: each layer's scheme chosen among several, so that the loss grows least within a budget."""

import functools
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import is_match
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.experts import find_layer
from bitpress.models.linears import weight_matrix
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.fused import together
from bitpress.modifiers.state import Measured, State
from bitpress.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    preset_name_to_scheme,
)
from bitpress.solvers import allocate, round_to_nearest, squared_slope

logger = logging.getLogger(__name__)


class AllocatingModifier(Modifier):
    """A modifier that can choose each layer's scheme among several.

    Before anything is solved, a few gradients at each weight tell how much the loss would grow if the layer were
    rounded to nearest with each of the candidates (:func:`bitpress.solvers.squared_slope`). The choice that adds up to
    the least growth within the budget is that of :func:`bitpress.solvers.allocate`. Layers that serving engines fuse
    have one scheme: those of a block that receive the same input, and all experts of one module.

    The estimate is that of round-to-nearest, whichever solver follows: AWQ and GPTQ lower the error of every candidate,
    and what counts here is how the layers compare.

    Attributes:
        choose_from: the candidates: names of presets, or schemes. A scheme is a candidate for the layers that its
            targets match, or the modifier's targets if these are stated.
        bits_per_weight: at most so many bits for each integer, on average over the weights of all layers that this
            modifier quantizes. Scales and zero points come on top.
        max_bytes: at most so many bytes for these layers as they are stored: integers, scales and zero points.
    """

    choose_from: list[str | QuantizationScheme] | None = None
    bits_per_weight: float | None = Field(default=None, gt=0)
    max_bytes: int | None = Field(default=None, gt=0)

    _growth: dict[str, list[float]] = PrivateAttr(default_factory=dict)

    @field_validator("choose_from", mode="before")
    @classmethod
    def _without_targets(cls, value: Any) -> Any:
        """A scheme that is written as a mapping need not state targets."""
        if not isinstance(value, list):
            return value
        return [{"targets": [], **item} if isinstance(item, dict) else item for item in value]

    @model_validator(mode="after")
    def _one_budget(self) -> "AllocatingModifier":
        budgets = [name for name in ("bits_per_weight", "max_bytes") if getattr(self, name) is not None]
        if self.choose_from is None:
            if budgets:
                raise ValueError(f"{budgets[0]} is a budget: say with choose_from= which schemes it may be spent on")
            return self
        if len(budgets) != 1:
            raise ValueError("choose_from needs one budget, bits_per_weight or max_bytes")
        if not self.choose_from:
            raise ValueError("choose_from is empty: name the schemes to choose from")
        return self

    @property
    def chooses(self) -> bool:
        """See :attr:`Modifier.chooses`."""
        return self.choose_from is not None

    @property
    def needs_whole_model(self) -> bool:
        """See :attr:`Modifier.needs_whole_model`: gradients go through all of it."""
        return self.chooses

    def groups(self) -> dict[str, QuantizationScheme]:
        """The candidates with their targets, by what the report calls them."""
        return {}

    def offered(self, targets: Sequence[str], *, stated: bool) -> dict[str, QuantizationScheme]:
        """The candidates with their targets: ``targets``, unless a scheme has its own and these are only the default.

        Raises:
            BitpressError: two are the same.
        """
        found: dict[str, QuantizationScheme] = {}
        for item in self.choose_from or ():
            scheme = preset_name_to_scheme(item, list(targets)) if isinstance(item, str) else item
            own = list(scheme.targets) if scheme.targets and not stated else list(targets)
            label = describe(scheme.weights) if scheme.weights is not None else str(item)
            if label in found:
                raise BitpressError(f"{type(self).__name__}: choose_from names {label} twice.")
            found[label] = scheme.model_copy(update={"targets": own})
        return found

    def completed(self, scheme: QuantizationScheme) -> QuantizationScheme:
        """The ``scheme`` with what the modifier's other fields say of it."""
        return scheme

    def candidates(self, model: nn.Module, names: Collection[str]) -> dict[str, list[QuantizationScheme]]:
        """See :meth:`Modifier.candidates`."""
        if self.choose_from is None:
            return {}
        offered = self.groups().values()
        layers = {name: find_layer(model, name) for name in names}
        return {n: [s for s in offered if is_match(n, layer, s.targets)] for n, layer in layers.items()}

    def alternatives(
        self, model: nn.Module, schemes: dict[str, QuantizationScheme]
    ) -> list[dict[str, QuantizationScheme]]:
        """Schemes by layer, as often as it takes to name every candidate of every layer: each must fit."""
        found = self.candidates(model, schemes)
        return [
            {name: of_layer[i] for name, of_layer in found.items() if i < len(of_layer)}
            for i in range(max(map(len, found.values()), default=0))
        ]

    def on_initialize(self, state: State) -> None:
        """Refuse a budget that cannot be met."""
        self._growth = {}
        names = self.measured_layers(state)
        if names:
            self._check_budget(state, [_options(state, group) for group in together(state, names)])

    def measured_layers(self, state: State) -> list[str]:
        """See :meth:`Modifier.measured_layers`: all layers that this modifier chooses for."""
        return [name for name in state.candidates if state.owners[name] is self]

    def on_gradient(self, state: State, name: str, gradient: Tensor) -> None:
        """Add to what each candidate would make the loss grow by."""
        W = weight_matrix(find_layer(state.model, name))
        found = self._growth.setdefault(name, [0.0] * len(state.candidates[name]))
        for i, scheme in enumerate(state.candidates[name]):
            found[i] += squared_slope(rounding_error(W, scheme.weights), gradient)

    def on_measured(self, state: State, measured: Measured) -> None:
        """Choose, and say what was chosen."""
        # Every rank has measured the same; one of them decides.
        self._growth = state.ranks.gather(note=self._growth)[0].note
        groups = [_options(state, group) for group in together(state, self.measured_layers(state))]
        costs = [self._costs(state, group, measured) for group in groups]
        for group, of_group in zip(groups, costs, strict=True):
            if not all(map(math.isfinite, of_group)):
                raise BitpressError(
                    f"{_label(group)}: a gradient of the loss is not finite, so that nothing says how much the layer "
                    "matters. Load the model in float32 or bfloat16."
                )
            if not any(of_group):
                # Nothing is known of it: the largest is the safe choice.
                logger.warning(
                    "%s: no gradient reached it in measuring; it has the largest scheme. Give data that reaches it.",
                    _label(group),
                )
                by_size = [self._size(state, group, i) for i in range(len(of_group))]
                group.schemes, of_group[:] = [group.schemes[by_size.index(max(by_size))]], [0.0]
        self._check_budget(state, groups)
        sizes = [[self._size(state, group, i) for i in range(len(group.schemes))] for group in groups]
        picks = allocate(costs, sizes, self._budget(state, groups))
        for group, pick in zip(groups, picks, strict=True):
            state.schemes |= dict.fromkeys(group.layers, group.schemes[pick])
        state.allocations.append(self._record(state, groups, costs, picks, measured))
        self._growth = {}

    def _costs(self, state: State, group: "Options", measured: Measured) -> list[float]:
        """The growth of the loss per prediction with each of the group's schemes."""
        totals = dict.fromkeys(map(id, group.schemes), 0.0)
        for name in group.layers:
            for scheme, growth in zip(state.candidates[name], self._growth.get(name, ()), strict=False):
                if id(scheme) in totals:
                    totals[id(scheme)] += growth / (2 * measured.count)
        return list(totals.values())

    def _size(self, state: State, group: "Options", index: int) -> int:
        args: QuantizationArgs = group.schemes[index].weights
        if self.max_bytes is None:
            return int(args.num_bits) * group.weights
        return sum(_stored_bytes(state, name, args) for name in group.layers)

    def _budget(self, state: State, groups: Sequence["Options"]) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        assert self.bits_per_weight is not None  # noqa: S101
        return int(self.bits_per_weight * sum(group.weights for group in groups))

    def _check_budget(self, state: State, groups: Sequence["Options"]) -> None:
        least = sum(min(self._size(state, group, i) for i in range(len(group.schemes))) for group in groups)
        if least <= self._budget(state, groups):
            return
        if self.max_bytes is not None:
            stated, possible = f"max_bytes={self.max_bytes}", f"{least} bytes"
        else:
            bits = least / sum(group.weights for group in groups)
            stated, possible = f"bits_per_weight={self.bits_per_weight:g}", f"{bits:.4g} bits per weight"
        raise BitpressError(
            f"{type(self).__name__}: {stated} cannot be met: the smallest schemes of choose_from take {possible}. "
            "Raise the budget, or add a smaller scheme."
        )

    def _record(
        self,
        state: State,
        groups: Sequence["Options"],
        costs: Sequence[Sequence[float]],
        picks: Sequence[int],
        measured: Measured,
    ) -> dict[str, Any]:
        chosen = [group.schemes[pick].weights for group, pick in zip(groups, picks, strict=True)]
        weights = sum(group.weights for group in groups)
        stored = sum(
            _stored_bytes(state, name, args)
            for group, args in zip(groups, chosen, strict=True)
            for name in group.layers
        )
        return {
            "loss": measured.loss,
            "draws": measured.draws,
            "estimated_growth": sum(of_group[pick] for of_group, pick in zip(costs, picks, strict=True)),
            "bits_per_weight": sum(g.weights * args.num_bits for g, args in zip(groups, chosen, strict=True)) / weights,
            "stored_bits_per_weight": 8 * stored / weights,
            "stored_bytes": stored,
            "groups": [
                {
                    "layers": group.layers,
                    "chosen": describe(args),
                    "growth": {describe(s.weights): g for s, g in zip(group.schemes, of_group, strict=True)},
                }
                for group, args, of_group in zip(groups, chosen, costs, strict=True)
            ],
        }


@dataclass
class Options:
    """Layers that will have one scheme.

    Attributes:
        layers: their names.
        schemes: those that are candidates for all of them.
        weights: how many weights they have together.
    """

    layers: list[str]
    schemes: list[QuantizationScheme]
    weights: int


def describe(args: QuantizationArgs) -> str:
    """A short name for a grid: "int4, asymmetric, groups of 64"."""
    kind = QuantizationType(args.type).value
    extent = f"groups of {args.group_size}" if args.strategy == QuantizationStrategy.GROUP else f"per {args.strategy}"
    return f"{kind}{args.num_bits}, {'symmetric' if args.symmetric else 'asymmetric'}, {extent}"


def rounding_error(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """What rounding to nearest changes in a weight (out, in) of any float dtype: (out, in), float32."""
    return round_to_nearest(weight, args, weight.dtype).dequantize().float().sub_(weight)


def _options(state: State, names: list[str]) -> Options:
    """The schemes that are candidates for all of the layers."""
    common = [
        s for s in state.candidates[names[0]] if all(any(s is each for each in state.candidates[n]) for n in names)
    ]
    if not common:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise BitpressError(
            f"{', '.join(names[:3])}{more} must have one scheme, but none of choose_from has targets that match all."
        )
    return Options(names, common, sum(weight_matrix(find_layer(state.model, name)).numel() for name in names))


def _label(group: Options) -> str:
    return group.layers[0] + (f" and {len(group.layers) - 1} more" if len(group.layers) > 1 else "")


def _stored_bytes(state: State, name: str, args: QuantizationArgs) -> int:
    weight = weight_matrix(find_layer(state.model, name))
    return _bytes_of(tuple(weight.shape), weight.dtype, args.model_dump_json())


@functools.lru_cache(maxsize=4096)
def _bytes_of(shape: tuple[int, int], dtype: torch.dtype, stated: str) -> int:
    """What the checkpoint will hold of a weight of this shape: asked of the code that packs it."""
    args = QuantizationArgs.model_validate_json(stated)
    return round_to_nearest(torch.zeros(shape, dtype=dtype), args, dtype).pack().nbytes()
