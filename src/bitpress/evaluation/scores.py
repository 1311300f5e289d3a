"""From logits to figures of single tokens, a bounded number of tokens at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Float32 values of one working copy of logits: 64 MiB.
WORKING_VALUES = 1 << 24


def negative_log_likelihood(logits: Tensor, targets: Tensor, *, working_values: int = WORKING_VALUES) -> Tensor:
    """``-log p(target)`` of each token.

    Args:
        logits: (tokens, vocabulary), any float.
        targets: (tokens,), int64: the token that each row predicts.
        working_values: of float32 that a working copy may hold.

    Returns:
        (tokens,), float32, in nats.
    """
    parts = [
        F.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
        for rows in _chunks(logits, working_values)
    ]
    return torch.cat(parts)


def divergence(original: Tensor, logits: Tensor, *, working_values: int = WORKING_VALUES) -> Tensor:
    """``KL(original || model) = sum_v p(v) (log p(v) - log q(v))`` of each row, p being the original's distribution.

    Computed as the sum of ``p log(p/q) - p + q``, whose terms are all at least 0. In the plain sum terms cancel, and
    what rounding leaves of that is more than a divergence of 1e-6.

    Args:
        original: (rows, vocabulary) logits, any float.
        logits: the model's, of the same shape.
        working_values: of float32 that a working copy may hold.

    Returns:
        (rows,), float32, in nats; exactly 0 where the logits are equal.
    """
    parts = [_divergence(original[rows], logits[rows]) for rows in _chunks(logits, working_values)]
    return torch.cat(parts)


def _divergence(original: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = original.float().log_softmax(-1), logits.float().log_softmax(-1)
    p, d = log_p.exp(), log_p - log_q
    # d + exp(-d) - 1 without its cancellation where p and q are near, and without overflow where they are far.
    near = p * (d + torch.expm1(-d.clamp(-1, 1)))
    q = log_q.exp()
    terms = torch.where(d.abs() < 1, near, p * d - p + q)
    # Models that forbid a token give it a logit of minus infinity.
    return torch.where(p > 0, terms, q).sum(-1)


def _chunks(logits: Tensor, working_values: int) -> Iterator[slice]:
    rows, width = logits.shape
    step = max(1, working_values // max(1, width))
    return (slice(start, start + step) for start in range(0, max(rows, 1), step))
