"""Solving without data: for recipes that need no statistics."""

from collections.abc import Sequence

from bitpress.checkpoints.changes import Changes
from bitpress.models.linears import weight_matrix
from bitpress.modifiers import Modifier, State
from bitpress.pipelines.solving import OnProgress, finish, make_notes, phases_of, solve, take_notes
from bitpress.solvers import check_finite


def run_datafree(state: State, modifiers: Sequence[Modifier], changes: Changes, on_progress: OnProgress) -> None:
    """Solve block after block; the model's forward is never run."""
    for index, block in enumerate(state.blocks):
        say = phases_of(block, index, len(state.blocks), on_progress)
        noted = changes.notes(block.name)
        if noted is not None:
            take_notes(state, block, noted)
            continue
        first = len(state.mapping_records)
        state.quantized = {}
        with block.present():
            for name, layer in block.layers.items():
                check_finite(weight_matrix(layer), name)
            with changes.of(block, state.quantized), state.watch.phase("solve"):
                solve(state, modifiers, block, {}, say)
            finish(state, modifiers, block, {}, {})
            say("write")
            changes.finish(block, {}, make_notes(state, block, first))
