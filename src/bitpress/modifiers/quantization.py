"""QuantizationModifier: which layers are quantized, and to what; by itself, round-to-nearest."""

import logging
from typing import Any

import torch
from compressed_tensors.utils import is_match
from pydantic import Field, field_validator
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.experts import find_layer, fused_experts, named_layers, routers
from bitpress.models.linears import has_columns, in_features, is_linear, weight_matrix
from bitpress.models.smoothing import is_convolution
from bitpress.modifiers.allocation import AllocatingModifier
from bitpress.modifiers.base import Modifier, nearest
from bitpress.modifiers.state import State
from bitpress.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizedWeight,
    check_supported,
    is_preset_scheme,
    preset_name_to_scheme,
)
from bitpress.solvers import check_finite, output_error, round_to_nearest
from bitpress.statistics import InputStatistics, Statistic

logger = logging.getLogger(__name__)

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The report's errors are estimates from every so many rows of a weight: exact ones would cost a quarter of the search.
SAMPLED_ROWS = 4
# Parameters that are left alone are spoken of from this share of the model on.
NOTABLE = 0.01


class QuantizationModifier(AllocatingModifier):
    """Quantize the weights of linear layers, each value to the nearest point of its grid.

    Attributes:
        targets: names, class names or ``re:`` patterns of the layers; of those in ``config_groups`` their own.
        ignore: the same, for layers that are left alone.
        scheme: a preset's name ("W4A16"), a QuantizationScheme, or a dictionary of preset names and their targets.
        config_groups: schemes by any name, each with its targets.
        choose_from, bits_per_weight, max_bytes: instead, a scheme of its own for each layer; see
            :class:`AllocatingModifier`.
    """

    targets: list[str] = Field(default_factory=lambda: ["Linear", "Conv1D"])
    ignore: list[str] = Field(default_factory=list)
    scheme: str | QuantizationScheme | dict[str, list[str]] | None = None
    config_groups: dict[str, QuantizationScheme] | None = None

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
        if not groups:
            raise BitpressError(
                f"{type(self).__name__} states no scheme: give scheme=, config_groups= or choose_from=."
            )
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
        _check_shapes(model, schemes)
        for each in self.alternatives(model, schemes):
            _check_shapes(model, each)
        return schemes

    def on_block(self, state: State, block: Block) -> None:
        """Quantize the block's layers that are this modifier's."""
        for name, module in block.layers.items():
            if state.owners.get(name) is self:
                self._quantize(state, name, module)

    def solve(
        self,
        weight: Tensor,
        args: QuantizationArgs,
        statistics: InputStatistics | None,
        ranges: tuple[Tensor, Tensor] | None,
    ) -> QuantizedWeight:
        """The quantized form of ``weight`` (out, in); a modifier with another solver overrides this.

        ``ranges`` are the scale and zero point that an earlier modifier chose for it, if one did.
        """
        return round_to_nearest(weight, args, weight.dtype, ranges)

    def _quantize(self, state: State, name: str, module: nn.Module) -> None:
        matrix = weight_matrix(module)
        check_finite(matrix, name)
        statistics = state.statistics.get(name)
        quantized = self.solve(matrix, state.schemes[name].weights, statistics, state.ranges.get(name))
        values = quantized.dequantize()
        state.layer_records.setdefault(name, {}).update(_figures(matrix, values, quantized, statistics))
        matrix.copy_(values)
        state.quantized[name] = quantized

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


PRESETS = [name for name in ("W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W5A16", "W6A16", "W7A16", "W8A16")
           if is_preset_scheme(name)]  # fmt: skip


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
            if name in schemes and schemes[name].weights != scheme.weights:
                raise BitpressError(
                    f"{type(modifier).__name__} and {type(owners[name]).__name__} disagree about {name}: "
                    f"{_describe(scheme.weights)} and {_describe(schemes[name].weights)}. State it in one of them."
                )
            schemes.setdefault(name, scheme)
            owners.setdefault(name, modifier)
    if not schemes:
        raise BitpressError("the recipe quantizes nothing: give a modifier scheme= or config_groups=.")
    order = [name for name, _ in named_layers(model) if name in schemes]
    return {name: schemes[name] for name in order}, owners


def _describe(args: QuantizationArgs) -> str:
    group = f", groups of {args.group_size}" if args.group_size else ""
    return f"{args.num_bits} bits, {'symmetric' if args.symmetric else 'asymmetric'}, per {args.strategy}{group}"


def _check_scheme(label: str, scheme: QuantizationScheme) -> None:
    if scheme.weights is None:
        raise BitpressError(f"config group {label!r} has no weights: weight quantization needs weights=.")
    for kind in ("input_activations", "output_activations"):
        if getattr(scheme, kind) is not None:
            raise BitpressError(f"config group {label!r}: {kind} is not supported yet; use a weight-only scheme.")
    try:
        check_supported(scheme.weights)
    except BitpressError as error:
        raise BitpressError(f"config group {label!r}: {error}") from error


def _check_shapes(model: nn.Module, schemes: dict[str, QuantizationScheme]) -> None:
    """Every problem at once: group sizes that do not divide, dtypes that cannot hold a scale."""
    problems: dict[tuple[int, int], list[str]] = {}
    for name, scheme in schemes.items():
        layer = find_layer(model, name)
        dtype = weight_matrix(layer).dtype
        if dtype not in STORED_DTYPES:
            raise BitpressError(f"{name}.weight is {dtype}: load the model in float32, float16 or bfloat16.")
        args = scheme.weights
        if args.strategy == QuantizationStrategy.GROUP and in_features(layer) % args.group_size:
            problems.setdefault((args.group_size, in_features(layer)), []).append(name)
    if not problems:
        return
    lines = []
    for (group, width), names in problems.items():
        fits = ", ".join(str(d) for d in (256, 128, 96, 64, 48, 32, 16, 8) if width % d == 0) or "none of the usual"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        where = f"{', '.join(names[:3])}{more}"
        lines.append(f"group_size {group} does not divide the {width} inputs of {where} (sizes that fit: {fits})")
    raise BitpressError("; ".join(lines) + ". Choose a size that fits, or add the layers to ignore.")


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
