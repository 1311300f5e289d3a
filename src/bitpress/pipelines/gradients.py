"""What passes with gradients share: blocks that keep their inputs only, and what the model predicts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bitpress.models.blocks import Block
from bitpress.pipelines.data import Batch

Forward = Callable[..., Any]
# Of Adam, for the logarithms of scales' factors.
BETAS = (0.9, 0.99)


@contextmanager
def replaced_forwards(blocks: Sequence[Block], replacement: Callable[[Block, Forward], Forward]) -> Iterator[None]:
    """Inside the ``with`` each block's forward is what ``replacement`` makes of it."""
    own = {block.name: block.module.__dict__.get("forward") for block in blocks}
    try:
        for block in blocks:
            block.module.forward = replacement(block, block.module.forward)
        yield
    finally:
        for block in blocks:
            forward = own[block.name]
            if forward is None:
                block.module.__dict__.pop("forward", None)
            else:
                block.module.forward = forward


def keeping_inputs(block: Block, forward: Forward) -> Forward:
    """The same forward, of which only the inputs are kept; the rest is computed again when gradients ask for it."""
    if not block.name or block.name in block.layers:
        return forward
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def own_gradients_kept(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` no parameter has a gradient; afterwards all have their own again, and want what they did."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def predictions(output: Any, batch: Batch) -> Tensor | None:
    """The logits of a model's output where there is a token, (rows, classes), float32; None if it has no logits."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[-1] <= 1:
        return None
    mask = batch.mask()
    rows = logits[mask] if mask is not None and mask.shape == logits.shape[:-1] else logits
    return rows.reshape(-1, rows.shape[-1]).float()


def first_tensor(output: Any, *, with_gradient: bool = False) -> Tensor | None:
    """The first tensor of floats in a model's output, float32."""
    found = first_floats(output, with_gradient=with_gradient)
    return None if found is None else found.float()


def first_floats(output: Any, *, with_gradient: bool = False) -> Tensor | None:
    """The same, as it is."""
    leaves = (x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())
    return next((x for x in leaves if x.requires_grad or not with_gradient), None)
