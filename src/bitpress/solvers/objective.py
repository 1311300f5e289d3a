"""The error that every solver lowers."""

from torch import Tensor

from bitpress.quantization.weights import QuantizedWeight

# What counts as a smaller error: rounding of a float32 sum does not.
LESS = 1 - 1e-5


def output_error(delta: Tensor, gram: Tensor) -> float:
    """Squared error at a layer's output that a change of its weight makes: ``trace(delta H delta^T)``.

    Own: the definition, with the sum over the rows of X taken first.

    Args:
        delta: (out, in), the changed weight minus the weight.
        gram: (in, in), ``H = X^T X``.

    Returns:
        ``||X delta^T||^2``, summed over rows of X and outputs; exact up to float rounding.
    """
    delta = delta.to(gram.dtype)
    return float(((delta @ gram) * delta).sum())


def row_errors(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> Tensor:
    """``(w - v) H (w - v)^T`` of each row, v as every reader computes it: (out,), float32."""
    delta = quantized.dequantize().float() - weight.float()
    return (delta @ gram).mul_(delta).sum(1)
