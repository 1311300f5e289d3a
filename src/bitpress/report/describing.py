"""Schemes, sizes and names, in the few words that fit into a table."""

import re
from collections.abc import Iterable

from bitpress.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, QuantizationType

THOUSAND = 1000
_UNITS = ("B", "kB", "MB", "GB", "TB")


def describe(scheme: QuantizationScheme | None) -> str:
    """``int4 group 128 asymmetric``; with activations ``int8 channel, inputs int8 token dynamic``."""
    if scheme is None:
        return "dense"
    parts = [_grid(scheme.weights)] if scheme.weights is not None else []
    for what, args in (("inputs", scheme.input_activations), ("outputs", scheme.output_activations)):
        if args is not None:
            parts.append(f"{what} {_grid(args)} {'dynamic' if args.dynamic else 'static'}")
    return ", ".join(parts)


def _grid(args: QuantizationArgs) -> str:
    strategy = str(QuantizationStrategy(args.strategy).value)
    size = {
        QuantizationStrategy.GROUP.value: f" {args.group_size}",
        QuantizationStrategy.TENSOR_GROUP.value: f" {args.group_size}",
        QuantizationStrategy.BLOCK.value: " " + "×".join(map(str, args.block_structure or ())),
    }.get(strategy, "")
    integers = QuantizationType(args.type) == QuantizationType.INT
    symmetry = "" if args.symmetric or not integers else " asymmetric"
    return f"{'int' if integers else 'float'}{args.num_bits} {strategy.replace('_', ' ')}{size}{symmetry}"


def size(nbytes: float) -> str:
    """Bytes with a unit of the powers of 1000, three digits."""
    power = 0
    while float(f"{nbytes:.3g}") >= THOUSAND and power < len(_UNITS) - 1:
        nbytes, power = nbytes / THOUSAND, power + 1
    return f"{float(f'{nbytes:.3g}'):g} {_UNITS[power]}"


def pattern(name: str) -> str:
    """A layer's name with ``*`` for its numbers: what the layers of one place in all blocks have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def in_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, with their numbers as numbers: layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if one of the patterns, names with ``*`` for anything, is the name."""
    return any(re.fullmatch(re.escape(each).replace(r"\*", ".*"), name) for each in patterns)
