"""All of the model at once: for models without blocks, or by choice.

Every layer is solved from what the unquantized model feeds it. The model is run a second time only for the ranges of
static activations, with all new weights.
"""

from collections.abc import Sequence

from bitpress.checkpoints.changes import Changes
from bitpress.modifiers import Modifier, State
from bitpress.pipelines.data import CalibrationData
from bitpress.pipelines.solving import (
    OnProgress,
    Progress,
    finish,
    is_held_out,
    make_collector,
    make_range_collector,
    phases_of,
    solve,
    watched,
)
from bitpress.statistics import InputCollector


def run_basic(
    state: State,
    modifiers: Sequence[Modifier],
    data: CalibrationData,
    changes: Changes,
    on_progress: OnProgress,
) -> None:
    """Run every batch through the model, then solve block after block."""
    layers = {name: layer for block in state.blocks for name, layer in block.layers.items()}
    collector = make_collector(state, modifiers, layers)
    ranges = make_range_collector(state, modifiers, state.blocks)
    if collector.wants_any or not ranges.wants_any:
        _calibrate(state, collector, data, on_progress)
    for index, block in enumerate(state.blocks):
        say = phases_of(block, index, len(state.blocks), on_progress)
        statistics = {name: s for name, s in collector.statistics.items() if name in block.layers}
        state.quantized = {}
        with changes.of(block, state.quantized), state.watch.phase("solve"):
            solve(state, modifiers, block, statistics, say)
    if ranges.wants_any:
        with changes.applied(state.model):
            _calibrate(state, ranges, data, on_progress)
    for block in state.blocks:
        of_block = {name: s for name, s in ranges.statistics.items() if name in watched(state, block)}
        finish(state, modifiers, block, of_block, {})


def _calibrate(state: State, collector: InputCollector, data: CalibrationData, on_progress: OnProgress) -> None:
    with collector.watching(), state.watch.phase("calibrate"):
        mine = list(state.ranks.mine(len(data.batches)))
        for done, index in enumerate(mine):
            batch = data.batches[index]
            on_progress(Progress(done, len(mine), "", "calibrate", "batches"))
            with collector.batch(index, batch.mask(), held_out=is_held_out(index, len(data.batches))):
                state.model(*batch.args, **batch.kwargs)
