"""What transformers can do with a layer whose weight is packed, and so absent until the layer is called."""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn


def is_read_by_its_parent(model: nn.Module, name: str) -> bool:
    """True if the code around a layer uses its weight itself, as Mamba's mixer does that of ``dt_proj``."""
    owner, _, child = name.rpartition(".")
    try:
        kind: Any = type(model.get_submodule(owner))
    except AttributeError:
        return False  # a layer of fused experts
    source = _source(kind)
    return re.search(rf"self\.{re.escape(child)}\.weight\b", source) is not None


@functools.cache
def _source(kind: Any) -> str:
    """The code of a class's own methods: that of the class itself is found only by parsing all of its file."""
    return "".join(map(_source_of, filter(inspect.isfunction, vars(kind).values())))


def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def initializer_needs_weights(model: Any, layers: Collection[str]) -> str | None:
    """The class of module whose initializing by transformers, part of every load, fails without these weights.

    None also where that cannot be found out: it is for a warning, which must not keep a model from being saved.
    """
    config = copy.deepcopy(model.config)
    if isinstance(config.dtype, str):
        config.dtype = getattr(torch, config.dtype)  # saving has left its name there
    try:
        with torch.device("meta"):
            skeleton = type(model)(config)
    except Exception:
        return None
    for name in layers:
        try:
            skeleton.get_submodule(name)._parameters.pop("weight", None)
        except AttributeError:
            continue  # a layer of fused experts
    return _failing(skeleton, skeleton._init_weights)


def _failing(module: nn.Module, initialize: Callable[[nn.Module], None]) -> str | None:
    """The class of the first module that cannot be initialized; a model within a model has its own initializer."""
    initialize = getattr(module, "_init_weights", initialize)
    for child in module.children():
        failing = _failing(child, initialize)
        if failing:
            return failing
    try:
        initialize(module)
    except Exception as error:
        if isinstance(error, AttributeError) and "weight" in str(error):
            return type(module).__name__
    return None
