"""Error-aware propagation: a layer's weight makes up for what earlier layers have done to its input."""

import torch
from torch import Tensor

from bitpress.solvers.gptq import inverse_factor


@torch.no_grad()
def corrected_weight(
    weight: Tensor, gram: Tensor, drift: Tensor, *, dampening: float = 0.1, strength: float = 1.0
) -> Tensor:
    """The weight that gives, on the compressed model's inputs X, most nearly what W gives on the original's X'.

    ``W* = argmin ||X' W^T - X W*^T||^2 + d ||W* - W||^2 = W + W D (H + dI)^-1`` with ``H = X^T X`` and
    ``D = (X' - X)^T X``. That is least squares as d goes to 0, and W as it grows; W itself where nothing has drifted.
    The cross term is that of GPTAQ (Li et al., 2025, https://arxiv.org/abs/2504.02692) and Qronos (Zhang et al., 2025,
    https://arxiv.org/abs/2505.11695); here it moves the target before anything is rounded.

    Args:
        weight: (out, in), any float dtype.
        gram: (in, in), float32, H.
        drift: (in, in), float32, D: rows of X' - X, columns of X.
        dampening: d as a share of the mean of H's diagonal. It grows until ``H + dI`` can be factored.
        strength: share of the way from W to W*.

    Returns:
        (out, in), float32.
    """
    W = weight.float()
    factor, _ = inverse_factor(gram, dampening)
    return W + strength * (W @ drift @ factor.T @ factor)
