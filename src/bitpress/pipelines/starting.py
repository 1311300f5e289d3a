"""Ranks start from the same: what each solves is written to all models."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bitpress.modifiers import State
from bitpress.pipelines.data import CalibrationData

# Values of each parameter that are looked at, and of all token ids.
SAMPLED = 16


@torch.no_grad()
def check_same_start(state: State, data: CalibrationData | None) -> None:
    """Make sure that all ranks have the same model, schemes and data, by samples of them.

    Raises:
        BitpressError: they have not.
    """
    if state.ranks.size == 1:
        return
    state.ranks.agree("the layers and their schemes", {n: s.model_dump_json() for n, s in state.schemes.items()})
    state.ranks.agree("the blocks", [block.name for block in state.blocks])
    state.ranks.agree("the weights", [_sample(p) for p in state.model.parameters() if p.device.type != "meta"])
    if data is not None:
        batches = [[_sample(t) for t in _tensors((b.args, b.kwargs))] for b in data.batches]
        state.ranks.agree("the calibration data", [data.samples, data.tokens, batches])


def _sample(tensor: Tensor) -> list[int | str]:
    flat = tensor.detach().flatten()
    # As bits: NaN is not equal to itself.
    return [len(flat), repr(flat[:: max(1, len(flat) // SAMPLED)].double().tolist())]


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
