"""Products with 8-bit weights that have a scale a row, by torch's own kernel, in bfloat16 on CPUs.

It sums x * (q * scale) in float32, with the scale in bfloat16. It reads whole vectors, from addresses that must be
multiples of their size, and does not check: what it is given is fresh memory, and whole vectors wide.
"""

from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType
from torch import Tensor

from bitpress.checkpoints.attached import scheme_of
from bitpress.quantization import PackedWeight, QuantizedWeight
from bitpress.runtime.layers import PackedLayer

# A multiple of every vector's.
COLUMNS = 32

_multiply: Any = torch._weight_int8pack_mm


class Int8Layer(PackedLayer):
    """Integers of 5 to 8 bits on a symmetric grid, with a scale a row or tensor; 8 bits a weight."""

    HELD: ClassVar[tuple[str, ...]] = ("weight_int8", "weight_scales", "weight_scale")

    @staticmethod
    def fits(weight: PackedWeight) -> bool:
        """See the class."""
        args = weight.args
        plain = args.strategy in (QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR)
        if args.type != QuantizationType.INT or not args.symmetric or not plain or weight.shape[1] % COLUMNS:
            return False
        return weight.scale.device.type == "cpu" and bool(weight.scale.bfloat16().isfinite().all())

    def hold(self, weight: PackedWeight) -> None:
        """A weight a byte, and a scale a row."""
        self.register_buffer("weight_int8", weight.unpack().values.clone())
        self.register_buffer("weight_scales", weight.scale.bfloat16().flatten().expand(weight.shape[0]).contiguous())
        # As it is stored, where it is not a bfloat16 a row.
        own = weight.args.strategy == QuantizationStrategy.CHANNEL and weight.scale.dtype == torch.bfloat16
        self.register_buffer("weight_scale", None if own else weight.scale)

    def product(self, x: Tensor) -> Tensor:
        """One product in bfloat16; the bias is added in the input's dtype."""
        values, scales = self.get_buffer("weight_int8"), self.get_buffer("weight_scales")
        rows, columns = self.weight_shape
        flat = x.reshape(-1, columns).to(torch.bfloat16).clone(memory_format=torch.contiguous_format)
        derived = flat.requires_grad and torch.is_grad_enabled()
        product: Any = _Derived.apply if derived else _multiply
        y: Tensor = product(flat, values, scales)
        y = y.view(*x.shape[:-1], rows).to(x.dtype)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._buffers["weight_int8"] = self.get_buffer("weight_int8").clone()  # it may be a part of a mapped file

    def quantized(self) -> QuantizedWeight:
        """The points, and the grid that they are on."""
        own = self._buffers["weight_scale"]
        scale = self.get_buffer("weight_scales").view(-1, 1) if own is None else own
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
        return QuantizedWeight(self.get_buffer("weight_int8"), scale, zero_point, scheme_of(self).weights)

    def packed_weight(self) -> PackedWeight:
        """See :class:`PackedLayer`."""
        return self.quantized().pack()

    def matrix(self) -> Tensor:
        """See :class:`PackedLayer`."""
        return self.quantized().dequantize().to(self.weight_dtype)


class _Derived(torch.autograd.Function):
    """The product, with the derivative that torch's has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(values, scales)
        product: Tensor = _multiply(x, values, scales)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        values, scales = ctx.saved_tensors
        return gradient @ (values.to(gradient.dtype) * scales.unsqueeze(1)), None, None
