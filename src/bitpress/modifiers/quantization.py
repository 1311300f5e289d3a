"""QuantizationModifier: which layers are quantized, and to what; by itself, round-to-nearest."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils import is_match
from pydantic import Field, field_validator
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.experts import find_layer, named_layers
from bitpress.models.linears import is_linear, weight_matrix
from bitpress.modifiers.activations import (
    AttentionScheme,
    attention_schemes,
    check_measured,
    check_widths,
    is_of_attention,
    readable_activations,
)
from bitpress.modifiers.allocation import AllocatingModifier
from bitpress.modifiers.base import FieldError, nearest
from bitpress.modifiers.foreign import OF_QUANTIZATION, Foreign
from bitpress.modifiers.fused import choose_global_scales
from bitpress.modifiers.observers import OBSERVERS, observed_ranges, statistics_of_observer
from bitpress.modifiers.sharing import (
    Cost,
    Problem,
    found,
    height,
    joined_figures,
    joined_weight,
    rounding_cost,
    rows_of,
)
from bitpress.modifiers.spread import spread
from bitpress.modifiers.state import State
from bitpress.modifiers.steps import note_solved
from bitpress.modifiers.targeting import (
    check_scheme,
    check_shapes,
    drop_routers,
    drop_shared_weights,
    say_what_is_no_layer,
)
from bitpress.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizedWeight,
    is_preset_scheme,
    is_static,
    preset_name_to_scheme,
    static_tensors,
)
from bitpress.ranks import Found, Piece, Work, share_out
from bitpress.solvers import check_finite, round_to_nearest
from bitpress.statistics import InputStatistics, Statistic

logger = logging.getLogger(__name__)


class QuantizationModifier(AllocatingModifier):
    """Quantize the weights of linear layers, each value to the nearest point of its grid.

    What a scheme says of activations is done when the model runs: here, in transformers and in servers alike. Scales
    that are not dynamic are those of the least and the greatest value that calibration saw, in the model whose weights
    are quantized.

    Attributes:
        targets: names, class names or ``re:`` patterns of the layers; of those in ``config_groups`` their own.
        ignore: the same, for layers that are left alone.
        scheme: a preset's name ("W4A16"), a QuantizationScheme, or a dictionary of preset names and their targets.
        config_groups: schemes by any name, each with its targets. One without weights is of attention modules: its
            ``input_activations`` are the grid of queries, keys and values.
        kv_cache_scheme: the grid of all keys and values, as they are cached: per tensor, or per head ("attn_head").
        weight_observer: the observer of all weights, in place of what their schemes say.
        fused: layers that servers fuse into one (q, k and v; gate and up) must have one scheme, or all be left alone;
            False allows what they cannot load.
        choose_from, bits_per_weight, max_bytes: instead, a scheme of its own for each layer; see
            :class:`AllocatingModifier`.

    How a weight's ranges are chosen is its scheme's ``observer``: "minmax" (from the least to the greatest value, the
    default), "mse" (shrunk, for the least squared error of the weight), "imatrix_mse" (the same, each column weighed by
    the mean square of its input), "gram" (for the least squared error of the output, as far as one group goes). The
    last two need data. Ranges that an AWQModifier has chosen stay where no observer is stated.
    """

    targets: list[str] = Field(default_factory=lambda: ["Linear", "Conv1D"])
    ignore: list[str] = Field(default_factory=list)
    scheme: str | QuantizationScheme | dict[str, list[str]] | None = None
    config_groups: dict[str, QuantizationScheme] | None = None
    kv_cache_scheme: QuantizationArgs | None = None
    weight_observer: str | None = None
    fused: bool = True

    foreign: ClassVar[Mapping[str, Foreign]] = OF_QUANTIZATION

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("scheme", mode="before")
    @classmethod
    def _targets_of_presets(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not all(isinstance(name, str) and is_preset_scheme(name) for name in value):
            return value
        return {name: [target] if isinstance(target, str) else target for name, target in value.items()}

    @field_validator("weight_observer")
    @classmethod
    def _known_observer(cls, value: str | None) -> str | None:
        if value is not None and value not in OBSERVERS:
            raise ValueError(f"no observer is called {value!r}{nearest(value, list(OBSERVERS))}")
        return value

    @field_validator("scheme", "choose_from")
    @classmethod
    def _known_preset(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value if isinstance(value, (dict, list)) else ():
            if isinstance(name, str) and not is_preset_scheme(name):
                raise ValueError(f"no preset is called {name!r}{nearest(name, PRESETS)}")
        return value

    @classmethod
    def translated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`Modifier.translated`; of ``fields``, ``observer`` is taken apart, by what it observes."""
        if "observer" not in fields:
            return super().translated(fields)
        rest = {name: value for name, value in fields.items() if name != "observer"}
        stated = fields["observer"] or {}
        if not isinstance(stated, dict) or not set(stated) <= set(OBSERVED):
            raise FieldError(f"{cls.__name__}: observer is a mapping of {', '.join(OBSERVED)} to names.", "observer")
        return super().translated({**rest, **{OBSERVED[of]: name for of, name in stated.items()}})

    def completed(self, scheme: QuantizationScheme) -> QuantizationScheme:
        """See :meth:`AllocatingModifier.completed`: ``scheme`` with ``weight_observer``."""
        if scheme.weights is None or self.weight_observer is None:
            return scheme
        return with_weights(scheme, observer=self.weight_observer)

    @property
    def states_scheme(self) -> bool:
        """See :attr:`Modifier.states_scheme`: always, and an error if it does not."""
        return True

    @property
    def keeps_fused(self) -> bool:
        """See :attr:`Modifier.keeps_fused`."""
        return self.fused

    def groups(self) -> dict[str, QuantizationScheme]:
        """The schemes with their targets, whichever field they were stated in."""
        return {label: self.completed(group) for label, group in self._stated_groups().items()}

    def _stated_groups(self) -> dict[str, QuantizationScheme]:
        if self.scheme is not None and self.config_groups is not None:
            raise BitpressError(f"{type(self).__name__}: state scheme or config_groups, not both.")
        if self.choose_from is not None:
            if self.scheme is not None or self.config_groups is not None:
                raise BitpressError(f"{type(self).__name__}: state choose_from, or scheme or config_groups, not both.")
            return self.offered(self.targets, stated="targets" in self.model_fields_set)
        if self.config_groups is not None:
            return self.config_groups
        if isinstance(self.scheme, QuantizationScheme):
            targets = self.targets if "targets" in self.model_fields_set else self.scheme.targets
            return {"group_0": self.scheme.model_copy(update={"targets": list(targets)})}
        if isinstance(self.scheme, dict):
            stated = self.scheme.items()
            return {f"group_{i}": preset_name_to_scheme(n, list(t)) for i, (n, t) in enumerate(stated)}
        if self.scheme is None:
            return {}
        return {"group_0": preset_name_to_scheme(self.scheme, list(self.targets))}

    def resolve_schemes(self, model: nn.Module) -> dict[str, QuantizationScheme]:
        """See :meth:`Modifier.resolve_schemes`. The first group that matches a layer has it."""
        groups = self.groups()
        if not groups and self.kv_cache_scheme is None:
            raise BitpressError(
                f"{type(self).__name__} states no scheme: give scheme=, config_groups= or choose_from=."
            )
        groups = {label: group for label, group in groups.items() if not is_of_attention(group)}
        if not groups:
            return {}
        self._check_patterns(model, groups)
        schemes: dict[str, QuantizationScheme] = {}
        for label, group in groups.items():
            check_scheme(label, group)
            for name, module in named_layers(model):
                if name in schemes or not is_linear(module) or not is_match(name, module, group.targets):
                    continue
                if not is_match(name, module, self.ignore):
                    schemes[name] = group
        say_what_is_no_layer(model)
        drop_routers(model, schemes)
        drop_shared_weights(model, schemes)
        if not schemes:
            raise BitpressError(
                f"{type(self).__name__}: every layer that targets match is ignored or shares its weight."
            )
        schemes = readable_activations(model, schemes)
        check_shapes(model, schemes)
        check_widths(model, schemes)
        for each in self.alternatives(model, schemes):
            check_shapes(model, each)
            check_widths(model, each)
        return schemes

    def resolve_attentions(self, model: nn.Module) -> dict[str, AttentionScheme]:
        """See :meth:`Modifier.resolve_attentions`."""
        groups = {label: group for label, group in self.groups().items() if is_of_attention(group)}
        return attention_schemes(model, self.kv_cache_scheme, groups, self.ignore)

    def required_statistics(self, state: State, name: str) -> Statistic:
        """The ranges of static activations, and what the observers of weights need."""
        wanted = Statistic.RANGE if name in self._static(state, [name]) else Statistic.NONE
        mine = name in state.schemes and state.owners.get(name) is self
        return wanted | statistics_of_observer(state.schemes[name].weights) if mine else wanted

    def on_initialize(self, state: State) -> None:
        """Refuse static activations of what the dry run has not seen, and budgets that cannot be met."""
        super().on_initialize(state)
        static = self._static(state, [*state.schemes, *state.taps])
        if static and not any(block.calls for block in state.blocks):
            check_measured(static, self, "no dataset was given to calibrate it: give oneshot one")
        idle = {name for block in state.blocks if not block.calls for name in block.layers}
        check_measured([n for n in static if n in idle], self, "the layer did not run in the dry run")
        taps = [n for n in static if n in state.taps]
        check_measured([n for n in taps if not state.taps[n].ran], self, "it did not occur in the dry run")
        outside = [n for n in taps if not any(block.holds(n) for block in state.blocks)]
        check_measured(outside, self, "it is in no block: state larger blocks with sequential_targets")

    def _static(self, state: State, names: Sequence[str]) -> list[str]:
        """Of these layers and taps, those whose static scales are this modifier's."""
        return [n for n in names if state.owners.get(n) is self and is_static(_grid(state, n))]

    def on_solved(self, state: State, block: Block) -> None:
        """Take the scales of the block's static activations from their ranges."""
        within = [*block.layers, *(n for n in state.taps if block.holds(n))]
        static = self._static(state, within)
        check_measured([n for n in static if n not in state.statistics], self, "no calibration batch has run it")
        for name in static:
            low, high = state.statistics[name].range
            tap = state.taps.get(name)
            owner, base = (tap.owner, tap.base) if tap is not None else (name, "input")
            if tap is None:
                low, high = low.amin().view(1), high.amax().view(1)
            args, dtype = _grid(state, name), next(find_layer(state.model, owner).parameters()).dtype
            assert args is not None, "it is static"  # noqa: S101
            state.activations.setdefault(owner, {}).update(static_tensors(base, low, high, args, dtype))

    def on_block(self, state: State, block: Block) -> None:
        """Quantize the block's layers that are this modifier's."""
        choose_global_scales(state, block)
        layers = {name: layer for name, layer in block.layers.items() if state.owners.get(name) is self}
        names, matrices = list(layers), [weight_matrix(layer) for layer in layers.values()]
        for name, matrix in zip(names, matrices, strict=True):
            check_finite(matrix, name)

        def solve(pieces: list[Piece]) -> list[Found]:
            problems = [self._problem(state, names[p.matrix], matrices[p.matrix], p) for p in pieces]
            return [found(p, q) for p, q in zip(problems, self.solve_all(problems), strict=True)]

        for index, parts in share_out(state.ranks, self._works(state, layers), solve).items():
            name, matrix, args = names[index], matrices[index], state.schemes[names[index]].weights
            quantized = joined_weight(parts, args)
            figures = {"shape": tuple(matrix.shape), "bits": args.num_bits, **joined_figures(parts)}
            figures["spread"] = spread(quantized)
            state.layer_records.setdefault(name, {}).update(figures)
            note_solved(state, name, type(self).__name__, matrix, quantized)
            if state.rounding is not None:
                state.unrounded[name] = matrix.clone()
            matrix.copy_(quantized.dequantize())
            state.quantized[name] = quantized

    def solve_all(self, problems: Sequence[Problem]) -> list[QuantizedWeight]:
        """The quantized forms of a block's layers; a modifier that solves several together overrides this.

        Args:
            problems: each a layer's weight, or some of its rows, with its scheme and statistics.

        Returns:
            The quantized weights, in the order of ``problems``.
        """
        return [self.solve(p.weight, p.args, p.statistics, p.ranges, p.global_scale) for p in problems]

    def solve(
        self,
        weight: Tensor,
        args: QuantizationArgs,
        statistics: InputStatistics | None,
        ranges: tuple[Tensor, Tensor] | None,
        global_scale: Tensor | None = None,
    ) -> QuantizedWeight:
        """The quantized form of a weight; a modifier with another solver overrides this.

        Args:
            weight: (out, in), any float dtype.
            args: the scheme.
            statistics: of the layer's input; None if it did not run, or nothing was asked for.
            ranges: scale and zero point that its observer or an earlier modifier chose, if one did, of the shapes of
                :class:`bitpress.quantization.QuantizedWeight`.
            global_scale: (1,), float32: what scales are relative to, where the scheme has one.
        """
        return round_to_nearest(weight, args, weight.dtype, ranges, global_scale)

    @property
    def rows_apart(self) -> bool:
        """True if each row of a weight is solved without the others, so that ranks can share a layer out."""
        own = type(self)
        return own.solve_all is QuantizationModifier.solve_all and own.solve is QuantizationModifier.solve

    def cost(self, columns: int, statistics: InputStatistics | None) -> Cost:
        """What weights of so many ``columns`` with these ``statistics`` take to solve: layers are dealt out by it."""
        return rounding_cost(columns, statistics)

    def _works(self, state: State, layers: dict[str, nn.Module]) -> list[Work]:
        """Layers that share their input and their scheme are dealt out together, as far as that goes."""
        together: dict[Any, list[int]] = {}
        for index, name in enumerate(layers):
            statistics, args = state.statistics.get(name), state.schemes[name].weights
            key = (id(statistics), args.model_dump_json()) if statistics is not None else index
            together.setdefault(key, []).append(index)
        names = list(layers)
        works = []
        for indices in together.values():
            matrices = [weight_matrix(layers[names[i]]) for i in indices]
            cost = self.cost(matrices[0].shape[1], state.statistics.get(names[indices[0]]))
            high = height(state.schemes[names[indices[0]]].weights, apart=self.rows_apart)
            works.append(Work(tuple(indices), tuple(map(len, matrices)), high, cost.fixed, cost.per_row))
        return works

    def _problem(self, state: State, name: str, matrix: Tensor, piece: Piece) -> Problem:
        args, statistics = state.schemes[name].weights, state.statistics.get(name)
        rows, global_scale = matrix[piece.start : piece.stop], state.global_scales.get(name)
        ranges = observed_ranges(rows, args, statistics, global_scale)
        if ranges is None:
            ranges = rows_of(state.ranges.get(name), piece, args)
        return Problem(name, rows, args, statistics, ranges, global_scale)

    def _check_patterns(self, model: nn.Module, groups: dict[str, QuantizationScheme]) -> None:
        modules = list(named_layers(model))
        linears = [name for name, module in modules if is_linear(module)]
        kinds = sorted({type(module).__name__ for _, module in modules if is_linear(module)})
        by_default = "targets" not in self.model_fields_set and self.config_groups is None
        for group in groups.values():
            matched = {t: any(is_match(n, m, t) for n, m in modules if is_linear(m)) for t in group.targets}
            unmatched = [t for t, found in matched.items() if not found]
            if unmatched and not (by_default and any(matched.values())):
                raise BitpressError(
                    f"{type(self).__name__}: target {unmatched[0]!r} matches no linear layer of "
                    f"{type(model).__name__}{nearest(unmatched[0], kinds + linears) if linears else '.'}"
                    f" Its linear layers are of class {', '.join(kinds) or '(none)'}."
                )
        for pattern in self.ignore:
            if not any(is_match(name, module, pattern) for name, module in modules):
                message = "%s: ignore pattern %r matches nothing: look at the names of the layers, or leave it out."
                logger.warning(message, type(self).__name__, pattern)


def with_weights(scheme: QuantizationScheme, **fields: Any) -> QuantizationScheme:
    """The scheme with other fields of its weights."""
    assert scheme.weights is not None, "asked before"  # noqa: S101
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update=fields)})


# What llm-compressor's field `observer` speaks of, and the fields that say the same.
OBSERVED = {"weights": "weight_observer", "input": "input_observer", "output": "output_observer"}
PRESETS = [name for name in PRESET_SCHEMES if name != "UNQUANTIZED"]


def _grid(state: State, name: str) -> QuantizationArgs | None:
    """The grid of a layer's input, or of what a tap receives."""
    tap = state.taps.get(name)
    if tap is None:
        return state.schemes[name].input_activations
    if tap.owner in state.attentions:
        args: QuantizationArgs = state.attentions[tap.owner].args
        return args
    return state.schemes[tap.owner].output_activations
