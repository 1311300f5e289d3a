"""Ranges of a weight's groups, and round-to-nearest (RTN) on them."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.quantization.grid import affine_parameters, group_view
from bitpress.quantization.weights import QuantizedWeight


def minmax_parameters(weight: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (``dtype``) and zero point (int8) of the grids that span each group of ``weight`` (..., out, in), float32.

    Shapes, behind the leading dimensions: (1,) per tensor, (out, 1) per channel, (out, groups) per group.
    """
    if args.strategy == QuantizationStrategy.TENSOR:
        minimum, maximum = weight.flatten(-2).aminmax(dim=-1, keepdim=True)
    else:
        minimum, maximum = group_view(weight, args).aminmax(dim=-1)
    return affine_parameters(minimum, maximum, args, dtype)


def round_to_nearest(weight: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> QuantizedWeight:
    """Each value to the nearest point of its group's grid; the grid spans the group's least and greatest value.

    Args:
        weight: (out, in), any float dtype; rounded in float32.
        args: the scheme.
        dtype: what scales are stored in.
    """
    weight = weight.float()
    scale, zero_point = minmax_parameters(weight, args, dtype)
    return QuantizedWeight.on_grid(weight, scale, zero_point, args)


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse a weight with NaN or infinite values.

    Raises:
        BitpressError: names the tensor and how many values are not finite.
    """
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise BitpressError(
            f"{name}.weight holds {bad} NaN or infinite values, so it has no grid. Mend the checkpoint, or add "
            f'"{name}" to ignore.'
        )
