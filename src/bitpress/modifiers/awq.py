"""AWQModifier: scale the channels that activations make important, so that quantization hurts them less."""

import logging
from typing import Any, Literal

import torch
from compressed_tensors.utils import is_match
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.linears import weight_matrix
from bitpress.models.smoothing import divide_outputs, multiply_inputs, out_channels
from bitpress.modifiers.mappings import AWQMapping, ResolvedMapping
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.modifiers.resolving import resolve_mappings
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.solvers import BalanceWeight, search_parameters, search_scales
from bitpress.statistics import Statistic, pooled

logger = logging.getLogger(__name__)

DEFAULT_GROUP_SIZE = 128


class AWQModifier(QuantizationModifier):
    """Activation-aware weight quantization (Lin et al., 2023, https://arxiv.org/abs/2306.00978).

    Before a QuantizationModifier it smooths, and takes the scheme from there. Alone, with a scheme of its own, it
    quantizes as well.

    Attributes:
        bits: of the weights, 2 to 8. With ``symmetric`` and ``group_size`` it states a scheme for ``targets``.
        symmetric: grids centred on 0.
        group_size: input channels that share a scale, -1 for all of a row. 128 if only ``bits`` is stated.
        mappings: which layers scale which. If not given, they are found by running the blocks; where some are
            registered for the model's family, those are used.
        duo_scaling: let the weight's magnitude have its share in the candidates; "both" tries with and without.
        n_grid: exponents tried per mapping.
        clip: search each group's range too, as the paper does; False leaves it from the least to the greatest value.
    """

    bits: int | None = Field(default=None, ge=2, le=8)
    symmetric: bool | None = None
    group_size: int | None = None
    mappings: list[AWQMapping] | None = None
    duo_scaling: bool | Literal["both"] = True
    n_grid: int = Field(default=20, ge=1)
    clip: bool = True

    _resolved: dict[str, list[ResolvedMapping]] = PrivateAttr(default_factory=dict)
    _balanced: set[str] = PrivateAttr(default_factory=set)

    @field_validator("mappings", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A mapping may also be written as a pair, as in YAML."""
        if not isinstance(value, list):
            return value
        return [AWQMapping(item[0], item[1]) if isinstance(item, (list, tuple)) else item for item in value]

    @property
    def states_scheme(self) -> bool:
        """True with a scheme, config_groups or choose_from: then this modifier quantizes as well."""
        return any(stated is not None for stated in (self.scheme, self.config_groups, self.choose_from))

    @property
    def may_state_scheme(self) -> bool:
        """True with ``bits``, which are enough if no other modifier says more."""
        return self.states_scheme or self.bits is not None

    def groups(self) -> dict[str, QuantizationScheme]:
        """See :meth:`QuantizationModifier.groups`; ``bits`` states one group."""
        groups = super().groups()
        if not groups and self.bits is not None:
            weights = QuantizationArgs(
                num_bits=self.bits,
                symmetric=True if self.symmetric is None else self.symmetric,
                group_size=self.group_size or DEFAULT_GROUP_SIZE,
            )
            return {"group_0": QuantizationScheme(targets=list(self.targets), weights=weights)}
        for label, group in groups.items():
            if group.weights is not None:
                self._check_agreement(group.weights, f"its own {label}")
        return groups

    def on_initialize(self, state: State) -> None:
        """Find the mappings of every block, and prove them."""
        super().on_initialize(state)
        for name, scheme in state.schemes.items():
            for each in state.candidates.get(name, [scheme]):
                self._check_agreement(each.weights, name)
        if not any(block.calls for block in state.blocks):
            raise BitpressError("AWQModifier needs calibration data, but no dataset was given: give oneshot one.")
        resolution = resolve_mappings(state.model, state.blocks, self._considers, self.mappings, state.seed)
        self._resolved = resolution.mappings
        state.unmapped = {n: left.why for found in resolution.left.values() for left in found for n in left.layers}
        if not any(self._resolved.values()):
            raise BitpressError(
                f"no mapping fits {type(state.model).__name__}: state mappings=[AWQMapping(smooth, [balance, ...])], "
                "or use QuantizationModifier alone."
            )

        self._balanced = {n for found in self._resolved.values() for mapping in found for n in mapping.balance}

    def required_statistics(self, state: State, name: str) -> Statistic:
        """Gram matrix and mean magnitude for the balance layers; the Gram matrix for all whose ranges are searched."""
        if name in self._balanced:
            return Statistic.GRAM | Statistic.MEAN_MAGNITUDE
        return Statistic.GRAM if self.clip and name in state.schemes else Statistic.NONE

    def on_block(self, state: State, block: Block) -> None:
        """Smooth the block's mappings; quantize too if the scheme is this modifier's."""
        for mapping in self._resolved[block.name]:
            self._smooth(state, mapping)
        if self.clip:
            self._choose_ranges(state, block)
        super().on_block(state, block)

    def on_finalize(self, state: State) -> None:
        """Let go of the model's layers: the modifier may serve another model."""
        self._resolved = {}

    def _choose_ranges(self, state: State, block: Block) -> None:
        for name, layer in block.layers.items():
            statistics = state.statistics.get(name)
            if statistics is not None and self._considers(name, layer, block):
                matrix = weight_matrix(layer)
                args = state.schemes[name].weights
                state.ranges[name] = search_parameters(matrix, args, statistics.gram, matrix.dtype)

    def _smooth(self, state: State, mapping: ResolvedMapping) -> None:
        targeted = {n: m for n, m in mapping.balance.items() if n in state.schemes}
        measured = {id(s): s for s in (state.statistics.get(n) for n in targeted) if s is not None}
        if not measured or mapping.channel_map is None:
            logger.warning(
                "%s is left alone: %s did not run in %s.",
                mapping.mapping,
                ", ".join(mapping.balance),
                "calibration" if not measured else "the dry run, so that nothing proves the mapping",
            )
            return
        # Experts that have seen other tokens than their neighbours: the input's statistics are those of all.
        statistics = pooled(list(measured.values()))
        found = search_scales(
            [
                BalanceWeight(weight_matrix(m), state.schemes[n].weights, weight_matrix(m).dtype)
                for n, m in targeted.items()
            ],
            statistics.gram,
            statistics.mean_magnitude,
            channel_map=mapping.channel_map,
            n_grid=self.n_grid,
            duo_scaling=self.duo_scaling,
        )
        self._apply(state, mapping, found.scales)
        state.mapping_records.append({
            "smooth_layer": mapping.smooth_name,
            "balance_layers": list(mapping.balance),
            "source": mapping.source,
            "proof": mapping.difference,
            "ratio": found.ratio,
            "duo": found.duo,
            "error_before": found.error_before,
            "error": found.error,
        })  # fmt: skip

    def _apply(self, state: State, mapping: ResolvedMapping, scales: Tensor) -> None:
        """Move the scales over, and let the statistics follow."""
        assert mapping.channel_map is not None, "proven before it is applied"  # noqa: S101
        channel_map = mapping.channel_map.to(scales.device)
        at_inputs = scales[channel_map]
        # Channels that feed no balance layer (q and k of a fused projection) stay as they are.
        at_outputs = torch.ones(out_channels(mapping.smooth) or 0, device=scales.device)
        at_outputs[channel_map] = at_inputs if mapping.power == 1 else at_inputs.pow(1 / mapping.power)
        divide_outputs(mapping.smooth, at_outputs)
        for layer in mapping.balance.values():
            multiply_inputs(layer, at_inputs)
        shared = {id(s): s for s in (state.statistics.get(n) for n in mapping.balance) if s is not None}
        for statistics in shared.values():
            statistics.rescale(at_inputs)

    def _considers(self, name: str, layer: nn.Module, block: Block) -> bool:
        stated = self.states_scheme or not {"targets", "ignore"} & self.model_fields_set
        mine = stated or (is_match(name, layer, self.targets) and not is_match(name, layer, self.ignore))
        return mine and name in block.layers

    def _check_agreement(self, weights: QuantizationArgs, where: str) -> None:
        stated = {"bits": self.bits, "symmetric": self.symmetric, "group_size": self.group_size}
        scheme = {
            "bits": weights.num_bits,
            "symmetric": weights.symmetric,
            "group_size": weights.group_size or -1,
        }
        for field, value in stated.items():
            if value is not None and value != scheme[field]:
                raise BitpressError(
                    f"AWQModifier states {field}={value}, but the scheme of {where} has {field}={scheme[field]}. "
                    "State it in one of them only, or make them agree."
                )
