"""Agreement: how far a model's predictions are from the original's."""

from dataclasses import dataclass

import torch

from bitpress.evaluation.perplexity import exp, mean_and_error
from bitpress.evaluation.tokens import TokenScores, WorstToken


@dataclass(frozen=True)
class Agreement:
    """Of a model's predictions with the original's, over the tokens that are scored.

    Attributes:
        divergence: the mean of ``KL(original || model)`` over tokens, in nats.
        standard_error: of that mean, as if tokens were independent of each other.
        median: of the tokens' divergences.
        percentile_99: 99 of 100 tokens are below.
        maximum: of the tokens' divergences.
        top1: the share of tokens before which both hold the same token most likely.
        original_perplexity: the original's, of the same tokens.
        perplexity_ratio: the model's perplexity divided by that.
        ratio_standard_error: of the ratio; from differences token by token, so that it is far smaller than those of the
            two perplexities.
        worst: the tokens of the largest divergence.
    """

    divergence: float
    standard_error: float
    median: float
    percentile_99: float
    maximum: float
    top1: float
    original_perplexity: float
    perplexity_ratio: float
    ratio_standard_error: float
    worst: tuple[WorstToken, ...] = ()


def agreement(scores: TokenScores, worst: tuple[WorstToken, ...] = ()) -> Agreement | None:
    """The agreement of scored tokens; None if there was no original."""
    if scores.divergence is None or scores.original_nll is None or scores.original_top is None:
        return None
    mean, error = mean_and_error(scores.divergence)
    quantiles = scores.divergence.double().sort().values
    lost, lost_error = mean_and_error(scores.nll.double() - scores.original_nll.double())
    ratio = exp(lost)
    return Agreement(
        mean,
        error,
        float(quantiles[(len(quantiles) - 1) // 2]),
        float(quantiles[round(0.99 * (len(quantiles) - 1))]),
        float(quantiles[-1]),
        float(torch.eq(scores.top, scores.original_top).double().mean()),
        exp(mean_and_error(scores.original_nll)[0]),
        ratio,
        ratio * lost_error,
        worst,
    )
