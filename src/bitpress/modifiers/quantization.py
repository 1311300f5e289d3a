"""QuantizationModifier: which layers are quantized, and to what; by itself, round-to-nearest."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils import is_match
from pydantic import Field, field_validator
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.experts import find_layer, fused_experts, named_layers, routers
from bitpress.models.linears import has_columns, in_features, is_linear, weight_matrix
from bitpress.models.smoothing import is_convolution
from bitpress.modifiers.activations import (
    AttentionScheme,
    attention_schemes,
    check_group,
    check_measured,
    check_widths,
    is_of_attention,
    readable_activations,
)
from bitpress.modifiers.allocation import AllocatingModifier
from bitpress.modifiers.base import Modifier, nearest
from bitpress.modifiers.fused import choose_global_scales
from bitpress.modifiers.observers import check_observer, observed_ranges, states_observer, statistics_of_observer
from bitpress.modifiers.state import State
from bitpress.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationType,
    QuantizedWeight,
    check_supported,
    is_preset_scheme,
    is_static,
    preset_name_to_scheme,
    static_tensors,
    stored_format,
)
from bitpress.quantization.grid import GROUPED, block_shape
from bitpress.solvers import check_finite, output_error, round_to_nearest
from bitpress.statistics import InputStatistics, Statistic

logger = logging.getLogger(__name__)

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The report's errors are estimates from every so many rows of a weight: exact ones would cost a quarter of the search.
SAMPLED_ROWS = 4
# Parameters that are left alone are spoken of from this share of the model on.
NOTABLE = 0.01


@dataclass(frozen=True)
class Problem:
    """A layer that is to be quantized.

    Attributes:
        name: of the layer.
        weight: (out, in): the layer's own, which the result is written to.
        args: the scheme.
        statistics: of its inputs, if it ran and a modifier asked for any.
        ranges: scale and zero point that its observer or an earlier modifier chose, if one did.
        global_scale: (1,), float32: what scales are relative to, where the scheme has one.
        figures: what the report is to say of it; a solver may add to them.
    """

    name: str
    weight: Tensor
    args: QuantizationArgs
    statistics: InputStatistics | None
    ranges: tuple[Tensor, Tensor] | None
    global_scale: Tensor | None
    figures: dict[str, Any] = field(default_factory=dict)


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

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("scheme", "choose_from")
    @classmethod
    def _known_preset(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value if isinstance(value, (dict, list)) else ():
            if isinstance(name, str) and not is_preset_scheme(name):
                raise ValueError(f"no preset is called {name!r}{nearest(name, PRESETS)}")
        return value

    @property
    def states_scheme(self) -> bool:
        """See :attr:`Modifier.states_scheme`: always, and an error if it does not."""
        return True

    def groups(self) -> dict[str, QuantizationScheme]:
        """The schemes with their targets, whichever field they were stated in."""
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
            _check_scheme(label, group)
            for name, module in named_layers(model):
                if name in schemes or not is_linear(module) or not is_match(name, module, group.targets):
                    continue
                if not is_match(name, module, self.ignore):
                    schemes[name] = group
        _say_what_is_no_layer(model)
        _drop_routers(model, schemes)
        _drop_shared_weights(model, schemes)
        if not schemes:
            raise BitpressError(
                f"{type(self).__name__}: every layer that targets match is ignored or shares its weight."
            )
        schemes = readable_activations(model, schemes)
        _check_shapes(model, schemes)
        check_widths(model, schemes)
        for each in self.alternatives(model, schemes):
            _check_shapes(model, each)
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
        problems = [
            self._problem(state, name, module)
            for name, module in block.layers.items()
            if state.owners.get(name) is self
        ]
        for problem, quantized in zip(problems, self.solve_all(problems), strict=True):
            values = quantized.dequantize()
            figures = _figures(problem.weight, values, quantized, problem.statistics)
            state.layer_records.setdefault(problem.name, {}).update(figures | problem.figures)
            problem.weight.copy_(values)
            state.quantized[problem.name] = quantized

    def solve_all(self, problems: Sequence["Problem"]) -> list[QuantizedWeight]:
        """The quantized forms of a block's layers; a modifier that solves several together overrides this."""
        return [self.solve(p.weight, p.args, p.statistics, p.ranges, p.global_scale) for p in problems]

    def solve(
        self,
        weight: Tensor,
        args: QuantizationArgs,
        statistics: InputStatistics | None,
        ranges: tuple[Tensor, Tensor] | None,
        global_scale: Tensor | None = None,
    ) -> QuantizedWeight:
        """The quantized form of ``weight`` (out, in); a modifier with another solver overrides this.

        ``ranges`` are the scale and zero point that its observer or an earlier modifier chose, if one did, and
        ``global_scale``, (1,), is what scales are relative to, where the scheme has one.
        """
        return round_to_nearest(weight, args, weight.dtype, ranges, global_scale)

    def _problem(self, state: State, name: str, module: nn.Module) -> "Problem":
        matrix = weight_matrix(module)
        check_finite(matrix, name)
        args, statistics = state.schemes[name].weights, state.statistics.get(name)
        global_scale = state.global_scales.get(name)
        ranges = observed_ranges(matrix, args, statistics, global_scale) or state.ranges.get(name)
        return Problem(name, matrix, args, statistics, ranges, global_scale)

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
                logger.warning("%s: ignore pattern %r matches nothing.", type(self).__name__, pattern)


