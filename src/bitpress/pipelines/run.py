"""Choosing a pipeline, the dry run, and running it."""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitpress.checkpoints.changes import Changes
from bitpress.errors import BitpressError
from bitpress.models.blocks import split
from bitpress.modifiers import Modifier, State
from bitpress.modifiers.base import nearest
from bitpress.pipelines.basic import run_basic
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.pipelines.datafree import run_datafree
from bitpress.pipelines.paused import PausedForward, PausePoints
from bitpress.pipelines.sequential import run_sequential
from bitpress.pipelines.solving import Progress

logger = logging.getLogger(__name__)

PIPELINES = ("sequential", "basic", "datafree")


def infer_pipeline(named: str | None, state: State, modifiers: Sequence[Modifier], *, has_data: bool) -> str:
    """The pipeline that the user named, or the one that the recipe and the model need.

    Raises:
        BitpressError: an unknown name, or statistics are needed and there is no data.
    """
    if named is not None and named not in PIPELINES:
        raise BitpressError(f"pipeline {named!r} is not known{nearest(named, list(PIPELINES))}")
    places = [*state.schemes, *state.taps]
    asking = [type(m).__name__ for m in modifiers if any(m.required_statistics(state, n) for n in places)]
    # Rounding is learned from the outputs of single blocks.
    learning = [type(m).__name__ for m in modifiers if m.learns_blocks]
    asking += learning
    measuring = [type(m).__name__ for m in modifiers if m.measured_layers(state)]
    if (asking and named == "datafree") or ((asking or measuring) and not has_data):
        why = "the datafree pipeline has none" if has_data else "no dataset was given"
        raise BitpressError(f"{(asking or measuring)[0]} needs calibration data, but {why}: give oneshot a dataset.")
    if learning and named not in (None, "sequential"):
        raise BitpressError(f'{learning[0]} works block after block: leave out pipeline="{named}".')
    if named is not None:
        return named
    if not asking:
        return "datafree"
    return "sequential" if len(state.blocks) > 1 or learning else "basic"


def dry_run(state: State, probe: Batch) -> list[str]:
    """Run one small batch, and record every call of every block in ``block.calls``.

    A block that is not called, though its layers are, is replaced by its parts in ``state.blocks``.

    Returns:
        The names of the blocks in the order of their calls; a block that is called twice is there twice.

    Raises:
        BitpressError: the model's forward does not take the batch; the arguments that it lacks are named.
    """
    while True:
        order, ran = _try(state, probe)
        cut = [split(b) if not b.calls and ran & b.layers.keys() else [b] for b in state.blocks]
        if sum(map(len, cut)) == len(state.blocks):
            break
        state.blocks = [part for parts in cut for part in parts]
        for block in state.blocks:
            block.forget()
    for block in state.blocks:
        if not block.calls:
            logger.warning(
                "%s did not run in the dry run: its layers are quantized without data, unless a later batch runs it. "
                "Give data that reaches it, or add them to ignore.",
                block.label,
            )
    return order


def _try(state: State, probe: Batch) -> tuple[list[str], set[str]]:
    """One run: the order of the blocks' calls, and the layers that were called."""
    points = PausePoints(state.blocks)
    order: list[str] = []
    ran: set[str] = set()
    layers = [(name, layer) for block in state.blocks for name, layer in block.layers.items()]
    handles = [layer.register_forward_pre_hook(_noting(name, ran)) for name, layer in layers]
    forward = PausedForward(state.model, probe.args, probe.kwargs)
    try:
        with points.installed():
            forward.resume()
            while forward.at is not None:
                block, call = forward.at, forward.waiting_for
                block.calls.append(call.copy())
                order.append(block.name)
                with block.present():
                    output = points.run(block, call)
                if block.first_output is None:
                    block.first_output = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
                forward.resume(output)
    except BitpressError:
        raise
    except (TypeError, ValueError) as error:
        raise BitpressError(_refusal(state.model, probe, error)) from error
    finally:
        forward.stop()
        for handle in handles:
            handle.remove()
    return order, ran


def _noting(name: str, ran: set[str]) -> Callable[[nn.Module, Any], None]:
    return lambda _, __: ran.add(name)


def _refusal(model: nn.Module, probe: Batch, error: Exception) -> str:
    given = [*(f"argument {i + 1}" for i in range(len(probe.args))), *probe.kwargs]
    parameters = list(inspect.signature(model.forward).parameters.values())[len(probe.args) :]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    lacking = [
        p.name for p in parameters if p.default is p.empty and p.kind not in optional and p.name not in probe.kwargs
    ]
    needs = f"its forward needs {', '.join(lacking)}, which the data does not give" if lacking else str(error)
    return (
        f"{type(model).__name__} cannot run the first calibration batch ({', '.join(given)}): {needs}. Give oneshot a "
        "dataset of dictionaries with all that the model's forward takes."
    )


def run(
    pipeline: str,
    state: State,
    modifiers: Sequence[Modifier],
    data: CalibrationData | None,
    order: Sequence[str],
    changes: Changes,
    on_progress: Callable[[Progress], None],
) -> None:
    """Solve all blocks. The model is as it was afterwards; what is new is in ``changes``."""
    if pipeline == "datafree":
        run_datafree(state, modifiers, changes, on_progress)
        return
    if data is None:
        raise BitpressError(f"the {pipeline} pipeline needs a dataset.")
    if pipeline == "basic":
        run_basic(state, modifiers, data, changes, on_progress)
    else:
        run_sequential(state, modifiers, data, order, changes, on_progress)
