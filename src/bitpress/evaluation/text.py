"""The texts, or token ids, of a dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.evaluation.subjects import Subject
from bitpress.evaluation.windows import Window, cut, take_windows
from bitpress.pipelines.data.batches import check_vocabulary
from bitpress.pipelines.data.samples import DEFAULT_LENGTH, SANE_LENGTH, whole_sequences
from bitpress.pipelines.data.sources import ReadyBatches, SampleRows, Texts, TokenIds, open_source

# How many tokens a model can read, where its config says so.
LIMITS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True)
class Reading:
    """How a dataset is read; see :func:`bitpress.evaluate`."""

    max_seq_length: int | None = None
    stride: int | None = None
    num_samples: int | None = None
    batch_size: int = 1
    text_column: str = "text"
    splits: Any = None
    concatenate_data: bool | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "stride", "num_samples", "batch_size"):
            value = getattr(self, name)
            if value is None and name != "batch_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BitpressError(f"{name}={value!r}: must be a whole number of at least 1")


@dataclass(frozen=True, eq=False)
class Text:
    """Sequences of token ids, and the windows that are read of them.

    Attributes:
        sequences: int64, (tokens,) each, by the ``sequence`` of a window.
        windows: in order.
        length: tokens of a window at most.
        stride: tokens from the start of one window to the next one's.
        bos: whether every window begins with the beginning-of-sequence token.
    """

    sequences: list[Tensor]
    windows: list[Window]
    length: int
    stride: int
    bos: bool


def open_data(dataset: Any, subject: Subject, reading: Reading) -> Texts | TokenIds | SampleRows | ReadyBatches:
    """Find out what a dataset holds.

    Raises:
        BitpressError: it cannot be read, or holds nothing usable.
    """
    return open_source(
        dataset,
        tokenizer=subject.tokenizer,
        model=subject.model,
        text_column=reading.text_column,
        splits=reading.splits,
        concatenate=reading.concatenate_data is not False,
    )


def read_text(source: Texts | TokenIds, subject: Subject, reading: Reading) -> Text:
    """Tokenize a dataset and cut it.

    Raises:
        BitpressError: an item cannot be read, or it does not fit the model or the options.
    """
    length = _window_length(subject, reading.max_seq_length)
    first = beginning(subject.tokenizer) if reading.bos else None
    room = length - (first is not None)
    stride = reading.stride or room
    if stride > room or length < 2:
        raise BitpressError(
            f"stride={stride}, max_seq_length={length}: a window holds at least two tokens, and the next one must not "
            f"leave any out: a stride of {room} at most."
        )
    joined = isinstance(source, Texts) if reading.concatenate_data is None else reading.concatenate_data
    enough = None if reading.num_samples is None else reading.num_samples * length
    found = list(_sequences(source, subject, joined=joined, enough=enough))
    check_vocabulary([{"input_ids": ids} for ids in found], subject.model, source.where)
    if first is not None:
        found = [ids[1:] if ids[0] == first else ids for ids in found]
    windows = (
        window for index, ids in enumerate(found) for window in cut(ids, length, stride, index=index, first=first)
    )
    return Text(found, take_windows(windows, reading.num_samples, source.where), length, stride, first is not None)


def beginning(tokenizer: Any) -> int:
    """The beginning-of-sequence token.

    Raises:
        BitpressError: there is none.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise BitpressError("bos=True, but there is no tokenizer with a beginning-of-sequence token.")
    return int(token)


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can read, as its config says; None if it does not."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    stated = (getattr(config, name, None) for name in LIMITS)
    return next((limit for limit in stated if isinstance(limit, int) and 0 < limit < SANE_LENGTH), None)


def _window_length(subject: Subject, stated: int | None) -> int:
    limit = positions(subject.model)
    if stated is None:
        return min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if limit is not None and stated > limit:
        raise BitpressError(f"max_seq_length={stated}, but {subject.name} reads {limit} tokens, as its config says.")
    return stated


def _sequences(source: Texts | TokenIds, subject: Subject, *, joined: bool, enough: int | None) -> Iterator[Tensor]:
    """Sequences until they hold ``enough`` tokens; one of them all if ``joined``, with the end token between them."""
    end = getattr(subject.tokenizer, "eos_token_id", None)
    parts: list[Tensor] = []
    total = 0
    for ids in whole_sequences(source, subject.tokenizer):
        if not joined:
            yield ids
        elif parts and end is not None and parts[-1][-1] != end:
            parts += [torch.tensor([end]), ids]
        else:
            parts.append(ids)
        total += len(ids)
        if enough is not None and total >= enough:
            break
    if total == 0:
        raise BitpressError(f"{source.where} is empty.")
    if joined:
        yield torch.cat(parts)
