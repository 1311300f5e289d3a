"""One scheme for each layer, where several modifiers of a recipe state one."""

from collections.abc import Mapping, Sequence

from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.experts import named_layers
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.fused import fused_by_servers
from bitpress.modifiers.observers import states_observer
from bitpress.quantization import QuantizationArgs, QuantizationScheme, QuantizationType


def resolve_all(
    modifiers: list[Modifier], model: nn.Module
) -> tuple[dict[str, QuantizationScheme], dict[str, Modifier]]:
    """The scheme of every layer that the recipe quantizes, and the modifier that does it.

    The last modifier that states a scheme for a layer quantizes it; the others must agree with it.

    Raises:
        BitpressError: two modifiers want different grids for one layer, or layers that servers fuse would differ.
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
    _check_fused(model, schemes, owners)
    order = [name for name, _ in named_layers(model) if name in schemes]
    return {name: schemes[name] for name in order}, owners


def _check_fused(model: nn.Module, schemes: Mapping[str, QuantizationScheme], owners: Mapping[str, Modifier]) -> None:
    """Refuse what no server that makes one layer of q, k and v, or of gate and up, could load."""
    split = []
    for names in fused_by_servers(model):
        quantized = [name for name in names if name in schemes]
        if quantized and all(owners[name].keeps_fused for name in quantized) and _differ(names, schemes, owners):
            split.append(names)
    if not split:
        return
    parent = split[0][0].rpartition(".")[0]
    of = [f"{n.rpartition('.')[2]} ({_state(n, schemes, owners)})" for n in split[0]]
    also = f" (and in {len(split) - 1} more)" if len(split) > 1 else ""
    raise BitpressError(
        f"{parent or type(model).__name__}: servers such as vLLM make one layer of {', '.join(of[:-1])} and {of[-1]}, "
        f"which can have one scheme only{also}. Give them the same by targets and ignore; or state fused=False in the "
        "modifier, for a checkpoint that is not for such a server."
    )


def _differ(names: Sequence[str], schemes: Mapping[str, QuantizationScheme], owners: Mapping[str, Modifier]) -> bool:
    """True if some of the layers are left alone, or have other schemes than the rest."""
    if any(name not in schemes for name in names):
        return True
    if owners[names[0]].chooses and all(owners[name] is owners[names[0]] for name in names):
        return False  # it will choose one for all of them
    stated = [schemes[name].model_copy(update={"targets": []}) for name in names]
    return any(scheme != stated[0] for scheme in stated)


def _state(name: str, schemes: Mapping[str, QuantizationScheme], owners: Mapping[str, Modifier]) -> str:
    if name not in schemes:
        return "left alone"
    if owners[name].chooses:
        return "to be chosen"
    scheme = schemes[name]
    inputs = scheme.input_activations
    return _describe(scheme.weights) + (f", inputs of {_describe(inputs)}" if inputs is not None else "")


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
