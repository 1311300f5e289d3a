"""Refinement of what is rounded already: integers and scales take turns, and other inputs judge what came of it.

Both lower ``(w - v) H (w - v)^T`` for each row w of a weight and its values ``v = (q - z) s``, and either can be had
with the other fixed, as COMQ does (Zhang et al., 2024, https://arxiv.org/abs/2403.07134). H is the dampened matrix that
the solver used: the lower the error on the very inputs that are fitted, the more of what is gained is noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitpress.quantization.weights import QuantizedWeight
from bitpress.solvers.descent import descend_together
from bitpress.solvers.gptq import dampened
from bitpress.solvers.objective import output_error
from bitpress.solvers.refit import refit_scales


@dataclass(frozen=True)
class Refined:
    """What :func:`refine_together` found for a layer.

    Attributes:
        weight: the quantized weight with the least error on the held-out inputs.
        rounds: after which round it was had; 0 is what was to be refined.
        errors: the held-out error after every round, ``trace(dW H dW^T)``.
    """

    weight: QuantizedWeight
    rounds: int
    errors: list[float]


@torch.no_grad()
def refine_together(
    weights: Sequence[Tensor],
    quantized: Sequence[QuantizedWeight],
    gram: Tensor,
    held_out: Tensor,
    sweeps: int,
    dampening: float,
    block_size: int = 128,
) -> list[Refined]:
    """Scales refitted, then ``sweeps`` rounds of a sweep over the columns and another refit; the best is kept.

    The best is that of the least error on inputs that were not fitted, layer by layer.

    Args:
        weights: (out, in) of layers that share their input.
        quantized: the same, quantized, with one scheme and one dtype.
        gram: (in, in), float32: of the inputs that are fitted.
        held_out: (in, in), float32: of other inputs.
        sweeps: how many; 0 refits the scales only.
        dampening: as a share of the mean of ``gram``'s diagonal.
        block_size: see :func:`coordinate_descent`.
    """
    H = dampened(gram, dampening)
    rounds = [list(quantized)]
    for sweep in range(sweeps + 1):
        last = rounds[-1]
        if sweep:
            last = descend_together(weights, last, H, 1, block_size)
        rounds.append([refit_scales(w, q, H) for w, q in zip(weights, last, strict=True)])
    found = []
    for weight, tried in zip(weights, zip(*rounds, strict=True), strict=True):
        errors = [output_error(q.dequantize().float() - weight.float(), held_out) for q in tried]
        best = errors.index(min(errors))
        found.append(Refined(tried[best], best, errors))
    return found
