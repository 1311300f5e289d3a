"""Where a model is computed."""

import logging
import os
from typing import Any

import torch
from torch import nn

from bitpress.errors import BitpressError
from bitpress.memory import free_memory

logger = logging.getLogger(__name__)

# Of a device's free memory: what is left is for activations, statistics and solving.
SHARE_FOR_MODEL = 0.7


def find_device(stated: torch.device | str | None) -> torch.device:
    """The device that the user states, or the one that this process should use.

    Raises:
        BitpressError: there is no such device here.
    """
    if stated is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        # As tensors have it: "cuda" is the current one of several.
        device = torch.empty(0, device=stated).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BitpressError(f"device={stated!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise BitpressError('device="meta" computes nothing: state "cpu" or "cuda".')
    return device


def move(model: nn.Module, device: torch.device, *, stated: bool) -> nn.Module:
    """The model on the device; where it has no room, and nobody ``stated`` it, the model stays on the CPU.

    Raises:
        BitpressError: there is no room for the model on the stated device.
    """
    if device.type == "cpu":
        return model
    needed, free = parameters_bytes(model), free_memory(device)
    if needed > SHARE_FOR_MODEL * free:
        sizes = f"the model takes {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that {device} has free"
        if stated:
            raise BitpressError(
                f'{sizes}, which leaves too little for its compression: state device="cpu", or a recipe that streams '
                "and output_dir, so that one block at a time is there."
            )
        logger.warning(
            "%s, which leaves too little for its compression: the CPU does it. With output_dir, and a recipe that "
            "streams, one block at a time is on the device.", sizes,
        )  # fmt: skip
        return model
    return model.to(device)


def parameters_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and persistent buffers, shared ones once."""
    tensors: dict[int, Any] = {t.data_ptr(): t for t in model.state_dict().values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
