"""Learning how the weights of a solved block are rounded, by what the block gave in the original model.

Each step makes the weights once, runs the block on some batches, and moves points and scales against the gradients of
the error. Batches that are held out judge: a block that did not come nearer to the original stays as it was solved.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitpress.models.blocks import Block
from bitpress.models.linears import weight_matrix
from bitpress.models.substitutes import Make, Substitute, substituted, substitutes
from bitpress.modifiers import State
from bitpress.modifiers.sharing import Problem, found, joined_figures
from bitpress.modifiers.spread import spread
from bitpress.modifiers.state import Rounding
from bitpress.modifiers.steps import note_solved
from bitpress.pipelines.gradients import BETAS, first_floats, own_gradients_kept
from bitpress.quantization import QuantizedWeight
from bitpress.solvers import LearnedRounding

Errors = Callable[[int], tuple[Tensor, int]]


def relative_errors(output: Any, target: Tensor | None, mask: Tensor | None) -> tuple[Tensor, int]:
    """How far a block's output is off: the sum over positions of the squared error relative to the target's square.

    Norms take each position's size away, and in many models a few positions are a thousand times as large as the
    others: each counts alike.

    Args:
        output: of the block; its first tensor of floats counts.
        target: the same tensor in the original model.
        mask: where there is a token, of the output's first two dimensions; any other is not applied.

    Returns:
        The sum, and the number of positions.
    """
    given = first_floats(output)
    if given is None or target is None or given.shape != target.shape:
        return torch.zeros(()), 0
    if mask is not None and given.shape[:2] == mask.shape:
        given, target = given[mask.to(given.device)], target[mask.to(target.device)]
    rows, exact = (x.reshape(-1, x.shape[-1]).float() for x in (given, target))
    energies = exact.square().sum(-1)
    weights = torch.where(energies > 0, 1 / energies.clamp(min=1e-30), 0.0)
    return ((rows - exact).square().sum(-1) * weights).sum(), len(rows)


def learn_rounding(state: State, block: Block, training: Sequence[int], held_out: Sequence[int], of: Errors) -> None:
    """Learn the rounding of the block's quantized layers, as ``state.rounding`` says; its parameters are the new ones.

    Args:
        state: with the block's layers as they were solved, and as they were before.
        block: the block.
        training: the batches to learn from.
        held_out: those to judge by.
        of: runs the block on a batch, and says how far its output is off, see :func:`relative_errors`; of a batch that
            another rank has, nothing.
    """
    settings, layers = state.rounding, [name for name in block.layers if name in state.unrounded]
    if settings is None or not layers:
        return
    before = {name: state.unrounded.pop(name) for name in layers}
    learned = {name: LearnedRounding(state.quantized[name], weight) for name, weight in before.items()}
    with own_gradients_kept(block.module):
        for parameter in block.module.parameters():
            parameter.requires_grad_(False)
        solved, count = _mean(state, held_out, of)
        if not count:
            return
        _learn(state, learned, _Draws(training, state.seed), of, settings)
        weights = {name: each.quantized() for name, each in learned.items()}
        with substituted(_fixed(state, {name: weight.dequantize() for name, weight in weights.items()})):
            after, _ = _mean(state, held_out, of)
    state.block_records[block.name] = {"solved_error": solved, "learned_error": after}
    if after < solved:
        for name, weight in weights.items():
            _take(state, block, name, weight)
            _note(state, name, before[name])


def _learn(state: State, learned: dict[str, LearnedRounding], draws: "_Draws", of: Errors, settings: Rounding) -> None:
    factors = [each.factors for each in learned.values() if each.factors is not None]
    # The relative error's gradients are small: eps must not be near them.
    optimizer = torch.optim.Adam(factors, lr=settings.learning_rate, betas=BETAS, eps=1e-15) if factors else None
    for step in range(settings.iterations):
        left = 1 - step / settings.iterations
        dense = {name: each.dense() for name, each in learned.items()}
        parts = _fixed(state, dense)
        for index in draws.take(max(settings.batch_size, state.ranks.size)):
            with torch.enable_grad(), substituted(parts):
                error, count = of(index)
                if count:
                    error.backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in dense.values()]
        state.ranks.sum(gradients)
        for each, gradient in zip(learned.values(), gradients, strict=True):
            # Steps fall linearly to 0: all of one sign they come to what is stated.
            each.step(2 * left * settings.travel / (settings.iterations + 1), gradient)
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = left * settings.learning_rate
            optimizer.step()


class _Draws:
    """Batches for one step after the other, each batch once in a pass.

    Those of a step stand beside one another in the data: different ranks have them.
    """

    def __init__(self, of: Sequence[int], seed: int) -> None:
        self._of, self._left = list(of), list[list[int]]()
        self._generator = torch.Generator().manual_seed(seed)

    def take(self, count: int) -> list[int]:
        """The batches of the next step: ``count``, or fewer at the end of the data."""
        if not self._left:
            start = int(torch.randint(len(self._of), (), generator=self._generator))
            turned = self._of[start:] + self._of[:start]
            steps = [turned[i : i + count] for i in range(0, len(turned), count)]
            self._left = [steps[i] for i in torch.randperm(len(steps), generator=self._generator).tolist()]
        return self._left.pop()


def _fixed(state: State, weights: dict[str, Tensor]) -> list[Substitute]:
    makes: dict[str, Make] = {name: lambda value=value: value for name, value in weights.items()}  # type: ignore[misc]
    return substitutes(state.model, makes, {})


@torch.no_grad()
def _mean(state: State, batches: Sequence[int], of: Errors) -> tuple[float, int]:
    """The mean error of all ranks' batches, and the number of positions."""
    errors = [of(index) for index in batches]
    notes = [[float(sum(error for error, _ in errors)), sum(count for _, count in errors)]]
    received = [r.note for r in state.ranks.gather(note=notes)]
    total, count = (sum(note[0][i] for note in received) for i in (0, 1))
    return total / max(count, 1), int(count)


def _take(state: State, block: Block, name: str, weight: QuantizedWeight) -> None:
    """Have the learned weight in the place of the solved one."""
    solved = state.quantized[name]
    # Every rank has learned the same; that it is the same to the bit one of them says.
    values, scale = (state.ranks.from_first(x) for x in (weight.values, weight.scale))
    weight = replace(weight, values=values, scale=scale)
    moved = (values.view(weight.values.dtype) != solved.values).float().mean()
    state.layer_records.setdefault(name, {})["points_learned"] = float(moved)
    state.quantized[name] = weight
    weight_matrix(block.layers[name]).copy_(weight.dequantize())


def _note(state: State, name: str, before: Tensor) -> None:
    """Have the report speak of the learned weight; ``before`` it was rounded it was this."""
    weight = state.quantized[name]
    problem = Problem(name, before, weight.args, state.statistics.get(name), None, weight.global_scale)
    figures = {**joined_figures([found(problem, weight)]), "spread": spread(weight)}
    state.layer_records[name].update(figures)
    note_solved(state, name, "LearnedRounding", before, weight)
