"""plan: what a compression would need, without running it."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from bitpress.checkpoints.source import CannotStreamError, open_source
from bitpress.session import Recipe
from bitpress.session.devices import find_device
from bitpress.session.preflight import MODEL, Needs, estimate
from bitpress.session.recipe import RecipeLike
from bitpress.session.session import Session
from bitpress.session.streaming import StreamedSession
from bitpress.session.tensorwise import TensorwiseSession
from bitpress.statistics import Statistic


def plan(
    model: str | os.PathLike[str],
    recipe: RecipeLike,
    *,
    recipe_args: Mapping[str, Any] | None = None,
    num_calibration_samples: int = 512,
    max_seq_length: int = 2048,
    device: torch.device | str | None = None,
    trust_remote_code_model: bool = False,
) -> Needs:
    """What :func:`bitpress.oneshot` of a model on the disk would need; only the headers of its files are read.

    Args:
        model: the path or hub id of a transformers model.
        recipe: see :func:`bitpress.oneshot`.
        recipe_args: see :func:`bitpress.oneshot`.
        num_calibration_samples: sequences.
        max_seq_length: tokens of each.
        device: see :func:`bitpress.oneshot`.
        trust_remote_code_model: let transformers run code that comes with a checkpoint.

    Returns:
        Memory by what takes it, and disk, in bytes. An estimate: which statistics are kept is known when mappings are
        proven, and every layer is counted as if it had its Gram matrix.

    Raises:
        BitpressError: what :func:`bitpress.oneshot` would refuse of the model, its files or the recipe.
    """
    steps = Recipe.of(recipe, recipe_args)
    place = find_device(device)
    source = open_source(model, trust_remote_code=trust_remote_code_model)
    with suppress(CannotStreamError):
        by_tensors = TensorwiseSession(source, steps)
        by_tensors.check()
        return by_tensors.needs
    session: Session = StreamedSession(source, steps, device=place)
    streamed, disk = True, 0
    try:
        session.check()
        disk = session.plan.layout.nbytes  # type: ignore[attr-defined]
    except CannotStreamError:
        session = Session(source.model, steps, on_disk=True)
        session.check()
        streamed = False
    first = next(iter(session.state.blocks)).module.parameters()
    width = getattr(source.model.config, "hidden_size", 0)
    needs = estimate(
        session.state,
        dict.fromkeys(session.state.schemes, Statistic.GRAM),
        tokens=num_calibration_samples * max_seq_length,
        per_token=width * next(first).element_size(),
        streamed=streamed,
        disk=disk,
        learns=any(modifier.learns_blocks for modifier in steps.modifiers),
        device=place,
    )
    return needs if streamed else replace(needs, memory={MODEL: source.shards.nbytes, **needs.memory})
