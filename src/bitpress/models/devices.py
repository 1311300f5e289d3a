"""Where modules are."""

import torch
from torch import nn


def device_of(*modules: nn.Module) -> torch.device:
    """The device of the first parameter that any of the modules has, in their order; the CPU if none has one."""
    parameters = (p for module in modules for p in module.parameters())
    return next((p.device for p in parameters), torch.device("cpu"))