PRESETS = [name for name in PRESET_SCHEMES if name != "UNQUANTIZED"]


def resolve_all(
    modifiers: list[Modifier], model: nn.Module
) -> tuple[dict[str, QuantizationScheme], dict[str, Modifier]]:
    """The scheme of every layer that the recipe quantizes, and the modifier that does it.

    The last modifier that states a scheme for a layer quantizes it; the others must agree with it.

    Raises:
        BitpressError: two modifiers want different grids for one layer, or none states a scheme at all.
    """
    schemes: dict[str, QuantizationScheme] = {}
    owners: dict[str, Modifier] = {}
    stating = [m for m in modifiers if m.states_scheme] or [m for m in modifiers if m.may_state_scheme]
    for modifier in reversed(stating):
        for name, scheme in modifier.resolve_schemes(model).items():
            if name in schemes:
                _check_same(name, scheme, schemes[name], (modifier, owners[name]))
            schemes.setdefault(name, scheme)
            owners.setdefault(name, modifier)
    order = [name for name, _ in named_layers(model) if name in schemes]
    return {name: schemes[name] for name in order}, owners


def _grid(state: State, name: str) -> QuantizationArgs | None:
    """The grid of a layer's input, or of what a tap receives."""
    tap = state.taps.get(name)
    if tap is None:
        return state.schemes[name].input_activations
    if tap.owner in state.attentions:
        args: QuantizationArgs = state.attentions[tap.owner].args
        return args
    return state.schemes[tap.owner].output_activations


def _check_same(name: str, a: QuantizationScheme, b: QuantizationScheme, of: tuple[Modifier, Modifier]) -> None:
    for part in ("weights", "input_activations", "output_activations"):
        if getattr(a, part) != getattr(b, part):
            raise BitpressError(
                f"{type(of[0]).__name__} and {type(of[1]).__name__} disagree about the {part} of {name}: "
                f"{_describe(getattr(a, part))} and {_describe(getattr(b, part))}. State it in one of them."
            )


def _describe(args: QuantizationArgs | None) -> str:
    if args is None:
        return "none"
    group = f", groups of {args.group_size}" if args.group_size else ""
    observer = f", observer {args.observer}" if states_observer(args) else ""
    kind = "" if args.type == QuantizationType.INT else " (float)"
    grid = f"{args.num_bits} bits{kind}, {'symmetric' if args.symmetric else 'asymmetric'}"
    return f"{grid}, per {args.strategy}{group}{observer}"


def _check_scheme(label: str, scheme: QuantizationScheme) -> None:
    if scheme.weights is None:
        raise BitpressError(f"config group {label!r} has no weights: weight quantization needs weights=.")
    check_group(label, scheme)
    try:
        check_supported(scheme.weights)
        check_observer(scheme.weights)
        stored_format(scheme)
    except BitpressError as error:
        raise BitpressError(f"config group {label!r}: {error}") from error


