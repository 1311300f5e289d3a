"""Batches: what one call of the model's forward takes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bitpress.errors import BitpressError
from bitpress.pipelines.data.samples import permutation
from bitpress.pipelines.data.sources import ReadyBatches, Sample, SampleRows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one forward: `model(*batch.args, **batch.kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def mask(self) -> Tensor | None:
        """Return the positions that hold a token, as bool of shape (rows, positions).

        None where nothing is padded, or where there is no 2-D `attention_mask` that could say.
        """
        mask = self.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        real = mask.bool()
        return None if bool(real.all()) else real

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors, nested ones too, on `device`."""
        return Batch(_moved(self.args, device), _moved(self.kwargs, device))


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Calibration batches, and how much they hold.

    Attributes:
        batches: What the model's forward is called with, in order; at least one.
        samples: Sequences, or rows of tensors that are not token ids.
        tokens: Positions that are not padding, or rows of tensors that are not token ids.
        sliceable: The batches hold token ids and were built here, so that rows and positions can be cut.
    """

    batches: list[Batch]
    samples: int
    tokens: int
    sliceable: bool

    def probe(self, rows: int = 1, positions: int = 32) -> Batch:
        """Return a small batch for a dry run.

        Args:
            rows: At most so many sequences.
            positions: At most so many positions of each, from the first that holds a token.

        Returns:
            The first batch, cut to (rows, positions) when `sliceable`, else as it is.
        """
        first = self.batches[0]
        if not self.sliceable:
            return first
        mask = first.mask()
        start = 0 if mask is None else int(mask[:rows].any(dim=0).int().argmax())
        return Batch((), {key: value[:rows, start : start + positions] for key, value in first.kwargs.items()})


def batch_samples(
    samples: Sequence[Sample], batch_size: int, tokenizer: PreTrainedTokenizerBase | None, model: nn.Module | None
) -> CalibrationData:
    """Group consecutive sequences and pad them on the right.

    Raises:
        BitpressError: `model.forward` does not take the batches.
    """
    forward = _signature(model)
    pad = _padding_id(tokenizer, model)
    batches = []
    for group in _groups(samples, batch_size):
        kwargs = {
            key: pad_sequence([sample[key] for sample in group], True, pad if key == "input_ids" else 0)
            for key in group[0]
        }
        unknown = _unknown_keys(forward, kwargs)
        batch = Batch((), {key: value for key, value in kwargs.items() if key not in unknown})
        if "input_ids" in unknown:
            raise BitpressError(
                f"the model's forward({_names(forward)}) takes no input_ids; pass batches of what it takes"
            )
        if "attention_mask" in unknown and not kwargs["attention_mask"].all():
            raise BitpressError(
                f"the model's forward({_names(forward)}) takes no attention_mask, so padding would pass for tokens; "
                "pass batch_size=1 or sequences of one length, without padding"
            )
        _check_call(forward, batch, "a batch of token ids")
        batches.append(batch)
    tokens = sum(int(sample["attention_mask"].count_nonzero()) for sample in samples)
    return CalibrationData(batches, len(samples), tokens, sliceable=True)


def batch_rows(
    source: SampleRows, count: int, batch_size: int, seed: int | None, model: nn.Module | None
) -> CalibrationData:
    """Group the rows of a tensor, drawn by `seed`, or the first ones without one."""
    drawn = source.rows[permutation(len(source.rows), seed)[:count]]
    batches = [Batch((rows,), {}) for rows in drawn.split(batch_size)]
    _check_call(_signature(model), batches[0], source.where)
    return CalibrationData(batches, len(drawn), len(drawn), sliceable=False)


def take_ready(source: ReadyBatches, count: int, model: nn.Module | None) -> CalibrationData:
    """Take ready batches until they hold `count` rows.

    Raises:
        BitpressError: An item is no batch, or `model.forward` does not take it.
    """
    forward = _signature(model)
    batches: list[Batch] = []
    dropped: set[str] = set()
    samples = tokens = 0
    for index, item in enumerate(source.items):
        where = f"{source.where}, batch {index}"
        batch = _as_batch(item, where)
        unknown = _unknown_keys(forward, batch.kwargs)
        dropped |= unknown
        batch = Batch(batch.args, {key: value for key, value in batch.kwargs.items() if key not in unknown})
        _check_call(forward, batch, where)
        if isinstance(batch.kwargs.get("input_ids"), Tensor):
            check_vocabulary([batch.kwargs], model, where)
        batches.append(batch)
        rows, real = _count(batch)
        samples, tokens = samples + rows, tokens + real
        if samples >= count:
            break
    if samples == 0:
        raise BitpressError(f"{source.where} is empty")
    if dropped:
        logger.warning(
            "left out %s of %s: the model's forward does not take it. Rename it if it should",
            ", ".join(sorted(dropped)),
            source.where,
        )
    return CalibrationData(batches, samples, tokens, sliceable=False)


def check_vocabulary(samples: Sequence[Mapping[str, Tensor]], model: nn.Module | None, where: str) -> None:
    """Raise a BitpressError where token ids have no row in the model's embedding."""
    size = _vocabulary(model)
    if size is None:
        return
    for sample in samples:
        ids = sample["input_ids"]
        if ids.numel() and int(ids.max()) >= size:
            raise BitpressError(
                f"{where}: token id {int(ids.max())} is outside the model's embedding of {size} rows; "
                "use the model's own tokenizer, or resize the embedding"
            )


