"""What kind of data an object holds: texts, token ids, sample rows or ready batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.pipelines.data.loading import Splits, load_named, select_split

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# What a sequence may carry besides its ids, one number per position.
SEQUENCE_KEYS = ("input_ids", "attention_mask", "token_type_ids")

Sample = dict[str, Tensor]
"""One sequence: `input_ids`, `attention_mask` and perhaps `token_type_ids`, each int64 of shape (length,)."""


@dataclass(frozen=True)
class Texts:
    """Items that hold one text each."""

    where: str
    items: Iterable[Any]
    read: Callable[[Any], str]  # "" where the item has no text
    templated: bool  # the chat template has put the special tokens in


@dataclass(frozen=True)
class TokenIds:
    """Items that hold one tokenized sequence each."""

    where: str
    items: Iterable[Any]
    read: Callable[[Any], Sample]


@dataclass(frozen=True)
class SampleRows:
    """A tensor whose dimension 0 counts samples."""

    where: str
    rows: Tensor


@dataclass(frozen=True)
class ReadyBatches:
    """Items that the model's forward takes as they are."""

    where: str
    items: Iterable[Any]


def open_source(
    dataset: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    model: nn.Module | None,
    text_column: str,
    splits: Splits,
    concatenate: bool,
    config: str | None = None,
) -> Texts | TokenIds | SampleRows | ReadyBatches:
    """Find out what a dataset holds, reading no more than its first item.

    Raises:
        BitpressError: It is empty, of an unsupported type, or has no usable column.
    """
    where = f"the dataset (a {type(dataset).__name__})"
    if isinstance(dataset, str | os.PathLike):
        where = f"the dataset {str(dataset)!r}"
        dataset = load_named(dataset, splits, whole=concatenate, config=config)
        splits = None if _is_hugging_face(dataset) else splits
    if _is_hugging_face(dataset):
        table = select_split(dataset, splits, where)
        return _open_rows(where, table, _columns(table, where), tokenizer, text_column)
    if splits is not None:
        raise BitpressError(f"splits={splits!r} chooses a part of a Hugging Face dataset, but {where} has no splits")
    if isinstance(dataset, Tensor):
        return _open_tensor(where, dataset, ids=tokenizer is not None or hasattr(model, "get_input_embeddings"))
    if isinstance(dataset, Mapping):
        return ReadyBatches(where, [dataset])
    if isinstance(dataset, torch.utils.data.Dataset):
        raise BitpressError(f"{where} gives single samples; wrap it in a torch DataLoader, which gives batches")
    if not isinstance(dataset, Iterable):
        raise BitpressError(f"{where} cannot be used for calibration; pass texts, token ids, batches or a dataset")
    return _open_iterable(where, dataset, tokenizer, text_column)


