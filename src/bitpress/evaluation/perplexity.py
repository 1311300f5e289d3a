"""Perplexity: how surprised a model is by a text."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitpress.evaluation.text import Text
from bitpress.evaluation.tokens import TokenScores


@dataclass(frozen=True)
class Perplexity:
    """Of the tokens of a text that are scored.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: the mean of ``-log p(token | tokens before it in its window)``, in nats.
        standard_error: of ``nll``, as if tokens were independent of each other.
        bits_per_byte: ``nll`` per byte of UTF-8 that the tokens spell, in bits: comparable between tokenizers. None
            without a tokenizer.
        tokens: that are scored.
        windows: that were read.
        max_seq_length: tokens of a window at most.
        stride: tokens from the start of one window to the next one's.
        bos: whether each window begins with the beginning-of-sequence token.
    """

    perplexity: float
    nll: float
    standard_error: float
    bits_per_byte: float | None
    tokens: int
    windows: int
    max_seq_length: int
    stride: int
    bos: bool


def perplexity(scores: TokenScores, text: Text, tokenizer: Any) -> Perplexity:
    """The perplexity of scored tokens."""
    nll, error = mean_and_error(scores.nll)
    nats_per_bit = math.log(2)
    spelled = _bytes(scores, text, tokenizer)
    return Perplexity(
        exp(nll),
        nll,
        error,
        nll * len(scores) / nats_per_bit / spelled if spelled else None,
        len(scores),
        len(text.windows),
        text.length,
        text.stride,
        text.bos,
    )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of (tokens,) values and its standard error, summed in float64; the error of a single value is 0."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), error


def exp(nll: float) -> float:
    """``exp``, with infinity where floats end."""
    return math.exp(nll) if nll < math.log(math.ldexp(1.0, 1023)) else math.inf


def _bytes(scores: TokenScores, text: Text, tokenizer: Any) -> int:
    """How many bytes the scored tokens spell: of each sequence, from the first to the last, less what is not scored.

    What lies between is spelled as a whole, because a character may be of two tokens; where windows leave their first
    tokens unscored, the scored ones are taken to be as long as the others.
    """
    if tokenizer is None:
        return 0
    total = 0.0
    for index in scores.sequence.unique().tolist():
        position = scores.position[scores.sequence == index]
        first, last = int(position.min()), int(position.max()) + 1
        spelled = tokenizer.decode(
            text.sequences[index][first:last].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        total += len(spelled.encode()) * len(position) / (last - first)
    return round(total)
