"""What transformers can do with a layer whose weight is packed, and so absent until the layer is called."""

import inspect
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def is_read_by_its_parent(model: nn.Module, name: str) -> bool:
    """True if the code around a layer uses its weight itself, as Mamba's mixer does that of ``dt_proj``."""
    owner, _, child = name.rpartition(".")
    try:
        source = inspect.getsource(type(model.get_submodule(owner)))
    except (AttributeError, OSError, TypeError):
        return False  # a layer of fused experts, or code without a source
    return re.search(rf"self\.{re.escape(child)}\.weight\b", source) is not None


def initializer_needs_weights(model: Any, layers: Collection[str]) -> str | None:
    """The class of module whose initializing by transformers, part of every load, fails without these weights."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for name in layers:
        try:
            skeleton.get_submodule(name)._parameters.pop("weight", None)
        except AttributeError:
            continue  # a layer of fused experts
    for module in skeleton.modules():
        try:
            skeleton._init_weights(module)
        except AttributeError as error:
            if "weight" in str(error):
                return type(module).__name__
    return None
