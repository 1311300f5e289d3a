"""From texts and token ids to the sequences that calibrate."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.pipelines.data.sources import SEQUENCE_KEYS, Sample, Texts, TokenIds, read_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Tokenizers that know no maximum say 10**30.
SANE_LENGTH = 1_000_000
DEFAULT_LENGTH = 2048
# Texts per call of the tokenizer: enough for its threads, few enough for an endless stream.
CHUNK = 64


def gather(
    source: Texts | TokenIds,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    max_seq_length: int | None,
    seed: int | None,
    concatenate: bool,
) -> list[Sample]:
    """Read up to `count` sequences, in the order in which they calibrate.

    Args:
        source: Where they come from.
        tokenizer: Needed for texts.
        count: How many.
        max_seq_length: In tokens; None leaves it to the tokenizer.
        seed: Draws at random; None takes the first ones.
        concatenate: Join the sequences and cut them into full pieces.

    Raises:
        BitpressError: Nothing is left to calibrate with, an item cannot be read, or all are too short.
    """
    limit = _length_limit(source, tokenizer, max_seq_length)
    if concatenate:
        size = max_seq_length or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH)
        return _pieces(source, tokenizer, size, count, seed)

    samples = _take(_sequences(source, _ordered(source.items, seed), tokenizer, limit), count, source.where)
    longest = max(len(sample["input_ids"]) for sample in samples)
    if max_seq_length is not None and longest < max_seq_length:
        raise BitpressError(
            f"max_seq_length={max_seq_length}, but the longest of the {len(samples)} samples taken from "
            f"{source.where} has {longest} tokens; pass concatenate_data=True to join them, "
            f"or max_seq_length={longest} or less"
        )
    return samples


def whole_sequences(source: Texts | TokenIds, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Tensor]:
    """Every sequence that is not empty, uncut, in the dataset's order: int64 of shape (length,), without padding.

    Raises:
        BitpressError: An item cannot be read.
    """
    for sample in _sequences(source, enumerate(source.items), tokenizer, None):
        ids = sample["input_ids"][sample["attention_mask"].bool()]
        if len(ids):
            yield ids


def permutation(length: int, seed: int | None) -> list[int]:
    """Return the indices below `length`, shuffled by `seed`; in order without one."""
    if seed is None:
        return list(range(length))
    indices: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return indices


def _length_limit(
    source: Texts | TokenIds, tokenizer: PreTrainedTokenizerBase | None, max_seq_length: int | None
) -> int | None:
    if max_seq_length is not None:
        return max_seq_length
    known = getattr(tokenizer, "model_max_length", None)
    if known is not None and known < SANE_LENGTH:
        return int(known)
    return DEFAULT_LENGTH if isinstance(source, Texts) else None


def _ordered(items: Any, seed: int | None) -> Iterator[tuple[int, Any]]:
    """Pair each item with its place in the dataset, for messages."""
    if seed is not None and _is_random_access(items):
        return ((index, items[index]) for index in permutation(len(items), seed))
    if seed is not None and hasattr(items, "shuffle"):  # a streamed dataset
        items = items.shuffle(seed=seed)
    return enumerate(items)


def _is_random_access(items: Any) -> bool:
    return hasattr(items, "__len__") and hasattr(items, "__getitem__")


def _sequences(
    source: Texts | TokenIds,
    items: Iterator[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None,
) -> Iterator[Sample]:
    """Yield one sequence per item, of length 0 where it is empty."""
    if isinstance(source, Texts):
        yield from _tokenized(source, items, tokenizer, limit)
        return
    for index, item in items:
        yield _truncated(_read(source, index, item), limit)


def _truncated(sample: Sample, limit: int | None) -> Sample:
    if limit is None or len(sample["input_ids"]) <= limit:
        return sample
    # Padding on the left must not crowd out the tokens.
    start = int(sample["attention_mask"].argmax())
    return {key: values[start : start + limit] for key, values in sample.items()}


def _tokenized(source: Texts, items: Iterator[tuple[int, Any]], tokenizer: Any, limit: int | None) -> Iterator[Sample]:
    while chunk := list(islice(items, CHUNK)):
        texts = [_read(source, index, item) for index, item in chunk]
        encoded = tokenizer(
            [text for text in texts if text] or [" "],  # tokenizers refuse an empty list
            add_special_tokens=not source.templated,
            truncation=limit is not None,
            max_length=limit,
            verbose=False,  # texts longer than the model are about to be cut
        )
        columns = {key: encoded[key] for key in SEQUENCE_KEYS if key in encoded}
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        for text in texts:
            yield read_sample(next(rows) if text else {"input_ids": []})


def _read(source: Any, index: int, item: Any) -> Any:
    try:
        return source.read(item)
    except BitpressError as error:
        raise BitpressError(f"{source.where}, sample {index}: {error}") from error


def _take(sequences: Iterable[Sample], count: int, where: str) -> list[Sample]:
    """Take up to `count` sequences that are not empty."""
    samples: list[Sample] = []
    empty = 0
    for sample in sequences:
        if not len(sample["input_ids"]):
            empty += 1
            continue
        samples.append(sample)
        if len(samples) == count:
            break
    _report_empty(empty, len(samples), where)
    return samples


def _report_empty(empty: int, left: int, where: str) -> None:
    if left == 0:
        raise BitpressError(
            f"{where} has nothing to calibrate with: " + (f"{empty} empty samples" if empty else "it is empty")
        )
    if empty:
        logger.warning("dropped %d empty samples of %s: if these are many, is text_column the right one?", empty, where)


def _pieces(
    source: Texts | TokenIds, tokenizer: PreTrainedTokenizerBase | None, size: int, count: int, seed: int | None
) -> list[Sample]:
    """Join the sequences in the dataset's order and cut them into pieces of `size` tokens, then draw `count`."""
    # To draw from all pieces, all must be there; of a stream, which may be endless, the first must do.
    enough = None if seed is not None and _is_random_access(source.items) else count * size
    stream = _join(_sequences(source, enumerate(source.items), tokenizer, None), tokenizer, enough, source.where)
    pieces = stream[: len(stream) // size * size].view(-1, size)
    if not len(pieces):
        raise BitpressError(
            f"{source.where} has {len(stream)} tokens in all, fewer than one piece of max_seq_length={size}; "
            "pass more data or a smaller max_seq_length"
        )
    drawn = permutation(len(pieces), seed)[:count]
    return [read_sample({"input_ids": pieces[index]}) for index in drawn]


def _join(
    sequences: Iterable[Sample], tokenizer: PreTrainedTokenizerBase | None, enough: int | None, where: str
) -> Tensor:
    """Join at least `enough` tokens (None: all of them), without padding, the end-of-sequence token between."""
    separator = getattr(tokenizer, "eos_token_id", None)
    parts: list[Tensor] = []
    total = empty = 0
    for sample in sequences:
        ids = sample["input_ids"][sample["attention_mask"].bool()]
        if not len(ids):
            empty += 1
            continue
        if parts and separator is not None and parts[-1][-1] != separator:
            ids = torch.cat([torch.tensor([separator]), ids])
        parts.append(ids)
        total += len(ids)
        if enough is not None and total >= enough:
            break
    _report_empty(empty, len(parts), where)
    return torch.cat(parts)
