"""SmoothQuantModifier: let the weights have part of the activations' outliers, so that both can be quantized."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.utils import is_match
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.linears import weight_matrix
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.foreign import OF_SMOOTHQUANT, Foreign
from bitpress.modifiers.mappings import AWQMapping, ResolvedMapping
from bitpress.modifiers.smoothing import Mappings, apply, as_mappings, balance_weights, find_proven, measured, record
from bitpress.modifiers.state import State
from bitpress.solvers import search_strength, smoothing_scales
from bitpress.statistics import InputStatistics, Statistic


class SmoothQuantModifier(Modifier):
    """SmoothQuant (Xiao et al., 2022, https://arxiv.org/abs/2211.10438).

    It stands before the modifier that quantizes, and takes the scheme from there.

    Attributes:
        smoothing_strength: alpha, 0 to 1: how much of the difficulty goes from the activations to the weights. "search"
            chooses it for each mapping by the error that quantized weights and activations are estimated to make, and
            leaves a mapping alone where nothing helps.
        mappings: which layers scale which; a pair is written (smooth, [balance, ...]) or, as other tools have it,
            [[balance, ...], smooth]. If not given, they are found and proven as AWQModifier's are. With a stated
            strength those behind a norm are used, as in the paper; with "search" all of them.
        ignore: names, class names or ``re:`` patterns. A mapping is left out if its smooth layer is ignored, or all of
            its balance layers.
    """

    smoothing_strength: float | Literal["search"] = 0.5
    mappings: list[AWQMapping] | None = None
    ignore: list[str] = Field(default_factory=list)

    foreign: ClassVar[Mapping[str, Foreign]] = OF_SMOOTHQUANT

    _resolved: Mappings = PrivateAttr(default_factory=dict)
    _balanced: set[str] = PrivateAttr(default_factory=set)

    @field_validator("smoothing_strength")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if value != "search" and not 0 <= value <= 1:
            raise ValueError('a number from 0 to 1, or "search"')
        return value

    @field_validator("ignore", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @field_validator("mappings", mode="before")
    @classmethod
    def _either_order(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return as_mappings([pair[::-1] if _balance_first(pair) else pair for pair in value])

    def on_initialize(self, state: State) -> None:
        """Find the mappings of every block, prove them, and choose among them."""
        resolved = find_proven(state, _is_quantized, self.mappings, "SmoothQuantModifier")
        self._resolved = {block: [m for m in found if self._smooths(m)] for block, found in resolved.items()}
        if not any(self._resolved.values()):
            raise BitpressError(
                f"SmoothQuantModifier: no mapping of {type(state.model).__name__} is left that starts at a norm and is "
                'not ignored: state mappings, or smoothing_strength="search", which uses all.'
            )
        self._balanced = {n for found in self._resolved.values() for mapping in found for n in mapping.balance}

    def required_statistics(self, state: State, name: str) -> Statistic:
        """The greatest magnitudes of the balance layers' inputs; for a search the Gram matrix too."""
        if name not in self._balanced:
            return Statistic.NONE
        searched = Statistic.GRAM if self.smoothing_strength == "search" else Statistic.NONE
        return Statistic.MAX_MAGNITUDE | searched

    def on_block(self, state: State, block: Block) -> None:
        """Smooth the block's mappings."""
        for mapping in self._resolved[block.name]:
            layers, inputs = measured(state, mapping)
            if not layers:
                continue
            scales, figures = self._solve(state, mapping, layers, inputs)
            apply(state, mapping, scales)
            record(state, mapping, **figures)

    def on_finalize(self, state: State) -> None:
        """Let go of the model's layers: the modifier may serve another model."""
        self._resolved = {}

    def _solve(
        self, state: State, mapping: ResolvedMapping, layers: dict[str, nn.Module], inputs: list[InputStatistics]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The scales, and the figures for the report."""
        # Experts have seen other tokens than their neighbours, but share the scales: what all have seen counts.
        greatest = torch.stack([statistics.max_magnitude for statistics in inputs]).amax(0)
        if self.smoothing_strength != "search":
            weights = [weight_matrix(layer) for layer in layers.values()]
            scales = smoothing_scales(weights, greatest, self.smoothing_strength, mapping.channel_map)
            return scales, {"strength": self.smoothing_strength}
        found = search_strength(
            balance_weights(state, layers),
            inputs[0].gram if len(inputs) == 1 else torch.stack([s.gram for s in inputs]).sum(0),
            greatest,
            sum(statistics.rows for statistics in inputs),
            activations=[state.schemes[name].input_activations for name in layers],
            channel_map=mapping.channel_map,
        )
        figures = {"strength": found.strength, "error_before": found.error_before, "error": found.error}
        return found.scales, figures

    def _smooths(self, mapping: ResolvedMapping) -> bool:
        if is_match(mapping.smooth_name, mapping.smooth, self.ignore):
            return False
        if all(is_match(n, m, self.ignore) for n, m in mapping.balance.items()):
            return False
        return self.mappings is not None or self.smoothing_strength == "search" or _is_norm(mapping.smooth)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _is_quantized(name: str, _: nn.Module, block: Block) -> bool:
    return name in block.layers


def _balance_first(pair: Any) -> bool:
    """True for ``[[balance, ...], smooth]``."""
    return (
        isinstance(pair, (list, tuple)) and len(pair) == 2 and not isinstance(pair[0], str) and isinstance(pair[1], str)
    )
