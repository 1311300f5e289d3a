"""Solving without data: for recipes that need no statistics."""

from collections.abc import Sequence

from bitpress.checkpoints.changes import Changes
from bitpress.modifiers import Modifier, State
from bitpress.pipelines.solving import OnProgress, Progress, finish, solve


def run_datafree(state: State, modifiers: Sequence[Modifier], changes: Changes, on_progress: OnProgress) -> None:
    """Solve block after block; the model's forward is never run."""
    for index, block in enumerate(state.blocks):
        on_progress(Progress(index, len(state.blocks), block.label, "solve"))
        state.quantized = {}
        with changes.of(block, state.quantized), state.watch.phase("solve"):
            solve(state, modifiers, block, {})
        finish(state, modifiers, block, {}, {})
