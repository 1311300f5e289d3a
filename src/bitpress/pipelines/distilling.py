"""Tuning what the grids of the solved model leave free, its scales, until it predicts what the original does.

The teacher is the model, whose parameters are still the original ones; the student is the same model with every block
making its weights, while it runs, from the solved integers and the tuned scales. Nothing is written to the model.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.changes import Changes
from bitpress.errors import BitpressError
from bitpress.models.blocks import Block
from bitpress.models.substitutes import Make, Substitute, substituted, substitutes
from bitpress.modifiers import State
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.pipelines.gradients import (
    BETAS,
    Forward,
    first_tensor,
    keeping_inputs,
    own_gradients_kept,
    predictions,
    replaced_forwards,
)
from bitpress.pipelines.solving import OnProgress, Progress
from bitpress.quantization import QuantizedWeight
from bitpress.quantization.grid import beside
from bitpress.quantization.scales import ScaleKind, scale_kind

logger = logging.getLogger(__name__)

# Of a grid of 4 bits, for which learning rates are stated.
STEPS = 2**4 - 1


def distill(state: State, data: CalibrationData | None, changes: Changes, on_progress: OnProgress) -> None:
    """Tune the scales in ``changes`` as ``state.tuning`` says; see :class:`bitpress.modifiers.DistillationModifier`.

    Raises:
        BitpressError: the model's output has no gradient.
    """
    tuning = state.tuning
    if tuning is None or data is None:
        return
    count = max(1, round(tuning.held_out * len(data.batches)))
    training, held_out = data.batches[:-count], data.batches[-count:]
    student = _Student(state, changes)
    if not student.factors:
        logger.warning(
            "DistillationModifier has nothing to tune, and can be left out: the scales of these schemes are not free."
        )
        return
    with state.watch.phase("distill"), own_gradients_kept(state.model):
        for parameter in state.model.parameters():
            parameter.requires_grad_(False)
        steps = tuning.epochs * len(training)
        on_progress(Progress(0, steps, "held-out batches", "distill", "steps"))
        losses = [_mean_loss(state.model, student, held_out)]
        best = student.values()
        optimizer = torch.optim.Adam(student.parameter_groups(tuning.learning_rate), betas=BETAS)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        generator = torch.Generator().manual_seed(state.seed)
        for epoch in range(tuning.epochs):
            for step, index in enumerate(torch.randperm(len(training), generator=generator).tolist()):
                done = epoch * len(training) + step
                on_progress(Progress(done, steps, f"epoch {epoch + 1} of {tuning.epochs}", "distill", "steps"))
                with torch.enable_grad():
                    _loss(state.model, student, training[index]).backward()
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
            losses.append(_mean_loss(state.model, student, held_out))
            if losses[-1] <= min(losses):
                best = student.values()
    if min(losses) == losses[0]:
        logger.info("distillation did not bring the held-out batches nearer to the original: scales stay as they were.")
    for name, values in best.items():
        scale = changes.packed[name].scale
        # Every rank has done the same; that it is the same to the bit one of them says.
        tuned = state.ranks.from_first((scale.float() * values.exp()).to(scale.dtype))
        changes.packed[name] = replace(changes.packed[name], scale=tuned)
    state.distillation = {"tuned_layers": len(best), "held_out_batches": count, "held_out_loss": losses}


def check_enough(state: State, data: CalibrationData | None) -> None:
    """Refuse to learn from a single batch.

    Raises:
        BitpressError: there is none to judge by.
    """
    asking = {"DistillationModifier": state.tuning, "LearnedRoundingModifier": state.rounding}
    for name, settings in asking.items():
        if settings is not None and data is not None and len(data.batches) < 2:
            raise BitpressError(
                f"{name} needs at least two calibration batches, one of which is held out to judge by: give more "
                "samples, or a smaller batch_size."
            )


class _Student:
    """The solved model.

    Attributes:
        factors: the logarithm of what each stored scale is multiplied by, by the layer's name; float32.
    """

    def __init__(self, state: State, changes: Changes) -> None:
        self.factors: dict[str, nn.Parameter] = {}
        self._bits: dict[str, int] = {}
        self._blocks = state.blocks
        self._recompute = state.tuning is not None and state.tuning.gradient_checkpointing
        self._parts = {block.name: self._substitutes(state, changes, block) for block in state.blocks}

    def _substitutes(self, state: State, changes: Changes, block: Block) -> list[Substitute]:
        weights = {name: self._make(name, changes) for name in block.layers if name in changes.packed}
        prefix = f"{block.name}." if block.name else ""
        others = {name: value for name, value in changes.dense.items() if name.startswith(prefix)}
        return substitutes(state.model, weights, others)

    def _make(self, name: str, changes: Changes) -> Make:
        # One byte a weight while it lasts: to unpack them at each run would cost more than to multiply by them.
        weight = changes.packed[name].unpack()
        if scale_kind(weight.args) != ScaleKind.PLAIN:
            return weight.dequantize
        factor = nn.Parameter(torch.zeros_like(weight.scale, dtype=torch.float32))
        self.factors[name], self._bits[name] = factor, weight.args.num_bits
        return lambda: _rescaled(weight, factor)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The factors with their learning rates: what counts is how far a value moves in steps of its own grid."""
        return [
            {"params": [factor], "lr": learning_rate * STEPS / (2 ** self._bits[name] - 1)}
            for name, factor in self.factors.items()
        ]

    def values(self) -> dict[str, Tensor]:
        """A copy of the factors."""
        return {name: factor.detach().clone() for name, factor in self.factors.items()}

    def running(self) -> AbstractContextManager[None]:
        """Inside the ``with`` the model is the student."""
        return replaced_forwards(self._blocks, self._forward)

    def _forward(self, block: Block, forward: Forward) -> Forward:
        parts = self._parts[block.name]

        def solved(*args: object, **kwargs: object) -> object:
            with substituted(parts):
                return forward(*args, **kwargs)

        return keeping_inputs(block, solved) if self._recompute else solved


def _rescaled(weight: QuantizedWeight, factor: Tensor) -> Tensor:
    """The weight with each scale times ``exp(factor)``: as the scale multiplies all of its group, so does this."""
    dense = weight.dequantize()
    view, (of_group,) = beside(dense, [factor.exp()], weight.args)
    return (view * of_group).to(dense.dtype).reshape(dense.shape)


@torch.no_grad()
def _mean_loss(model: nn.Module, student: _Student, batches: Sequence[Batch]) -> float:
    return sum(float(_loss(model, student, batch)) for batch in batches) / len(batches)


def _loss(model: nn.Module, student: _Student, batch: Batch) -> Tensor:
    """The divergence from the original's predictions, nats per token; of other outputs, the relative squared error."""
    with torch.no_grad():
        original = model(*batch.args, **batch.kwargs)
    with student.running():
        output = model(*batch.args, **batch.kwargs)
    expected, found = predictions(original, batch), predictions(output, batch)
    if expected is None or found is None:
        target, values = first_tensor(original), first_tensor(output)
        if target is None or values is None:
            raise BitpressError(f"the output of {type(model).__name__} holds no tensor to distill from.")
        loss = (values - target).square().mean() / target.square().mean().clamp(min=1e-30)
    else:
        scores, target = found.log_softmax(-1), expected.log_softmax(-1)
        loss = nn.functional.kl_div(scores, target, log_target=True, reduction="sum") / len(scores)
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise BitpressError(
            f"the output of {type(model).__name__} has no gradient (is its forward under no_grad?): leave "
            "DistillationModifier out of the recipe."
        )
    return loss
