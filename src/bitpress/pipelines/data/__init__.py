"""Calibration data: whatever the user calls a dataset becomes a list of batches that the model's forward takes.

`loading` finds what a name stands for, `sources` tells what kind of data an object holds, `samples` makes token
sequences of it, `batches` pads and groups them; `generated` has the model write some itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitpress.errors import BitpressError
from bitpress.pipelines.data.batches import (
    Batch,
    CalibrationData,
    batch_rows,
    batch_samples,
    check_vocabulary,
    take_ready,
)
from bitpress.pipelines.data.generated import with_generated
from bitpress.pipelines.data.samples import gather
from bitpress.pipelines.data.sources import ReadyBatches, SampleRows, open_source

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "CalibrationData", "prepare", "with_generated"]

logger = logging.getLogger(__name__)

# Of oneshot, where nobody has asked for a number.
SAMPLES = 512


def prepare(  # noqa: PLR0913 - the options of oneshot
    dataset: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_calibration_samples: int = SAMPLES,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    text_column: str = "text",
    splits: str | Sequence[str] | Mapping[str, str] | None = None,
    shuffle_calibration_samples: bool = True,
    seed: int = 42,
    concatenate_data: bool = False,
    dataset_config_name: str | None = None,
    model: nn.Module | None = None,
) -> CalibrationData:
    """Turn a dataset into calibration batches.

    Texts, conversations and token ids become batches of `input_ids` and `attention_mask`, both (rows, positions) and
    int64 on the CPU, padded on the right. A tensor of sample rows is grouped in batches. Ready batches (the items of a
    `DataLoader` or of any iterable of tensors, tuples of tensors or dicts) are passed in their order as they are: a
    tensor or tuple as positional arguments, a dict as keyword arguments less those that `model.forward` does not know.

    Args:
        dataset: A list of strings or of token ids; a tensor: token ids, of shape (samples, length), where it holds
            integers and there is a tokenizer or a transformers model, else sample rows; a Hugging Face dataset or a
            list of dicts with a column of token ids (`input_ids`), texts or conversations (`messages`); the name of
            a dataset on the hub; the path of a .txt, .jsonl, .json, .csv or .parquet file or of a folder written by
            `save_to_disk`; an iterable of ready batches.
        tokenizer: Needed for texts and conversations.
        num_calibration_samples: How many sequences to take; of ready batches how many rows (dimension 0 of the
            first tensor), where the batch that reaches the number is kept whole. Where there are fewer, all are taken.
        max_seq_length: Longer sequences are truncated to this many tokens. Without it, to the tokenizer's
            `model_max_length`; where it has none, texts to 2048 tokens and token ids not at all.
        batch_size: Sequences or sample rows per batch.
        text_column: The column that holds the texts. Any name but the default goes before `input_ids`.
        splits: Which part of a Hugging Face dataset to use, as in "train[:10%]"; several are joined; of a dict the
            entry "calibration" counts. Without it "calibration", else "train", else the only split.
        shuffle_calibration_samples: Draw sequences and sample rows at random; else take the first ones. A streamed
            dataset is shuffled within its buffer; a generator and ready batches keep their order.
        seed: Makes the draw repeatable.
        concatenate_data: Join all sequences, with the end-of-sequence token between them, and cut them into full
            pieces of `max_seq_length` tokens (without it, at most 2048) before samples are drawn.
        dataset_config_name: The configuration of a dataset on the hub.
        model: Its forward and its embedding are what the batches are checked against.

    Raises:
        BitpressError: The dataset cannot be read, is empty, or does not fit the options or the model.
    """
    _check_positive("num_calibration_samples", num_calibration_samples)
    _check_positive("batch_size", batch_size)
    if max_seq_length is not None:
        _check_positive("max_seq_length", max_seq_length)

    source = open_source(
        dataset,
        tokenizer=tokenizer,
        model=model,
        text_column=text_column,
        splits=splits,
        concatenate=concatenate_data,
        config=dataset_config_name,
    )
    if isinstance(source, SampleRows | ReadyBatches):
        if concatenate_data:
            raise BitpressError(f"concatenate_data=True joins texts or token ids, but {source.where} holds neither")
        if max_seq_length is not None:
            logger.warning(
                "max_seq_length is not applied: %s holds neither texts nor token ids. Cut them, or leave it out",
                source.where,
            )
    if isinstance(source, ReadyBatches):
        if batch_size != 1:
            logger.warning(
                "batch_size is not applied: %s holds ready batches. Make these larger, or leave it out", source.where
            )
        data = take_ready(source, num_calibration_samples, model)
    elif isinstance(source, SampleRows):
        draw = seed if shuffle_calibration_samples else None
        data = batch_rows(source, num_calibration_samples, batch_size, draw, model)
    else:
        samples = gather(
            source,
            tokenizer=tokenizer,
            count=num_calibration_samples,
            max_seq_length=max_seq_length,
            seed=seed if shuffle_calibration_samples else None,
            concatenate=concatenate_data,
        )
        check_vocabulary(samples, model, source.where)
        data = batch_samples(samples, batch_size, tokenizer, model)

    if data.samples < num_calibration_samples:
        logger.log(
            logging.INFO if num_calibration_samples == SAMPLES else logging.WARNING,
            "num_calibration_samples=%d, but %s gave only %d: calibrating with those. Give more data, "
            "or ask for as many",
            num_calibration_samples,
            source.where,
            data.samples,
        )
    return data


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BitpressError(f"{name}={value!r}: must be a whole number of at least 1")
