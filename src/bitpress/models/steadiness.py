"""Finding what makes a block give another output each time it runs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitpress.models.blocks import Block


@torch.no_grad()
def first_unsteady(block: Block) -> tuple[str, nn.Module] | None:
    """The first module that gives another output for the same input in a second run; None if there is none.

    The block itself is given where what it does by itself, outside of its modules, is random.
    """
    first, second = _record(block), _record(block)
    for name, (given, output) in first.items():
        again = second.get(name)
        if again is not None and _equal(given, again[0]) and not _equal(output, again[1]):
            return name, dict(block.named_modules())[name]
    return None


def _record(block: Block) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What each module was given and gave in its first call, the innermost first."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def watch(name: str) -> Any:
        def observe(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.setdefault(name, (_tensors((args, kwargs)), _tensors(output)))

        return observe

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in block.module.named_modules(prefix=block.name)
    ]
    try:
        block.calls[0].copy().of(block.module)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensors(values: Any) -> list[Tensor]:
    return [t.clone() for t in tree_leaves(values) if isinstance(t, Tensor)]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
