"""A linear layer whose weight is packed, and dense only while it is used.

The layer stays the object that it is, with its name, bias, scheme, hooks and the code of its class; only its weight
is made from the packed one whenever it is asked for. So any code that uses the layer computes what it did, and what
knows a faster way (:mod:`bitpress.runtime.int4`) replaces the product alone.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import Tensor, nn

from bitpress.checkpoints.attached import attach, scheme_of, static_activations
from bitpress.models.linears import as_parameter
from bitpress.quantization import PackedWeight, quantizes_activations
from bitpress.runtime.dequantizing import dequantize


class PackedLayer(nn.Module):
    """Stands before a layer's own class; dequantizes the whole weight for each product.

    Attributes:
        own_class: the layer's own.
        weight_dtype: of the dense weight that the packed one stands for.
        choose: gives the kind of layer for a weight: asked again when the layer is moved or cast.
    """

    own_class: ClassVar[type[nn.Module]]
    # The buffers that hold the weight; all are in the state dict.
    HELD: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale")

    weight_dtype: torch.dtype
    choose: "Choose"
    weight_shape: tuple[int, int]
    _stated: str
    _activations: bool

    @staticmethod
    def fits(weight: PackedWeight) -> bool:
        """True if this way of computing takes the weight on the device where it is."""
        del weight
        return True

    def hold(self, weight: PackedWeight) -> None:
        """Keep the weight, in this class's buffers."""
        self.register_buffer("weight_packed", weight.packed)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_zero_point", None if weight.args.symmetric else weight.zero_point)
        self.register_buffer("weight_global_scale", weight.global_scale)

    def packed_weight(self) -> PackedWeight:
        """The weight as a checkpoint stores it."""
        held = self._buffers
        scale, zero_point = cast(Tensor, held["weight_scale"]), held["weight_zero_point"]
        zero_point = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
        packed = cast(Tensor, held["weight_packed"])
        args = scheme_of(self).weights
        return PackedWeight(packed, self.weight_shape, scale, zero_point, args, held["weight_global_scale"])

    def matrix(self) -> Tensor:
        """The dense weight, (out, in)."""
        held = self._buffers
        packed, scale = cast(Tensor, held["weight_packed"]), cast(Tensor, held["weight_scale"])
        zero_point, global_scale = held["weight_zero_point"], held["weight_global_scale"]
        rows, columns = self.weight_shape
        args = self._stated
        dense: Tensor = dequantize(packed, scale, zero_point, global_scale, rows, columns, args, self.weight_dtype)
        return dense

    @property
    def weight(self) -> Tensor:
        """The dense weight as the layer's class has it: a new tensor each time."""
        return as_parameter(self, self.matrix())

    def empty_weight(self) -> Tensor:
        """Like :attr:`weight`, on the meta device."""
        return as_parameter(self, torch.empty(self.weight_shape, dtype=self.weight_dtype, device="meta"))

    def product(self, x: Tensor) -> Tensor:
        """The layer's own forward."""
        computed: Tensor = super().forward(x)
        return computed

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer computes, activations quantized as compressed-tensors does it."""
        if not self._activations or not getattr(self, "quantization_enabled", True):
            return self.product(x)
        scheme = scheme_of(self)
        if scheme.input_activations is not None:
            x = forward_quantize(self, x, "input", scheme.input_activations)
        y = self.product(x)
        if scheme.output_activations is not None:
            y = forward_quantize(self, y, "output", scheme.output_activations)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast: scales and points keep their dtypes, the weight that they stand for gets the new one."""
        weight = self.packed_weight()
        held = {name: self._buffers.pop(name) for name in self.HELD if name in self._buffers}
        like = fn(torch.empty(0, dtype=self.weight_dtype, device=weight.scale.device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (like.device.type, like.dtype) == (weight.scale.device.type, self.weight_dtype):
            for name, tensor in held.items():
                self.register_buffer(name, None if tensor is None else _keeping_dtype(fn, tensor))
            return self
        self.weight_dtype = like.dtype
        hold(self, moved(weight, like.device), self.own_class, self.choose)
        return self

    def extra_repr(self) -> str:
        """The dense layer's, and what is held."""
        args = scheme_of(self).weights
        return f"{super().extra_repr()}, {args.type}{args.num_bits} packed"


def _keeping_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    made = fn(tensor)
    return made if made.dtype == tensor.dtype else tensor.to(made.device)


def moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """The same weight on a device."""
    scale, zero_point = weight.scale.to(device), weight.zero_point.to(device)
    global_scale = None if weight.global_scale is None else weight.global_scale.to(device)
    packed = weight.packed.to(device)
    return replace(weight, packed=packed, scale=scale, zero_point=zero_point, global_scale=global_scale)


@functools.cache
def _joined(kind: Any, own: Any) -> type[PackedLayer]:
    return type(f"{kind.__name__}_{own.__name__}", (kind, own), {"own_class": own, "__module__": own.__module__})


# A kind of packed layer for a layer of a class, with this packed weight, which stands for a dense one of this dtype.
Choose = Callable[[type[nn.Module], PackedWeight, torch.dtype], type[PackedLayer]]


def hold(layer: nn.Module, weight: PackedWeight, own: type[nn.Module], choose: Choose) -> None:
    """Give a layer that has no weight a packed one, on the device where that is."""
    packed = cast(PackedLayer, layer)
    kind: Any = choose(own, weight, packed.weight_dtype)
    layer.__class__ = _joined(kind, cast(Any, own))
    packed.choose = choose
    packed.weight_shape = weight.shape
    packed._stated = weight.args.model_dump_json()
    packed._activations = quantizes_activations(scheme_of(layer))
    packed.hold(weight)


def pack_layer(layer: nn.Module, weight: PackedWeight, choose: Choose) -> None:
    """Swap the dense weight of a quantized layer for its packed form, in place."""
    dense = layer._parameters.pop("weight")
    assert dense is not None  # noqa: S101 - a layer is packed once
    for name in PackedLayer.HELD:
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    if quantizes_activations(scheme_of(layer)):
        layer.__dict__.pop("forward", None)  # compressed-tensors', which would ask twice for the weight
    cast(PackedLayer, layer).weight_dtype = dense.dtype
    hold(layer, moved(weight, dense.device), type(layer), choose)


def unpack_layer(layer: PackedLayer) -> None:
    """Swap the packed weight of a layer for the dense one, in place."""
    weight, dense = layer.packed_weight(), layer.weight
    for name in layer.HELD:
        layer._buffers.pop(name, None)
    for name in ("weight_dtype", "choose", "weight_shape", "_stated", "_activations"):
        delattr(layer, name)
    layer.__class__ = cast(Any, layer.own_class)
    behind = dict(layer._parameters)
    layer._parameters.clear()
    layer.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
    layer._parameters.update(behind)
    attach(layer, scheme_of(layer), weight, static_activations(layer))
