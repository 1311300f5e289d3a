"""Moving a positive scale from the input of some layers to the output of the layer before them."""

import inspect
import math
from collections.abc import Iterator

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
    fixed = {"bias": torch.zeros_like(weight)} if isinstance(getattr(module, "bias", None), Tensor) else {}
    problem: Exception | None = None
    for args, kwargs in _inputs_to_try(module, weight):
        try:
            at = [
                functional_call(module, {"weight": torch.full_like(weight, v), **fixed}, args, kwargs).double()
                for v in (0, 1, 3)
            ]
            break
        except Exception as error:  # whatever a user's module does with what it is tried with
            problem = problem or error
    else:
        raise BitpressError(f"{type(module).__name__} cannot absorb a scale: {problem}") from problem
    slope = at[1] - at[0]
    offset = float((at[0] * slope).sum() / (slope * slope).sum())
    if math.isfinite(offset) and math.isclose(offset, round(offset), abs_tol=0.02):
        offset = round(offset)
    expected = (offset + 3) * slope
    if not torch.allclose(at[2], expected, rtol=0.05, atol=0.05):
        raise BitpressError(f"{type(module).__name__} cannot absorb a scale: its output is not linear in its weight.")
    return offset


def _inputs_to_try(module: nn.Module, weight: Tensor) -> Iterator[tuple[tuple[Tensor], dict[str, Tensor]]]:
    """Rows of features, then images of channels; a norm with a gate is given one of ones."""
    generator = torch.Generator().manual_seed(0)
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for shape in ((4, weight.numel()), (4, weight.numel(), 2, 2)):
        x = torch.randn(shape, generator=generator).to(weight)
        for given in ([p.name for p in named if p.default is p.empty], [p.name for p in named]):
            yield (x,), {name: torch.ones_like(x) for name in given}
