"""The error that every solver lowers."""

from torch import Tensor


def output_error(delta: Tensor, gram: Tensor) -> float:
    """Squared error at a layer's output that a change of its weight makes: ``trace(delta H delta^T)``.

    Args:
        delta: (out, in), the changed weight minus the weight.
        gram: (in, in), ``H = X^T X``.

    Returns:
        ``||X delta^T||^2``, summed over rows of X and outputs; exact up to float rounding.
    """
    delta = delta.to(gram.dtype)
    return float(((delta @ gram) * delta).sum())
