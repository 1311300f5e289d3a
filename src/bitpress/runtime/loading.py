"""A model that computes from packed weights, read from its checkpoint."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bitpress import checkpoints
from bitpress.checkpoints import Keep
from bitpress.models.experts import find_layer
from bitpress.quantization import PackedWeight
from bitpress.runtime.layers import Choose, pack_layer
from bitpress.runtime.packing import chosen, packable


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    packed: bool = True,
    compute_dtype: torch.dtype | None = None,
    exact: bool = False,
    **options: Any,
) -> nn.Module:
    """Load what :func:`bitpress.save` wrote.

    Args:
        directory: of the checkpoint.
        model: a module of the architecture that was saved, on the meta device if it should take no memory; it is filled
            and returned. Not needed for a model of transformers.
        packed: keep the quantized layers packed, as :func:`bitpress.runtime.pack` does, without ever unpacking them
            all; False gives dense weights, which equal, bit for bit, those that were saved.
        compute_dtype: see :func:`bitpress.runtime.pack`.
        exact: see :func:`bitpress.runtime.pack`.
        **options: of ``from_pretrained``, where there is no ``model``.

    Returns:
        The model.

    Raises:
        BitpressError: a file is missing or cannot be read, or it does not fit the model; the model is left as it was.
    """
    choose = chosen(compute_dtype, exact=exact)
    keep = Keep(packable, _packing(choose)) if packed else None
    return checkpoints.load(directory, model, keep=keep, **options)


def _packing(choose: Choose) -> Any:
    def put(model: nn.Module, weights: Mapping[str, PackedWeight]) -> None:
        for name, weight in weights.items():
            pack_layer(find_layer(model, name), weight, choose)

    return put