def read_ids(value: Any) -> Tensor:
    """Read one sequence of token ids as int64 of shape (length,)."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BitpressError(f"a sequence of token ids was expected: {error}") from error
    if ids.ndim == 2 and ids.shape[0] == 1:  # what tokenizers with return_tensors leave in a column
        ids = ids[0]
    if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.is_complex())):
        raise BitpressError(f"token ids must be a row of integers, not {ids.dtype} of shape {tuple(ids.shape)}")
    ids = ids.to("cpu", torch.int64)
    if ids.numel() and ids.min() < 0:
        raise BitpressError(f"token id {int(ids.min())} is negative")
    return ids


def read_sample(row: Mapping[str, Any]) -> Sample:
    """Read one tokenized row; a row that is padding throughout has length 0."""
    sample = {key: read_ids(row[key]) for key in SEQUENCE_KEYS if row.get(key) is not None}
    ids = sample["input_ids"]
    sample.setdefault("attention_mask", torch.ones_like(ids))
    for key, values in sample.items():
        if len(values) != len(ids):
            raise BitpressError(f"{key} has {len(values)} positions, input_ids {len(ids)}")
    return sample if sample["attention_mask"].any() else {key: values[:0] for key, values in sample.items()}


def _read_text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BitpressError(f"a text was expected, not {type(value).__name__}")
    return value if value.strip() else ""


def _read_column(row: Any, column: str) -> Any:
    if not isinstance(row, Mapping) or column not in row:
        raise BitpressError(f"there is no column {column!r}")
    return row[column]


def _is_hugging_face(dataset: Any) -> bool:
    # Whoever holds such an object has imported the library; nobody else needs to wait for it.
    library = sys.modules.get("datasets")
    names = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    # A user's own module may bear the library's name.
    return isinstance(dataset, tuple(getattr(library, name) for name in names if hasattr(library, name)))


def _columns(table: Any, where: str) -> list[str]:
    if table.column_names:
        return list(table.column_names)
    first = next(iter(table), None)
    if first is None:
        raise BitpressError(f"{where} is empty")
    return list(first)


def _open_tensor(where: str, tensor: Tensor, *, ids: bool) -> TokenIds | SampleRows:
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise BitpressError(f"{where} is empty: its shape is {tuple(tensor.shape)}")
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not (ids and integer and tensor.ndim <= 2):
        return SampleRows(where, tensor)
    return _open_ids(where, torch.atleast_2d(tensor))


def _open_iterable(
    where: str, dataset: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None, text_column: str
) -> Texts | TokenIds | ReadyBatches:
    iterator = iter(dataset)
    try:
        first = next(iterator)
    except StopIteration:
        raise BitpressError(f"{where} is empty") from None
    # What can be read again and in any order can be shuffled; all else is read once.
    items = dataset if isinstance(dataset, Sequence) else chain([first], iterator)
    if isinstance(first, str):
        _need_tokenizer(tokenizer, where, "texts")
        return Texts(where, items, _read_text, templated=False)
    if isinstance(first, Mapping) and not _is_batch(first):
        return _open_rows(where, items, list(first), tokenizer, text_column)
    if _is_id_sequence(first):
        return _open_ids(where, items)
    return ReadyBatches(where, items)


def _is_batch(item: Mapping[str, Any]) -> bool:
    ids = item.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.ndim > 1
    return any(isinstance(value, Tensor) for value in item.values())


def _is_id_sequence(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.ndim == 1 and item.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    return isinstance(item, list | tuple) and all(isinstance(each, int) for each in item)


def _open_ids(where: str, items: Iterable[Any]) -> TokenIds:
    return TokenIds(where, items, lambda item: read_sample({"input_ids": item}))


def _open_rows(
    where: str, rows: Any, columns: list[str], tokenizer: PreTrainedTokenizerBase | None, text_column: str
) -> Texts | TokenIds:
    explicit = text_column != "text"
    if explicit and text_column not in columns:
        raise BitpressError(f"{where} has no column {text_column!r} (text_column=); it has {', '.join(columns)}")
    if "input_ids" in columns and not explicit:
        return TokenIds(where, _select(rows, [key for key in SEQUENCE_KEYS if key in columns]), _read_row)
    if text_column in columns:
        _need_tokenizer(tokenizer, where, "texts")
        return Texts(
            where,
            _select(rows, [text_column]),
            lambda row: _read_text(_read_column(row, text_column)),
            templated=False,
        )
    if "messages" in columns:
        _need_tokenizer(tokenizer, where, "conversations")
        return Texts(
            where,
            _select(rows, ["messages"]),
            lambda row: _render_chat(tokenizer, _read_column(row, "messages")),
            templated=True,
        )
    raise BitpressError(
        f"{where} has no column of texts ({text_column!r}), conversations ('messages') or token ids ('input_ids'); "
        f"it has {', '.join(columns) or 'no columns'}; name the column of texts with text_column="
    )


def _read_row(row: Any) -> Sample:
    _read_column(row, "input_ids")
    return read_sample(row)


def _select(rows: Any, columns: list[str]) -> Any:
    """Leave out the columns that nobody reads: images and audio would be decoded."""
    return rows.select_columns(columns) if _is_hugging_face(rows) else rows


def _render_chat(tokenizer: Any, messages: Any) -> str:
    if not messages:
        return ""
    try:
        return _read_text(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs: anything can go wrong
        raise BitpressError(
            f"the tokenizer's chat template does not take these messages: {error}; "
            "set tokenizer.chat_template, or make a column of texts and name it with text_column="
        ) from error


def _need_tokenizer(tokenizer: PreTrainedTokenizerBase | None, where: str, what: str) -> None:
    if tokenizer is None:
        raise BitpressError(f"{where} holds {what}, which need a tokenizer; pass tokenizer=, or pass token ids")
