"""Agreement of any two modules: of what their forwards return for the same batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bitpress.errors import BitpressError
from bitpress.evaluation.scores import divergence
from bitpress.evaluation.subjects import Subject, common_vocabulary
from bitpress.evaluation.text import Reading
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.pipelines.data.batches import batch_rows, take_ready
from bitpress.pipelines.data.sources import ReadyBatches, SampleRows
from bitpress.pipelines.gradients import predictions


@dataclass(frozen=True)
class OutputAgreement:
    """Of a module's outputs with the original's.

    Attributes:
        relative_error: ``||output - original|| / ||original||``, over all values of all outputs.
        cosine: of the two, over the same.
        values: that were compared.
        samples: rows of the batches.
        top1: where outputs are logits, the share of rows of which both hold the same class most likely; else None.
        divergence: there, the mean of ``KL(original || model)`` over rows, in nats; else None.
    """

    relative_error: float
    cosine: float
    values: int
    samples: int
    top1: float | None = None
    divergence: float | None = None


def read_batches(source: SampleRows | ReadyBatches, subject: Subject, reading: Reading) -> CalibrationData:
    """The first batches of a dataset that is no text.

    Raises:
        BitpressError: the model's forward does not take them.
    """
    if isinstance(source, ReadyBatches):
        return take_ready(source, reading.num_samples or 1 << 62, subject.model)
    return batch_rows(source, reading.num_samples or len(source.rows), reading.batch_size, None, subject.model)


def compare_outputs(
    subject: Subject,
    original: Subject,
    data: CalibrationData,
    on_batch: Callable[[int], None] = lambda _: None,
) -> OutputAgreement:
    """Run batches, once through each module.

    Raises:
        BitpressError: the outputs are not of one shape, or hold no floats.
    """
    # Squared norms of the original's, the model's and their difference; their product; all in float64.
    sums = torch.zeros(4, dtype=torch.float64)
    values, same, rows, apart = 0, 0, 0, 0.0
    for batch in data.batches:
        ours, theirs = _run(subject, batch), _run(original, batch)
        for pair in _pairs(ours, theirs, subject, original):
            a, b = (each.cpu().double().flatten() for each in pair)
            sums += torch.stack([b @ b, a @ a, (a - b) @ (a - b), a @ b])
            values += a.numel()
        found, expected = predictions(ours, batch), predictions(theirs, batch)
        if found is not None and expected is not None:
            common = common_vocabulary(found.shape[-1], expected.shape[-1], None)
            expected = expected.to(found.device)
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
            apart += float(divergence(expected[:, :common], found[:, :common]).double().sum())
            rows += len(found)
        on_batch(1)
    of_original, of_model, of_difference, product = sums.tolist()
    return OutputAgreement(
        (of_difference / of_original) ** 0.5 if of_original else float(of_difference > 0),
        product / (of_original * of_model) ** 0.5 if of_original and of_model else float(of_difference == 0),
        values,
        data.samples,
        same / rows if rows else None,
        apart / rows if rows else None,
    )


def _run(subject: Subject, batch: Batch) -> Any:
    moved = batch.to(subject.device)
    return subject.model(*moved.args, **moved.kwargs)


def _pairs(ours: Any, theirs: Any, subject: Subject, original: Subject) -> list[tuple[Tensor, Tensor]]:
    """The tensors of floats of two outputs, side by side."""
    a, b = (
        [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for output in (ours, theirs)
    )
    if not a or [each.shape for each in a] != [each.shape for each in b]:
        shapes = " and ".join(str([tuple(each.shape) for each in tensors]) for tensors in (a, b))
        raise BitpressError(
            f"the outputs of {subject.name} and {original.name} cannot be compared: they hold tensors of floats of the "
            f"shapes {shapes}."
        )
    return list(zip(a, b, strict=True))
