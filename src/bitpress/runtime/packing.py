"""A quantized model's layers swapped for packed ones, and back."""

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from bitpress.checkpoints.attached import attached_layers, packed_weight
from bitpress.checkpoints.readers import is_read_by_its_parent
from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear
from bitpress.runtime.kernels import kernel_for, kernel_in_bfloat16, no_kernel
from bitpress.runtime.layers import Choose, PackedLayer, pack_layer, unpack_layer

logger = logging.getLogger(__name__)


def pack(model: nn.Module, *, compute_dtype: torch.dtype | None = None, exact: bool = False) -> nn.Module:
    """Make the quantized layers of a model hold packed weights only, and compute from these, in place.

    A bfloat16 layer runs on torch's kernels for packed weights, where one takes its scheme; its results differ from the
    dense layer's by the rounding of bfloat16. All other layers dequantize their weight for each product, one at a
    time, and give the dense layer's results bit for bit.

    Args:
        model: what ``oneshot`` returned, or ``bitpress.load``.
        compute_dtype: ``torch.bfloat16`` lets the layers of a model of another dtype run on the kernels, too.
        exact: use no kernel.

    Returns:
        The model, whose dense weights of quantized layers are freed. ``bitpress.save`` and ``save_pretrained`` write it
        as they wrote the dense one.

    Raises:
        BitpressError: no layer is quantized, a weight was changed since it was, or the arguments are of no use; the
            model is as it was.
    """
    choose = chosen(compute_dtype, exact=exact)
    layers = attached_layers(model)
    if not layers:
        raise BitpressError("no layer of the model is quantized: compress it with oneshot, or load a compressed one.")
    fresh = {name: layer for name, layer in layers.items() if not isinstance(layer, PackedLayer)}
    names = packable(model, fresh)
    weights = {name: packed_weight(name, fresh[name]) for name in names}  # all, before one is changed
    for name in names:
        pack_layer(fresh[name], weights.pop(name), choose)
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Give the layers of a packed ``model`` their dense weights again, bit for bit, in place."""
    for layer in list(model.modules()):
        if isinstance(layer, PackedLayer):
            unpack_layer(layer)
    return model


def chosen(compute_dtype: torch.dtype | None, *, exact: bool) -> Choose:
    """Which kernels may be used.

    Raises:
        BitpressError: the arguments are of no use.
    """
    if compute_dtype is None:
        return no_kernel if exact else kernel_for
    if exact or compute_dtype != torch.bfloat16:
        raise BitpressError(
            f"compute_dtype={compute_dtype}{' with exact=True' if exact else ''}: kernels compute in torch.bfloat16; "
            "leave it out for the model's own dtype, or say exact=True alone for none."
        )
    return kernel_in_bfloat16


def packable(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of the quantized ``layers`` whose weights can be packed; it is said which stay dense."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    packed = []
    left: dict[str, list[str]] = {}
    for name in layers:
        layer = modules.get(name)
        if layer is None or isinstance(layer, ExpertLinear):
            why = "they are parts of a parameter of all experts"
        elif uses[id(layer.weight)] > 1:
            why = "other modules share their weights"
        elif is_read_by_its_parent(model, name):
            why = "the model's own code uses their weights"
        else:
            packed.append(name)
            continue
        left.setdefault(why, []).append(name)
    for why, names in left.items():
        message = "%d quantized layers (%s first) stay dense, because %s. They compute the same, at full size."
        logger.warning(message, len(names), names[0], why)
    return packed
