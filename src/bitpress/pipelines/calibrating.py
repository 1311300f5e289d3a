"""The state in which a model is calibrated; its own again afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bitpress.models.attention import called_out_projections
from bitpress.models.experts import every_token


@contextmanager
def calibrating(model: nn.Module, *, all_experts: bool = True, one_by_one: bool = True) -> Iterator[None]:
    """Inside the ``with``: evaluation mode, no gradients, no cache, and forwards that use every layer one by one.

    Args:
        model: the model.
        all_experts: let experts that are watched see every token, not only those that the router sends them.
        one_by_one: False lets the model multiply by all experts in one kernel of its own, where no layer is watched.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with ExitStack() as stack:
            for config in _configs(model):
                # A cache would grow each time a block runs; fused kernels do not tell one expert from another.
                stack.enter_context(_setting(config, "use_cache", value=False))
                # The public name would set it in the parts' configs too.
                if one_by_one:
                    stack.enter_context(_setting(config, "_experts_implementation_internal", value="eager"))
            stack.enter_context(called_out_projections(model))
            stack.enter_context(every_token(model, enabled=all_experts))
            stack.enter_context(torch.no_grad())
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _configs(model: nn.Module) -> list[Any]:
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if config is not None}.values())


@contextmanager
def _setting(config: Any, name: str, *, value: Any) -> Iterator[None]:
    """A setting of the config for the time of the ``with``, if it has it."""
    before = getattr(config, name, None)
    if before is None or before == value:
        yield
        return
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)
