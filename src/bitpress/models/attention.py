"""``nn.MultiheadAttention`` with an out-projection that is called like any other layer."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class _CallOutProjection(TorchFunctionMode):
    """Computes attention without its out-projection, then calls that."""

    def __init__(self, out_proj: nn.Module) -> None:
        super().__init__()
        self._out_proj = out_proj

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        given = _SIGNATURE.bind(*args, **(kwargs or {}))
        weight = given.arguments["out_proj_weight"]
        # A product with the identity is exact.
        given.arguments["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given.arguments["out_proj_bias"] = None
        heads, shares = func(*given.args, **given.kwargs)
        return self._out_proj(heads), shares


@contextmanager
def called_out_projections(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` every ``nn.MultiheadAttention`` calls its ``out_proj``, so that its hooks run.

    By itself the module passes the weight to a function that does it all, or the layer around it to a fused kernel.
    """
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    own = [m.__dict__.get("forward") for m in attentions]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        if attentions:
            torch.backends.mha.set_fastpath_enabled(False)
        for module in attentions:
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, forward in zip(attentions, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward  # type: ignore[method-assign]


def _forward(module: nn.MultiheadAttention, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _CallOutProjection(module.out_proj):
        return forward(*args, **kwargs)
