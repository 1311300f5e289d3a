"""Moving a positive scale from the input of some layers to the output of the layer before them."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitpress.errors import BitpressError
from bitpress.models.linears import is_linear, weight_matrix


def out_channels(module: nn.Module) -> int | None:
    """How many output channels can be scaled: of a linear layer, a convolution or a norm; None if it is neither."""
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if is_linear(module):
        return weight_matrix(module).shape[0]
    if is_convolution(module):
        return weight.shape[0]
    return weight.numel() if weight.dim() == 1 else None


def is_convolution(module: nn.Module) -> bool:
    """True for convolutions whose weight is (out, in / groups, ...)."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def divide_outputs(module: nn.Module, scales: Tensor) -> None:
    """Divide the output channels of a linear layer, a convolution or a norm by ``scales`` (channels,), in place.

    Raises:
        BitpressError: the module is none of these, or its output is not linear in its weight.
    """
    if is_linear(module):
        matrix = weight_matrix(module)
        matrix.copy_(matrix / scales.to(matrix.dtype).unsqueeze(1))
    elif is_convolution(module):
        kernels: Tensor = module.weight.data  # type: ignore[assignment]
        kernels.div_(scales.to(kernels.dtype).view(-1, *[1] * (kernels.dim() - 1)))
    else:
        weight: Tensor = module.weight.data  # type: ignore[assignment]
        offset = norm_offset(module)
        s = scales.to(weight.dtype)
        weight.copy_(weight / s if not offset else ((weight.double() + offset) / scales.double() - offset))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.data.div_(scales.to(bias.dtype))


def multiply_inputs(module: nn.Module, scales: Tensor) -> None:
    """Multiply the input channels of a linear layer by ``scales`` (in,), in place."""
    matrix = weight_matrix(module)
    matrix.mul_(scales.to(matrix.dtype))


def norm_offset(module: nn.Module) -> float:
    """The ``a`` of a norm that computes ``(a + weight) * normalized(x) + bias``: 0 for most, 1 for Gemma's.

    It is measured, with a weight of zeros and one of ones, so that no class has to be known.

    Raises:
        BitpressError: the output is not of that form.
    """
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.numel(), generator=generator).to(weight)
    fixed = {"bias": torch.zeros_like(weight)} if isinstance(getattr(module, "bias", None), Tensor) else {}
    try:
        at = [
            functional_call(module, {"weight": torch.full_like(weight, v), **fixed}, (x,)).double() for v in (0, 1, 3)
        ]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BitpressError(f"{type(module).__name__} cannot absorb a scale: {error}") from error
    slope = at[1] - at[0]
    offset = float((at[0] * slope).sum() / (slope * slope).sum())
    if math.isfinite(offset) and math.isclose(offset, round(offset), abs_tol=0.02):
        offset = round(offset)
    expected = (offset + 3) * slope
    if not torch.allclose(at[2], expected, rtol=0.05, atol=0.05):
        raise BitpressError(f"{type(module).__name__} cannot absorb a scale: its output is not linear in its weight.")
    return offset
