"""Finding mappings by running a block: which layers share an input, and which one before them absorbs its scale."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.models.blocks import Block
from bitpress.models.linears import is_linear
from bitpress.models.proofs import Claim, Proof, prove
from bitpress.models.smoothing import out_channels


@dataclass(frozen=True)
class Discovery:
    """A mapping that was found, and proven.

    Attributes:
        smooth: name of the layer that absorbs the scale.
        balance: names of all linear layers that receive the scaled tensor.
        proof: what was measured.
    """

    smooth: str
    balance: tuple[str, ...]
    proof: Proof


def discover(block: Block, seed: int = 0) -> list[Discovery]:
    """All mappings of a block that hold, in the order in which their balance layers run.

    Layers that receive the same tensor are scaled together. Each norm or linear layer that ran before them, the latest
    first, is a candidate for absorbing the scale; the first that passes the proof does. A layer absorbs one scale only.

    Args:
        block: with the call of the dry run that is tried.
        seed: of the random scales.
    """
    ran, groups = _watch(block)
    found: list[Discovery] = []
    taken: set[str] = set()
    for first, names in groups:
        if not any(name in block.layers for name in names):
            continue
        balance = [ran[name] for name in names]
        for smooth in _candidates(ran, first, names):
            if smooth in taken:
                continue
            proof = prove(block, Claim(ran[smooth], balance), seed)
            if proof.holds:
                found.append(Discovery(smooth, tuple(names), proof))
                taken.add(smooth)
                break
    return found


def structure(block: Block) -> tuple[Any, ...]:
    """Equal for blocks of one kind: the same modules, by name and class, with parameters of the same shapes."""
    return tuple(
        (
            name.removeprefix(block.name),
            type(module).__name__,
            *(tuple(p.shape) for p in module.parameters(recurse=False)),
        )
        for name, module in block.named_modules()
    )


def _candidates(ran: dict[str, nn.Module], first: int, names: Sequence[str]) -> Iterator[str]:
    """Layers that ran before the group and have output channels, the latest first."""
    before = list(ran)[:first]
    yield from (name for name in reversed(before) if name not in names and out_channels(ran[name]) is not None)


@torch.no_grad()
def _watch(block: Block) -> tuple[dict[str, nn.Module], list[tuple[int, list[str]]]]:
    """The layers in the order in which they first ran, and the linear ones grouped by the tensor they received.

    Layers that ran more than once, or never, are left out: one scale could not be moved for all calls.
    """
    order: dict[str, nn.Module] = {}
    runs: dict[str, int] = {}
    inputs: dict[tuple[Any, ...], tuple[int, list[str]]] = {}
    kept: list[Tensor] = []  # an address is not given to another tensor while the first is kept

    def watch(name: str, layer: nn.Module) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            runs[name] = runs.get(name, 0) + 1
            x = args[0] if args else next(iter(kwargs.values()))
            if is_linear(layer):
                kept.append(x)
                key = (x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version)
                inputs.setdefault(key, (len(order), []))[1].append(name)
            order.setdefault(name, layer)

        return observe

    layers = [(n, m) for n, m in block.named_modules() if n != block.name and out_channels(m) is not None]
    handles = [m.register_forward_pre_hook(watch(n, m), with_kwargs=True) for n, m in layers]
    try:
        block.calls[0].of(block.module)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: layer for name, layer in order.items() if runs[name] == 1}
    position = {name: index for index, name in enumerate(once)}
    groups = [[n for n in names if n in once] for _, names in inputs.values()]
    return once, sorted((min(position[n] for n in names), names) for names in groups if names)
