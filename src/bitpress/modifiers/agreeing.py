"""One scheme for each layer, where several modifiers of a recipe state one."""

from torch import nn

from bitpress.errors import BitpressError
from bitpress.models.experts import named_layers
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.observers import states_observer
from bitpress.quantization import QuantizationArgs, QuantizationScheme, QuantizationType


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
