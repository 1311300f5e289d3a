"""Block after block, with every calibration batch's forward paused at the same place.

At block k the scheduler holds the inputs of all batches. It runs the block on them and collects statistics, lets the
modifiers solve, runs the block again with the new weights and hands each paused forward its output, so that the next
block sees what the compressed model will feed it.

Activations that a scheme quantizes are not quantized meanwhile, as in the peers: weights are solved for the activations
themselves, and a static range is measured where the block runs with its new weights, before its scale is known.

Where a modifier asks how far the inputs have drifted, a second forward of each batch goes beside the first, through the
blocks with their original weights. At block k it runs before the other, and goes on. One batch always has it: the
report's witness.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves

from bitpress.checkpoints.changes import Changes
from bitpress.models.blocks import Block, Call
from bitpress.models.taps import OUTPUT
from bitpress.modifiers import Modifier, State
from bitpress.pipelines.data import CalibrationData
from bitpress.pipelines.gradients import first_floats
from bitpress.pipelines.paused import PausedForward, PausePoints
from bitpress.pipelines.rounding import learn_rounding, relative_errors
from bitpress.pipelines.solving import (
    OnProgress,
    Progress,
    finish,
    is_held_out,
    make_collector,
    make_notes,
    make_range_collector,
    solve,
    take_notes,
    watched,
)
from bitpress.pipelines.spilling import Spill, hidden_state, make_spill
from bitpress.pipelines.witness import AFTER, BEFORE, ORIGINAL, Witness
from bitpress.statistics import InputCollector, Statistic

logger = logging.getLogger(__name__)


def run_sequential(
    state: State,
    modifiers: Sequence[Modifier],
    data: CalibrationData,
    order: Sequence[str],
    changes: Changes,
    on_progress: OnProgress,
) -> None:
    """Solve the blocks in the order of their last calls; ``order`` is that of all calls in the dry run."""
    points = PausePoints(state.blocks)
    with points.installed():
        mine = {index: data.batches[index] for index in state.ranks.mine(len(data.batches))}
        forwards = {i: PausedForward(state.model, batch.args, batch.kwargs) for i, batch in mine.items()}
        # The first may write to what it is given.
        compares, witness = _compares(state, modifiers), Witness.of(mine if state.ranks.is_first else {})
        own = {i: Call(b.args, b.kwargs).copy() for i, b in mine.items() if compares or i == witness.index}
        originals = {i: PausedForward(state.model, call.args, call.kwargs) for i, call in own.items()}
        masks = [b.mask() for b in data.batches]
        schedule = _Schedule(state, modifiers, points, forwards, originals, masks, changes, on_progress)
        schedule.witness = witness
        try:
            schedule.run(order)
        finally:
            for forward in (*forwards.values(), *originals.values()):
                forward.stop()
            if schedule.spill is not None:
                schedule.spill.close()
    schedule.say_what_was_not_compared()


def _compares(state: State, modifiers: Sequence[Modifier]) -> bool:
    drift = (Statistic.DRIFT in m.required_statistics(state, name) for m in modifiers for name in state.schemes)
    return state.rounding is not None or any(drift)


class _Schedule:
    """The paused forwards of all batches, and what has been solved so far."""

    def __init__(
        self,
        state: State,
        modifiers: Sequence[Modifier],
        points: PausePoints,
        forwards: dict[int, PausedForward],
        originals: dict[int, PausedForward],
        masks: Sequence[Tensor | None],
        changes: Changes,
        on_progress: OnProgress,
    ) -> None:
        self.state, self.modifiers, self.points = state, modifiers, points
        self.forwards, self.originals, self.masks = forwards, originals, masks
        self.changes, self.on_progress = changes, on_progress
        self.spill: Spill | None = None
        self.started = self.solved_any = False
        self.began: float | None = None
        self.movable: dict[PausedForward, list[UntypedStorage]] = {}
        self.unpaired: set[str] = set()
        self.compares = _compares(state, modifiers)
        self.targets: dict[int, Tensor] = {}
        self.witness = Witness(None, None)
        self.lost = 0
        self.ends = False
        self.done = 0

    def run(self, order: Sequence[str]) -> None:
        blocks = {block.name: block for block in self.state.blocks}
        left = Counter(order)
        collectors = {
            name: make_collector(self.state, self.modifiers, watched(self.state, blocks[name]), ranges=left[name] > 1)
            for name in dict.fromkeys(order)
        }
        with self.state.watch.phase("propagate"):
            for index, forward in self.forwards.items():
                self._resume(forward)
                self._rest(index)
            for index, forward in self.originals.items():
                with self._awake(index):
                    self._resume(forward)
        for position, name in enumerate(order):
            self._detours(left)
            left[name] -= 1
            block, collector = blocks[name], collectors[name]
            self.ends = position == len(order) - 1
            with block.present():
                if left[name]:
                    self._calibrate(block, collector, go_on=True)
                else:
                    self._finish(block, collectors.pop(name), last=self.ends)
        for block in self.state.blocks:
            if block.name not in left:
                with block.present():
                    self._solve(block, make_collector(self.state, self.modifiers, {}))

    def _detours(self, left: Counter[str]) -> None:
        """Where a batch waits for a call that the dry run did not make: solve the block now, or run it as it was.

        The plan of the rest is not changed by it; blocks that were solved already do not see these calls.
        """
        while waiting := self._waiting(left):
            for name in waiting:
                block = next(block for block in self.state.blocks if block.name == name)
                with block.present():
                    if name in left:
                        self._propagate_originals(block)
                        self._propagate(block)
                    else:
                        left[name] = 0
                        self._finish(block, make_collector(self.state, self.modifiers, block.layers), last=False)

    def _of(self, index: int) -> list[PausedForward]:
        """The forwards of a batch."""
        original = self.originals.get(index)
        return [self.forwards[index], *([original] if original is not None else [])]

    def _resume(self, forward: PausedForward, output: Any = None) -> None:
        """Let a forward go on with a block's output; what it waits with then may go to the disk."""
        forward.resume(output)
        self.movable[forward] = hidden_state(forward.call, output)

    def _stop(self, forward: PausedForward) -> None:
        """Give a forward up, and let go of what it waits with."""
        forward.stop()
        self.movable.pop(forward, None)

    def _rest(self, index: int) -> None:
        """A batch waits: what with may go to the disk."""
        storages = [storage for forward in self._of(index) for storage in self.movable.get(forward, ())]
        if not self.started:
            # Beside each, what the original model has, and what it gives.
            each = 1 + bool(self.originals) * self.compares + (self.state.rounding is not None)
            self.spill, self.started = make_spill(self.state, storages * each, len(self.forwards)), True
        if index in self.targets:
            storages.append(self.targets[index].untyped_storage())
        if self.spill is not None:
            self.spill.out(index, storages)

    @contextmanager
    def _awake(self, index: int) -> Iterator[None]:
        """Inside the ``with`` a batch has in memory what it waits with."""
        if self.spill is not None:
            self.spill.back(index)
        yield
        self._rest(index)

    def _waiting(self, left: Counter[str]) -> list[str]:
        """Names of the blocks that a batch of any rank waits for, but that are not called any more, by that batch."""
        own = {i: f.at.name for i, f in self.forwards.items() if f.at is not None and not left[f.at.name]}
        of_all = sorted(pair for received in self.state.ranks.gather(note=list(own.items())) for pair in received.note)
        return list(dict.fromkeys(name for _, name in of_all))

    def _at(self, block: Block) -> list[int]:
        """Batches whose forward waits for this block; one that takes another way through the model waits elsewhere."""
        return [i for i, forward in self.forwards.items() if forward.at is block]

    def _calibrate(self, block: Block, collector: InputCollector, *, go_on: bool, solved: bool = False) -> None:
        """Run the block; ``go_on`` if these outputs are what the forwards get.

        Unless it is ``solved``, its weights are the original ones: then the original forwards go on.
        """
        self._say(block, "calibrate")
        # A block that is a layer itself has run its hooks by now: the model called it, and it paused in its forward.
        is_layer = block.name in block.layers
        # Hooks that move weights to and fro count on every call to end.
        offloads = any(hasattr(module, "_hf_hook") for module in block.module.modules())
        with nullcontext() if is_layer else collector.watching(), self.state.watch.phase("calibrate"):
            for index in self._at(block):
                with self._awake(index):
                    if not solved:
                        self._run_original(block, index, collector, is_layer=is_layer)
                    needed = go_on or offloads
                    self._observe(block, index, collector, go_on=go_on, output_needed=needed, solved=solved)
        self.unpaired |= collector.unpaired

    def _observe(
        self, block: Block, index: int, collector: InputCollector, *, go_on: bool, output_needed: bool, solved: bool
    ) -> None:
        """Run the block on what a batch waits with, in sight of the collector."""
        forward, is_layer = self.forwards[index], block.name in block.layers
        # The block runs again on what it was given, unless this is what the forward gets.
        call = forward.waiting_for if go_on else forward.waiting_for.copy()
        held_out = is_held_out(index, len(self.masks))
        output = None
        with collector.batch(index, self.masks[index], output_needed=output_needed, held_out=held_out):
            if is_layer:
                collector.observe(block.name, call.args, call.kwargs)
            output = self.points.run(block, call)
            if is_layer:
                collector.observe(f"{block.name}.{OUTPUT}", (output,), {})
        self.witness.see(index, AFTER if solved else BEFORE, output)
        if go_on:
            self._resume(forward, output)

    def _run_original(self, block: Block, index: int, collector: InputCollector, *, is_layer: bool) -> None:
        """Run the block on what the original model gives it, if that goes the same way, and let this go on."""
        original = self.originals.get(index)
        if original is None:
            return
        if original.at is not block:
            self._stop(self.originals.pop(index))
            self.lost += self.compares
            return
        call = original.waiting_for
        first = next((x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor) and x.dim() > 1), None)
        tokens = None if first is None else first.shape[:-1].numel()
        with collector.original(self.masks[index], tokens=tokens):
            if is_layer:
                collector.observe(block.name, call.args, call.kwargs)
            output = self.points.run(block, call)
        self.witness.see(index, ORIGINAL, output)
        target = first_floats(output) if self.state.rounding is not None else None
        if target is not None:
            # The model may write to it when it goes on.
            self.targets[index] = target.clone()
        if self.ends:
            # What is behind the last block, a head over all words, would be computed for nothing.
            self._stop(original)
        else:
            self._resume(original, output)

    def _propagate_originals(self, block: Block) -> None:
        with self.state.watch.phase("propagate"):
            for index in self._at(block):
                with self._awake(index):
                    self._run_original(block, index, make_collector(self.state, [], {}), is_layer=False)

    def _finish(self, block: Block, collector: InputCollector, *, last: bool) -> None:
        """The block's last call: solve it, and go on with its new weights."""
        # What was seen of other blocks counts no more.
        self.witness.judge()
        self.targets = {}
        notes = self.changes.notes(block.name)
        if notes is not None:
            self._restore(block, notes, propagate=not last)
            return
        if not self.solved_any:
            self.began, self.solved_any = time.perf_counter(), True
        if collector.wants_any:
            self._calibrate(block, collector, go_on=False)
        else:
            self._propagate_originals(block)
        self._solve(block, collector, propagate=not last)

    def _restore(self, block: Block, notes: dict[str, Any], *, propagate: bool) -> None:
        """An earlier run has solved the block: go on with what it left."""
        self._propagate_originals(block)
        self.state.activations |= self.changes.restore(block)
        take_notes(self.state, block, notes)
        if propagate:
            self._propagate(block)
        self.done += 1

    def _count(self) -> None:
        """A block is done; after the first that was solved here it can be said how long the others will take."""
        self.done += 1
        left = len(self.state.blocks) - self.done
        if self.began is not None and left:
            each = time.perf_counter() - self.began
            logger.info("a block takes %.1f s: the %d that are left about %.0f s.", each, left, each * left)
        self.began = None

    def _solve(self, block: Block, collector: InputCollector, *, propagate: bool = False) -> None:
        self._say(block, "solve")
        self.state.quantized, self.state.unrounded = {}, {}
        noted = len(self.state.mapping_records)
        with self.changes.of(block, self.state.quantized):
            with self.state.watch.phase("solve"):
                solve(self.state, self.modifiers, block, collector.statistics, lambda who: self._say(block, who))
            self._learn(block)
            ranges = make_range_collector(self.state, self.modifiers, [block])
            if ranges.wants_any:
                self._calibrate(block, ranges, go_on=propagate, solved=True)
            elif propagate:
                self._propagate(block)
            self._judge(block)
        finish(self.state, self.modifiers, block, ranges.statistics, collector.statistics)
        activations = {
            n: tensors for n, tensors in self.state.activations.items() if block.holds(n) or n in block.layers
        }
        self._say(block, "write")
        self.changes.finish(block, activations, make_notes(self.state, block, noted))
        self._count()

    def _learn(self, block: Block) -> None:
        """Learn how the solved block is rounded, if that is asked for."""
        if self.state.rounding is None:
            return
        self._say(block, "learn")
        count = len(self.masks)
        held_out = [index for index in range(count) if is_held_out(index, count)]
        training = [index for index in range(count) if index not in held_out]

        def errors(index: int) -> tuple[Tensor, int]:
            if index not in self.targets or self.forwards[index].at is not block:
                return torch.zeros(()), 0
            with self._awake(index):
                output = self.points.run(block, self.forwards[index].waiting_for.copy())
                return relative_errors(output, self.targets[index], self.masks[index])

        with self.state.watch.phase("learn"):
            learn_rounding(self.state, block, training, held_out, errors)

    def _propagate(self, block: Block) -> None:
        self._say(block, "propagate")
        with self.state.watch.phase("propagate"):
            for index in self._at(block):
                with self._awake(index):
                    forward = self.forwards[index]
                    output = self.points.run(block, forward.waiting_for)
                    self.witness.see(index, AFTER, output)
                    self._resume(forward, output)

    def _judge(self, block: Block) -> None:
        """Note how far the block's output is off; its weights are the new ones."""
        index = self.witness.index
        if index is not None and not self.witness.knows(AFTER) and self.forwards[index].at is block:
            with self._awake(index), self.state.watch.phase("propagate"):
                output = self.points.run(block, self.forwards[index].waiting_for.copy())
                self.witness.see(index, AFTER, output)
        errors = self.witness.judge()
        if errors:
            self.state.block_records.setdefault(block.name, {}).update(errors)

    def say_what_was_not_compared(self) -> None:
        """Warn once of what the original model's inputs are not known of."""
        notes = [r.note for r in self.state.ranks.gather(note=[self.lost, sorted(self.unpaired)])]
        lost, unpaired = sum(n for n, _ in notes), {name for _, names in notes for name in names}
        if lost:
            logger.warning(
                "%d of %d calibration batches go another way through the compressed model than through the original: "
                "from there on nothing of theirs is corrected. If these are many, state error_correction=0.",
                lost, len(self.masks),
            )  # fmt: skip
        if unpaired:
            logger.warning(
                "%d layers (%s, ...) get tokens that the original model's router does not send them: "
                "nothing of these is corrected. Nothing needs to be done about it.", len(unpaired), min(unpaired),
            )  # fmt: skip

    def _say(self, block: Block, phase: str) -> None:
        self.on_progress(Progress(self.done, len(self.state.blocks), block.label, phase))
