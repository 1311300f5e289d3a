"""Compressing a checkpoint on disk to another, without a model in memory."""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpress.checkpoints.directory import check_destination
from bitpress.checkpoints.journal import resumable_directory
from bitpress.checkpoints.layout import ShardWriter
from bitpress.checkpoints.planned import plan_checkpoint, scratch_directory
from bitpress.checkpoints.saving import Companions, write_companions
from bitpress.checkpoints.skeleton import Skeleton, skeleton_of
from bitpress.pipelines import infer_pipeline
from bitpress.pipelines.tensors import goes_by_tensors, run_by_tensors
from bitpress.report.progress import progress_display
from bitpress.report.summary import summarize
from bitpress.session import Recipe, Session

LIBRARIES = ("bitpress", "torch", "transformers", "compressed-tensors")


@torch.no_grad()
def compress_on_disk(
    source: str | os.PathLike[str],
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    *,
    beside: Any = None,
    sequential_targets: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    resume: bool = True,
    progress: bool | None = None,
) -> nn.Module | None:
    """Quantize a checkpoint's weights, each by itself, from its files to those of another.

    The files are those that ``oneshot`` writes of the model in memory, byte for byte. A run that was killed goes on
    where it was, if it is called again with the same arguments.

    Args:
        source: the directory of a transformers model.
        recipe: of QuantizationModifiers.
        output_dir: where to.
        beside: the tokenizer or processor, saved beside it.
        sequential_targets: see :func:`bitpress.oneshot`.
        trust_remote_code: let transformers run code that comes with a checkpoint.
        resume: False starts over, whatever an earlier run has left.
        progress: show it in the terminal; by default if there is one.

    Returns:
        The model on the meta device, its layers with their schemes; None, with nothing written, if the recipe or the
        model needs it in memory.

    Raises:
        BitpressError: as ``oneshot``; a file that is damaged or cannot be written to.
    """
    path = Path(source)
    if not path.is_dir() or not all(m.__class__.__name__ == "QuantizationModifier" for m in recipe.modifiers):
        return None
    skeleton = skeleton_of(path, trust_remote_code=trust_remote_code)
    if skeleton is None:
        return None
    session = Session(skeleton.model, recipe, pipeline="datafree", sequential_targets=sequential_targets)
    session.check()
    infer_pipeline("datafree", session.state, recipe.modifiers, has_data=False)
    if not goes_by_tensors(session.state, recipe.modifiers):
        return None
    with scratch_directory() as scratch:
        plan = plan_checkpoint(skeleton, session.state.schemes, Path(scratch))
        if plan is None:
            return None
        out = check_destination(output_dir, overwrite=True)
        with resumable_directory(out, _facts(skeleton, path, recipe), resume=resume) as (draft, journal):
            plan.write_beside(draft)
            with ShardWriter(draft, plan.layout) as writer, progress_display(1, show=progress) as on_progress:
                stored = run_by_tensors(session.state, skeleton, plan, writer, journal, on_progress)
            session.stored_bytes = stored
            write_companions(Companions(recipe.to_yaml(), beside, summarize(session, None)), draft)
    return skeleton.model


def _facts(skeleton: Skeleton, path: Path, recipe: Recipe) -> dict[str, Any]:
    """What decides about the bytes that will be written."""
    return {
        "model": skeleton.shards.facts(),
        "config": (path / "config.json").read_text(),
        "recipe": recipe.to_yaml(),
        "version": {name: version(name) for name in LIBRARIES},
    }
