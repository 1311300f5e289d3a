"""AWQModifier: scale the channels that activations make important, so that quantization hurts them less."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from compressed_tensors.utils import is_match
from pydantic import Field, PrivateAttr, field_validator
from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.linears import weight_matrix
from bitpress.modifiers.foreign import OF_AWQ, Foreign
from bitpress.modifiers.fused import choose_global_scales
from bitpress.modifiers.mappings import AWQMapping, ResolvedMapping
from bitpress.modifiers.observers import states_observer
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.modifiers.sharing import search_ranges
from bitpress.modifiers.smoothing import apart, apply, as_mappings, balance_weights, find_proven, measured, record
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.ranks import ALONE, Found, Piece, Ranks, Summing, Work, in_step, share_out
from bitpress.solvers import scale_search
from bitpress.statistics import InputStatistics, Statistic, pooled

DEFAULT_GROUP_SIZE = 128
# So many mappings for each rank are shared out one by one: of fewer, each is shared out row by row.
MAPPINGS_PER_RANK = 4


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
        clip: search each group's range too, as the paper does; False leaves it from the least to the greatest value. A
            scheme that states an observer has its ranges from there.
    """

    bits: int | None = Field(default=None, ge=2, le=8)
    symmetric: bool | None = None
    group_size: int | None = None
    mappings: list[AWQMapping] | None = None
    duo_scaling: bool | Literal["both"] = True
    n_grid: int = Field(default=20, ge=1)
    clip: bool = True

    foreign: ClassVar[Mapping[str, Foreign]] = OF_AWQ

    _resolved: dict[str, list[ResolvedMapping]] = PrivateAttr(default_factory=dict)
    _balanced: set[str] = PrivateAttr(default_factory=set)

    @field_validator("mappings", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return as_mappings(value)

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
            scheme = QuantizationScheme(targets=list(self.targets), weights=weights)
            return {"group_0": self.completed(scheme)}
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
        self._resolved = find_proven(state, self._considers, self.mappings, "AWQModifier")
        self._balanced = {n for found in self._resolved.values() for mapping in found for n in mapping.balance}

    def required_statistics(self, state: State, name: str) -> Statistic:
        """Gram matrix and mean magnitude for the balance layers; the Gram matrix for all whose ranges are searched."""
        wanted = super().required_statistics(state, name)
        if name in self._balanced:
            return wanted | Statistic.GRAM | Statistic.MEAN_MAGNITUDE
        clips = self.clip and name in state.schemes and not states_observer(state.schemes[name].weights)
        return wanted | Statistic.GRAM if clips else wanted

    def on_block(self, state: State, block: Block) -> None:
        """Smooth the block's mappings; quantize too if the scheme is this modifier's."""
        figures: dict[int, dict[str, Any]] = {}
        for mappings in apart(state, self._resolved[block.name]):
            figures |= self._smooth(state, mappings)
        for mapping in self._resolved[block.name]:
            if id(mapping) in figures:
                record(state, mapping, **figures[id(mapping)])
        if self.clip:
            self._choose_ranges(state, block)
        super().on_block(state, block)

    def on_finalize(self, state: State) -> None:
        """Let go of the model's layers: the modifier may serve another model."""
        self._resolved = {}

    def _choose_ranges(self, state: State, block: Block) -> None:
        choose_global_scales(state, block)
        search_ranges(state, {n: layer for n, layer in block.layers.items() if self._clips(state, n, layer, block)})

    def _clips(self, state: State, name: str, layer: nn.Module, block: Block) -> bool:
        observed = states_observer(state.schemes[name].weights)
        return name in state.statistics and not observed and self._considers(name, layer, block)

    def _smooth(self, state: State, mappings: Sequence[ResolvedMapping]) -> dict[int, dict[str, Any]]:
        """Smooth mappings that have nothing in common, and give the figures of each, by its ``id``.

        Many are shared out among ranks; few are searched by all.
        """
        known = [(mapping, *measured(state, mapping)) for mapping in mappings]
        known = [each for each in known if each[1]]
        if state.ranks.size > 1 and len(known) < MAPPINGS_PER_RANK * state.ranks.size:
            solved = in_step([self._search(state, *each, state.ranks) for each in known], state.ranks)
        else:
            costs = [sum(weight_matrix(layer).numel() for layer in layers.values()) for _, layers, _ in known]
            works = [Work((i,), (1,), per_row=cost) for i, cost in enumerate(costs)]

            def alone(own: list[Piece]) -> list[Found]:
                return [in_step([self._search(state, *known[piece.matrix], ALONE)], ALONE)[0] for piece in own]

            solved = [found for parts in share_out(state.ranks, works, alone).values() for found in parts]
        for (mapping, _, _), found in zip(known, solved, strict=True):
            apply(state, mapping, found.tensors[0])
        return {id(mapping): found.note for (mapping, _, _), found in zip(known, solved, strict=True)}

    def _search(
        self,
        state: State,
        mapping: ResolvedMapping,
        layers: dict[str, nn.Module],
        inputs: list[InputStatistics],
        ranks: Ranks,
    ) -> Summing[Found]:
        # Experts that have seen other tokens than their neighbours: the input's statistics are those of all.
        statistics = pooled(inputs)
        found = yield from scale_search(
            balance_weights(state, layers),
            statistics.gram,
            statistics.mean_magnitude,
            channel_map=mapping.channel_map,
            n_grid=self.n_grid,
            duo_scaling=self.duo_scaling,
            ranks=ranks,
        )
        figures = {"ratio": found.ratio, "duo": found.duo, "error_before": found.error_before, "error": found.error}
        return Found([found.scales], figures)

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