def _check_shapes(model: nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """Every problem at once: group sizes that do not divide, dtypes that cannot hold a scale."""
    problems: dict[tuple[int, int], list[str]] = {}
    ragged: dict[tuple[int, int], list[str]] = {}
    for name, scheme in schemes.items():
        layer = find_layer(model, name)
        dtype = weight_matrix(layer).dtype
        if dtype not in STORED_DTYPES:
            raise BitpressError(f"{name}.weight is {dtype}: load the model in float32, float16 or bfloat16.")
        args = scheme.weights
        if args.strategy in GROUPED and in_features(layer) % args.group_size:
            problems.setdefault((args.group_size, in_features(layer)), []).append(name)
        block = block_shape(args)
        if block is not None and in_features(layer) % block[1]:
            ragged.setdefault((block[1], in_features(layer)), []).append(name)
    if not problems:
        for (columns, width), names in ragged.items():
            logger.warning(
                "blocks of %d columns do not divide the %d inputs of %s: transformers reads them, but vLLM's kernels "
                "want whole blocks. Add the layers to ignore if it is to serve them.", columns, width, _some(names),
            )  # fmt: skip
        return
    lines = []
    for (group, width), names in problems.items():
        fits = ", ".join(str(d) for d in (256, 128, 96, 64, 48, 32, 16, 8) if width % d == 0) or "none of the usual"
        lines.append(
            f"group_size {group} does not divide the {width} inputs of {_some(names)} (sizes that fit: {fits})"
        )
    raise BitpressError("; ".join(lines) + ". Choose a size that fits, or add the layers to ignore.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _drop_routers(model: nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """Routers of experts are left alone, as servers expect, unless a target names them."""
    for name in routers(model):
        if name in schemes and not any(is_match(name, _NAMELESS, target) for target in schemes[name].targets):
            logger.info("%s decides about experts and is left alone: name it in targets to quantize it.", name)
            del schemes[name]


_NAMELESS = nn.Module()  # matches by its name only


def _drop_shared_weights(model: nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """A weight that another module uses too (a tied head) is left alone: to quantize it would change both."""
    users: dict[int, list[str]] = {}
    for name, module in named_layers(model):
        for parameter in module.parameters(recurse=False):
            users.setdefault(_place(parameter), []).append(name)
    for name in list(schemes):
        others = [n for n in users[_place(find_layer(model, name).weight)] if n != name]
        if others:
            logger.warning("%s shares its weight with %s and is left alone.", name, ", ".join(others))
            del schemes[name]


def _place(parameter: Any) -> Any:
    """Equal for parameters that are one, and for those that only share their memory."""
    return (parameter.data_ptr(), parameter.shape) if parameter.data_ptr() else id(parameter)


def _say_what_is_no_layer(model: nn.Module) -> None:
    """Weights that no layer holds are left alone: an in-projection of ``nn.MultiheadAttention``, for instance."""
    total = sum(p.numel() for p in model.parameters())
    found: dict[tuple[str, str], list[nn.Parameter]] = {}
    for module in model.modules():
        experts = fused_experts(module)
        known = has_columns(module) or is_convolution(module) or isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for local, parameter in () if known else module._parameters.items():
            fused = experts is not None and local in experts.parameters
            if parameter is not None and parameter.dim() > 1 and not fused:
                found.setdefault((type(module).__name__, local), []).append(parameter)
    for (kind, local), parameters in found.items():
        share = sum(p.numel() for p in parameters) / total
        if share >= NOTABLE:
            logger.warning(
                "%s of %d %s (%.0f%% of all parameters) is left alone: a parameter, not a linear layer.",
                local, len(parameters), kind, 100 * share,
            )  # fmt: skip


def _figures(
    before: Tensor, after: Tensor, quantized: QuantizedWeight, statistics: InputStatistics | None
) -> dict[str, Any]:
    """What the report says of a layer. The relative error is that of its output where the inputs are known."""
    sampled = before[::SAMPLED_ROWS].float()
    delta = after[::SAMPLED_ROWS].float() - sampled
    figures: dict[str, Any] = {
        "shape": tuple(before.shape),
        "bits": quantized.args.num_bits,
        "weight_error": float(delta.square().sum() / sampled.square().sum().clamp(min=1e-30)),
    }
    if statistics is not None and statistics.rows and Statistic.GRAM in statistics.wanted:
        gram = statistics.gram
        figures["relative_error"] = output_error(delta, gram) / max(output_error(sampled, gram), 1e-30)
    return figures