def _vocabulary(model: nn.Module | None) -> int | None:
    find = getattr(model, "get_input_embeddings", None)
    if find is None:
        return None
    try:
        size = getattr(find(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # models without an embedding of tokens
        return None
    return size if isinstance(size, int) else None


def _padding_id(tokenizer: PreTrainedTokenizerBase | None, model: nn.Module | None) -> int:
    size = _vocabulary(model)
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        # Some tokenizers pad with a token that the model was never resized for.
        if token is not None and (size is None or token < size):
            return int(token)
    return 0


def _groups(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _as_batch(item: Any, where: str) -> Batch:
    if isinstance(item, Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping) and any(isinstance(value, Tensor) for value in item.values()):
        return Batch((), dict(item))
    if isinstance(item, list | tuple) and item and all(isinstance(each, Tensor) for each in item):
        return Batch(tuple(item), {})
    raise BitpressError(
        f"{where} is of type {_describe(item)}; a batch is a tensor, a tuple of tensors or a dict that holds tensors"
    )


def _describe(item: Any) -> str:
    name = type(item).__name__
    parts = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    kinds = sorted({type(part).__name__ for part in parts})
    return f"{name} of {', '.join(kinds)}" if kinds else name


def _count(batch: Batch) -> tuple[int, int]:
    """Return the rows of a ready batch and its real tokens; rows again where it holds no token ids."""
    first = next(value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor))
    rows = len(first) if first.ndim else 1
    mask = batch.mask()
    if mask is not None:
        return rows, int(mask.count_nonzero())
    ids = batch.kwargs.get("input_ids", first)
    is_ids = isinstance(ids, Tensor) and ids.ndim == 2 and not (ids.is_floating_point() or ids.is_complex())
    return rows, ids.numel() if is_ids else rows


def _signature(model: nn.Module | None) -> inspect.Signature | None:
    if model is None:
        return None
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # a compiled forward need not have one
        return None


def _unknown_keys(forward: inspect.Signature | None, kwargs: Mapping[str, Any]) -> set[str]:
    if forward is None or any(each.kind is each.VAR_KEYWORD for each in forward.parameters.values()):
        return set()
    return set(kwargs) - set(forward.parameters)


def _names(forward: inspect.Signature | None) -> str:
    return ", ".join(forward.parameters) if forward is not None else ""


def _check_call(forward: inspect.Signature | None, batch: Batch, where: str) -> None:
    if forward is None:
        return
    try:
        forward.bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        raise BitpressError(
            f"{where} does not fit the model's forward({_names(forward)}): {error}; "
            "a tuple gives positional arguments, a dict keyword arguments"
        ) from error


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(each, device) for each in value)
    return value
