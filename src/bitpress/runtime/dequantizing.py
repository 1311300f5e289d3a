"""The dense weight of packed ones, as one operator, which torch.compile calls and does not look into."""

import functools

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from bitpress.quantization import PackedWeight


@functools.cache
def _args_of(stated: str) -> QuantizationArgs:
    return QuantizationArgs.model_validate_json(stated)


@torch.library.custom_op("bitpress::dequantize", mutates_args=())
def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    rows: int,
    columns: int,
    args: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight, (rows, columns), that the checkpoint's dense form has.

    Args:
        packed: see :class:`bitpress.quantization.PackedWeight`.
        scale: see there.
        zero_point: see there; None for 0.
        global_scale: see there.
        rows: of the weight.
        columns: of the weight.
        args: the scheme of the weight, as JSON.
        dtype: to which its values are rounded at last.
    """
    zeros = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    weight = PackedWeight(packed, (rows, columns), scale, zeros, _args_of(args), global_scale)
    return weight.unpack().dequantize().to(dtype)


@dequantize.register_fake
def _(
    packed: Tensor,
    scale: Tensor,  # noqa: ARG001
    zero_point: Tensor | None,  # noqa: ARG001
    global_scale: Tensor | None,  # noqa: ARG001
    rows: int,
    columns: int,
    args: str,  # noqa: ARG001
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)
