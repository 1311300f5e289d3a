"""How the layers of a block are shared out among ranks: what they cost, which rows stay together, what is exchanged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from torch import Tensor, nn

from bitpress.models.linears import weight_matrix
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizationArgs, QuantizedWeight
from bitpress.quantization.grid import block_shape
from bitpress.ranks import Found, Piece, Work, share_out
from bitpress.solvers import output_error, search_parameters
from bitpress.statistics import InputStatistics, Statistic

# The report's errors are estimates from every so many rows of a weight: exact ones would cost a quarter of the search.
SAMPLED_ROWS = 4
# Rows are dealt out by so many at least: of fewer, calling the kernels would cost the most.
UNIT = 32
# What a value costs where it is worked on by itself, and in a matrix product, in nanoseconds on one core.
BY_ITSELF = 2.0
IN_PRODUCT = 1 / 50
# What calling kernels for a column costs.
PER_COLUMN = 40_000


@dataclass(frozen=True)
class Problem:
    """A layer that is to be quantized, or some rows of it.

    Attributes:
        name: of the layer.
        weight: (out, in): a view of the layer's own; not to be written to.
        args: the scheme.
        statistics: of its inputs, if it ran and a modifier asked for any.
        ranges: scale and zero point that its observer or an earlier modifier chose, if one did.
        global_scale: (1,), float32: what scales are relative to, where the scheme has one.
        figures: what the report is to say of it; a solver may add to them what JSON can hold.
    """

    name: str
    weight: Tensor
    args: QuantizationArgs
    statistics: InputStatistics | None
    ranges: tuple[Tensor, Tensor] | None
    global_scale: Tensor | None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What solving rows of a weight takes, in nanoseconds on one core: only how costs compare matters.

    Attributes:
        fixed: whatever the rows: a factorization.
        per_row: of a row.
    """

    fixed: float
    per_row: float


def rounding_cost(columns: int, statistics: InputStatistics | None) -> Cost:
    """Of rounding to nearest, and of measuring the error."""
    measuring = 2 * columns * columns / SAMPLED_ROWS if is_known(statistics) else 0
    return Cost(0.0, 10 * BY_ITSELF * columns + IN_PRODUCT * measuring)


def factored_cost(columns: int, statistics: InputStatistics | None) -> Cost:
    """Of GPTQ, where the inputs are known: see :func:`bitpress.solvers.gptq`."""
    rounding = rounding_cost(columns, statistics)
    if not is_known(statistics):
        return rounding
    factor = IN_PRODUCT * columns**3 + PER_COLUMN * columns
    return Cost(factor, rounding.per_row + IN_PRODUCT * columns * columns / 2)


def height(args: QuantizationArgs, *, apart: bool) -> int:
    """Rows that stay together, as :class:`bitpress.ranks.Work` has it; ``apart`` if the solver needs no others."""
    if not apart or args.strategy == QuantizationStrategy.TENSOR:
        return 0
    block = block_shape(args)
    return math.lcm(UNIT, block[0]) if block else UNIT


def rows_of(ranges: tuple[Tensor, Tensor] | None, piece: Piece, args: QuantizationArgs) -> tuple[Tensor, Tensor] | None:
    """The scale and zero point of some rows."""
    if ranges is None or args.strategy == QuantizationStrategy.TENSOR:
        return ranges
    block = block_shape(args)
    size = block[0] if block else 1
    start, stop = piece.start // size, -(-piece.stop // size)
    return ranges[0][start:stop], ranges[1][start:stop]


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows that ranks have solved, in their order, of any dtype."""
    if len(parts) == 1:
        return parts[0]
    # Not every dtype can be joined, but bytes can.
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(parts[0].dtype)


def found(problem: Problem, quantized: QuantizedWeight) -> Found:
    """What other ranks need of a solved problem."""
    tensors = [quantized.values, quantized.scale, quantized.zero_point]
    if quantized.global_scale is not None:
        tensors.append(quantized.global_scale)
    return Found(tensors, {"energies": _energies(problem, quantized), "figures": problem.figures})


def joined_weight(parts: Sequence[Found], args: QuantizationArgs) -> QuantizedWeight:
    """A layer's weight from its pieces, in their order."""
    values, scale, zero_point = (joined_rows([part.tensors[i] for part in parts]) for i in range(3))
    global_scale = parts[0].tensors[3] if len(parts[0].tensors) > 3 else None
    return QuantizedWeight(values, scale, zero_point, args, global_scale)


def joined_figures(parts: Sequence[Found]) -> dict[str, Any]:
    """What the report says of a layer. The relative error is that of its output where the inputs are known."""
    sums = [sum(each) for each in zip(*(part.note["energies"] for part in parts), strict=True)]
    names = ("weight_error", "relative_error")
    errors = {
        name: error / max(signal, 1e-30) for name, error, signal in zip(names, sums[::2], sums[1::2], strict=False)
    }
    return {**errors, **parts[0].note["figures"]}


def is_known(statistics: InputStatistics | None) -> bool:
    """True if the Gram matrix of a layer's input is known."""
    return statistics is not None and bool(statistics.rows) and Statistic.GRAM in statistics.wanted


def _energies(problem: Problem, quantized: QuantizedWeight) -> list[float]:
    """The squared error of sampled rows, and their square; the same of their outputs, if these are known."""
    sampled = problem.weight[::SAMPLED_ROWS].float()
    delta = sampled_values(quantized, SAMPLED_ROWS).float() - sampled
    energies = [float(delta.square().sum()), float(sampled.square().sum())]
    if problem.statistics is None or not is_known(problem.statistics):
        return energies
    gram = problem.statistics.gram
    return [*energies, output_error(delta, gram), output_error(sampled, gram)]


def sampled_values(quantized: QuantizedWeight, every: int) -> Tensor:
    """The values of every so many rows."""
    if quantized.args.strategy in (QuantizationStrategy.TENSOR, QuantizationStrategy.BLOCK):
        return quantized.dequantize()[::every]
    rows = slice(None, None, every)
    scale, zero_point = quantized.scale[rows], quantized.zero_point[rows]
    return replace(quantized, values=quantized.values[rows], scale=scale, zero_point=zero_point).dequantize()


def search_ranges(state: State, layers: Mapping[str, nn.Module]) -> None:
    """Search the ranges of layers whose inputs are known, into ``state.ranges``: the ranks share out the rows."""
    names, matrices = list(layers), [weight_matrix(layer) for layer in layers.values()]

    def search(piece: Piece) -> Found:
        name, rows = names[piece.matrix], matrices[piece.matrix][piece.start : piece.stop]
        gram, whole = state.statistics[name].gram, state.global_scales.get(name)
        return Found([*search_parameters(rows, state.schemes[name].weights, gram, rows.dtype, whole)])

    works = [
        Work((i,), (len(m),), height(state.schemes[n].weights, apart=True), per_row=m.shape[1])
        for i, (n, m) in enumerate(zip(names, matrices, strict=True))
    ]
    for index, parts in share_out(state.ranks, works, lambda pieces: [search(p) for p in pieces]).items():
        scale, zero_point = (joined_rows([part.tensors[i] for part in parts]) for i in range(2))
        state.ranges[names[index]] = scale, zero_point
