"""For the report: the error of each layer from step to step, and the outliers among the channels of its input.

The error is that of the layer's output, relative to the output's energy: smoothing leaves that energy as it is, so that
errors before and after it compare. All steps are estimated from the same rows of the weight, of which there are so few
that a solver's own work does not notice; the layer's ``relative_error`` is of more rows.
"""

from compressed_tensors.quantization import QuantizationStrategy
from torch import Tensor

from bitpress.models.blocks import Block
from bitpress.models.linears import weight_matrix
from bitpress.modifiers.sharing import is_known, sampled_values
from bitpress.modifiers.state import State
from bitpress.quantization import QuantizationArgs, QuantizedWeight, has_global_scale, shared_global_scale
from bitpress.quantization.grid import block_shape
from bitpress.solvers import minmax_parameters, output_error, round_to_nearest
from bitpress.statistics import InputStatistics

# The first step: to round the weight as it is, on grids from the least to the greatest value of each group.
NEAREST = "nearest"
# One row in so many, within these bounds.
ONE_IN, LEAST_ROWS, MOST_ROWS = 32, 32, 128


def note_inputs(state: State, block: Block) -> None:
    """Note the channels of each layer's input: ``{"largest": root mean square, "median": ..., "channel": number}``."""
    known: dict[int, dict[str, float]] = {}
    for name in block.layers:
        statistics = state.statistics.get(name)
        if statistics is None or not is_known(statistics):
            continue
        if id(statistics) not in known:
            known[id(statistics)] = _channels(statistics)
        state.layer_records.setdefault(name, {})["input"] = known[id(statistics)]


def _channels(statistics: InputStatistics) -> dict[str, float]:
    sizes = (statistics.gram.diagonal() / statistics.rows).sqrt()
    largest, channel = sizes.max(0)
    return {"largest": float(largest), "median": float(sizes.median()), "channel": int(channel)}


def note_rounding(state: State, block: Block, step: str) -> None:
    """Note what rounding to nearest would cost now, of the block's layers that are not quantized yet."""
    for name, layer in block.layers.items():
        statistics = state.statistics.get(name)
        if name in state.quantized or name not in state.schemes or statistics is None or not is_known(statistics):
            continue
        matrix, args = weight_matrix(layer), state.schemes[name].weights
        every = _every(matrix)
        rows = matrix[::every].float()
        if step == NEAREST:
            state.output_energies[name] = output_error(rows, statistics.gram)
        values = _rounded(matrix, args, every, state.ranges.get(name), state.global_scales.get(name))
        _note(state, name, step, values.float() - rows, statistics)


def note_solved(state: State, name: str, step: str, weight: Tensor, quantized: QuantizedWeight) -> None:
    """Note the error that a quantized layer has, before ``weight`` (out, in) takes its values."""
    statistics = state.statistics.get(name)
    if statistics is None or not is_known(statistics) or name not in state.output_energies:
        return
    every = _every(weight)
    delta = sampled_values(quantized, every).float() - weight[::every].float()
    _note(state, name, step, delta, statistics)


def _note(state: State, name: str, step: str, delta: Tensor, statistics: InputStatistics) -> None:
    error = output_error(delta, statistics.gram) / max(state.output_energies[name], 1e-30)
    state.layer_records.setdefault(name, {}).setdefault("steps", {})[step] = error


def _every(weight: Tensor) -> int:
    count = min(max(len(weight) // ONE_IN, LEAST_ROWS), MOST_ROWS)
    return max(1, len(weight) // count)


def _rounded(
    weight: Tensor,
    args: QuantizationArgs,
    every: int,
    ranges: tuple[Tensor, Tensor] | None,
    global_scale: Tensor | None,
) -> Tensor:
    """The sampled rows, rounded on ``ranges`` or from their least to their greatest value."""
    if global_scale is None and has_global_scale(args):
        global_scale = shared_global_scale([weight], args)
    if block_shape(args) is not None:
        return round_to_nearest(weight, args, weight.dtype, ranges, global_scale).dequantize()[::every]
    if args.strategy == QuantizationStrategy.TENSOR:
        ranges = minmax_parameters(weight.float(), args, weight.dtype, global_scale) if ranges is None else ranges
    elif ranges is not None:
        ranges = ranges[0][::every], ranges[1][::every]
    rows = weight[::every]
    return round_to_nearest(rows, args, weight.dtype, ranges, global_scale).dequantize()
