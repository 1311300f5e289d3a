"""Looking at a model's mappings without compressing it."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bitpress.checkpoints.pretrained import load_named
from bitpress.errors import BitpressError
from bitpress.models.blocks import find_blocks
from bitpress.models.devices import device_of
from bitpress.models.experts import find_layer
from bitpress.modifiers import AWQMapping, QuantizationModifier, State
from bitpress.modifiers.resolving import resolve_mappings
from bitpress.pipelines import dry_run
from bitpress.pipelines.calibrating import calibrating
from bitpress.pipelines.data import prepare
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.report.mappings import MappingReport, report_mappings

TOKENS = 32


def find_mappings(  # noqa: PLR0913
    model: nn.Module | str | os.PathLike[str],
    dataset: Any = None,
    *,
    mappings: Sequence[AWQMapping] | None = None,
    targets: Sequence[str] = ("Linear", "Conv1D"),
    ignore: Sequence[str] = (),
    tokenizer: Any = None,
    sequential_targets: Sequence[str] | None = None,
    seed: int = 42,
    trust_remote_code_model: bool = False,
) -> MappingReport:
    """Find and prove the mappings that AWQ would use on a model; the model is left as it was.

    Args:
        model: a module, or the path or hub id of a transformers model.
        dataset: see :func:`bitpress.oneshot`; one batch is used. Without it, random tokens are.
        mappings: to be proven, instead of those that are registered or discovered.
        targets: layers that are to be quantized.
        ignore: layers that are not.
        tokenizer: for a dataset of texts.
        sequential_targets: see :func:`bitpress.oneshot`.
        seed: of the random scales.
        trust_remote_code_model: let transformers run code that comes with a checkpoint.

    Raises:
        BitpressError: a mapping of yours does not hold; or the model needs data of another kind than tokens.
    """
    if not isinstance(model, nn.Module):
        model = load_named(model, trust_remote_code=trust_remote_code_model)
    data = _random_tokens(model, seed) if dataset is None else dataset
    batches = prepare(data, tokenizer=tokenizer, num_calibration_samples=1, model=model)
    state = _state(model, targets, ignore, sequential_targets, seed)
    with calibrating(model):
        dry_run(state, batches.probe().to(device_of(model)))
        found = resolve_mappings(model, state.blocks, stated=mappings, seed=seed)
    return report_mappings(model, state.blocks, found)


def _state(
    model: nn.Module,
    targets: Sequence[str],
    ignore: Sequence[str],
    sequential_targets: Sequence[str] | None,
    seed: int,
) -> State:
    # Any scheme will do: it says which layers are targeted.
    weights = QuantizationArgs(num_bits=8, strategy="channel")
    scheme = QuantizationScheme(targets=list(targets), weights=weights)
    modifier = QuantizationModifier(scheme=scheme, ignore=list(ignore))
    if tuple(targets) != ("Linear", "Conv1D"):
        modifier = QuantizationModifier(scheme=scheme, targets=list(targets), ignore=list(ignore))
    schemes = modifier.resolve_schemes(model)
    layers = {name: find_layer(model, name) for name in schemes}
    return State(model, schemes, {}, find_blocks(model, layers, sequential_targets), seed=seed)


def _random_tokens(model: nn.Module, seed: int) -> list[list[int]]:
    """One sequence of token ids."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    if vocabulary is None:
        raise BitpressError(
            f"{type(model).__name__} has no embedding of tokens, so that no data can be made up: give a dataset, such "
            "as a list with one batch of what its forward takes."
        )
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocabulary, (TOKENS,), generator=generator).tolist()
    return [ids]
