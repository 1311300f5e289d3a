"""Products with 4-bit weights by torch's own kernels, in bfloat16 on CPUs and on CUDA.

They read two weights a byte and a scale and a zero per group, and compute (q * scale + zero) in float32 with the
integers q of [-8, 7]: our (q - z) * scale with zero = -z * scale. That zero is rounded to bfloat16, where a dense
weight would be; so is a scale that is stored in another dtype.
"""

import functools
from typing import Any, ClassVar, cast

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from bitpress.checkpoints.attached import scheme_of
from bitpress.quantization import PackedWeight, QuantizedWeight
from bitpress.runtime.layers import PackedLayer

GROUPS = (256, 128, 64, 32)
# Rows are padded to a multiple of it.
ROWS = 16
# As many of CUDA's tiles of 16 columns lie together.
INNER_TILES = 8
# Rows of the unit matrix that read the points back at a time.
CHUNK = 256

# As functions of torch, whose call takes less time than that of torch.ops.
_on_cpu: Any = torch._weight_int4pack_mm_for_cpu
_on_cuda: Any = torch._weight_int4pack_mm


class Int4Layer(PackedLayer):
    """Integers of 2 to 4 bits, in groups of 32 or a multiple, or a scale a row or tensor; 4 bits a weight."""

    HELD: ClassVar[tuple[str, ...]] = ("weight_int4", "weight_scales_and_zeros", "weight_scale")

    _group: int

    @staticmethod
    def fits(weight: PackedWeight) -> bool:
        """See the class; the parameters must come back from what the kernel has of them."""
        args = weight.args
        if args.type != QuantizationType.INT or args.num_bits > 4 or _group(weight) is None:
            return False
        if not works_on(weight.scale.device) or (weight.scale.is_cuda and weight.shape[1] % (INNER_TILES * 16)):
            return False
        scale = spread(weight.scale, weight, 1).bfloat16()
        zero = _zeros(spread(weight.zero_point, weight, 1), scale)
        back = torch.equal(_zero_points(scale, zero), spread(weight.zero_point, weight, 1))
        return back and bool(zero.isfinite().all())

    def hold(self, weight: PackedWeight) -> None:
        """Two weights a byte, and (groups, out, 2) of scales and zeros."""
        group = cast(int, _group(weight))
        rows = weight.shape[0]
        padding = (0, 0, 0, -rows % ROWS)
        self._group = group
        self.register_buffer("weight_int4", _pack(torch.nn.functional.pad(weight.unpack().values, padding)))
        scale = spread(weight.scale, weight, group).bfloat16()
        zero = _zeros(spread(weight.zero_point, weight, group), scale)
        both = torch.nn.functional.pad(torch.stack([scale.T, zero.T], -1), padding)
        self.register_buffer("weight_scales_and_zeros", both.contiguous())
        # Where the kernel has it rounded.
        self.register_buffer("weight_scale", None if weight.scale.dtype == torch.bfloat16 else weight.scale)

    def product(self, x: Tensor) -> Tensor:
        """One product in bfloat16; the bias is added in the input's dtype."""
        # A token's product takes microseconds: each call that is left out here counts.
        rows, columns = self.weight_shape
        flat = x.reshape(-1, columns)
        if flat.dtype != torch.bfloat16 or not flat.is_contiguous():
            flat = flat.to(torch.bfloat16).contiguous()
        words, both = self._buffers["weight_int4"], self._buffers["weight_scales_and_zeros"]
        derived = flat.requires_grad and torch.is_grad_enabled()
        product: Any = _Derived.apply if derived else multiply
        y: Tensor = product(flat, words, self._group, both)
        y = (y[:, :rows] if rows % ROWS else y).reshape(*x.shape[:-1], rows)
        if x.dtype != torch.bfloat16:
            y = y.to(x.dtype)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias

    def quantized(self) -> QuantizedWeight:
        """The points, and the grid that they are on."""
        words, both = self.get_buffer("weight_int4"), self.get_buffer("weight_scales_and_zeros")
        rows, columns = self.weight_shape
        args = scheme_of(self).weights
        scale, zero = (both[:, :rows, i].T for i in range(2))
        zero_point = gathered(_zero_points(scale, zero), args, self._group)
        own = self._buffers["weight_scale"]
        values = _read(words, columns)[:rows].contiguous()
        return QuantizedWeight(values, gathered(scale, args, self._group) if own is None else own, zero_point, args)

    def packed_weight(self) -> PackedWeight:
        """See :class:`PackedLayer`."""
        return self.quantized().pack()

    def matrix(self) -> Tensor:
        """See :class:`PackedLayer`."""
        return self.quantized().dequantize().to(self.weight_dtype)


def multiply(x: Tensor, words: Tensor | None, group: int, both: Tensor | None) -> Tensor:
    """``x`` (tokens, in), bfloat16, by the weight: (tokens, out)."""
    product: Tensor = (_on_cuda if x.is_cuda else _on_cpu)(x, words, group, both)
    return product


class _Derived(torch.autograd.Function):
    """The product, with the derivative that torch's has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, group: int, both: Tensor) -> Tensor:
        ctx.save_for_backward(words, both)
        ctx.group = group
        return multiply(x, words, group, both)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        words, both = ctx.saved_tensors
        columns = ctx.group * len(both)
        unit = torch.eye(columns, dtype=gradient.dtype, device=gradient.device)
        return gradient @ multiply(unit, words, ctx.group, both).T, None, None, None


def _group(weight: PackedWeight) -> int | None:
    """How many columns the kernel lets share a scale: a divisor of as many as do."""
    args = weight.args
    if args.strategy not in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL, QuantizationStrategy.TENSOR):
        return None
    own = args.group_size if args.strategy == QuantizationStrategy.GROUP else weight.shape[1]
    return next((group for group in GROUPS if own % group == 0), None)


def spread(parameters: Tensor, weight: PackedWeight, group: int) -> Tensor:
    """Scales or zero points of a weight as (out, columns / ``group``); with ``group`` 1 only as (out, own groups)."""
    rows, columns = weight.shape
    full = parameters.reshape(1, 1).expand(rows, 1) if parameters.numel() == 1 else parameters
    return full if group == 1 else full.repeat_interleave(columns // group // full.shape[1], 1)


def gathered(parameters: Tensor, args: QuantizationArgs, group: int) -> Tensor:
    """What :func:`spread` has spread."""
    match args.strategy:
        case QuantizationStrategy.TENSOR:
            return parameters[0, :1].contiguous()
        case QuantizationStrategy.CHANNEL:
            return parameters[:, :1].contiguous()
    return parameters[:, :: args.group_size // group].contiguous()


def _zeros(zero_point: Tensor, scale: Tensor) -> Tensor:
    """The kernel's zeros, bfloat16, of zero points (int8) and scales (bfloat16)."""
    return -(zero_point.float() * scale.float()).bfloat16()


def _zero_points(scale: Tensor, zero: Tensor) -> Tensor:
    """The zero points again: rounding moved a zero by less than half a step."""
    return (-zero.float() / scale.float()).round().to(torch.int8)


def _pack(values: Tensor) -> Tensor:
    """Integers of [-8, 7] (out, in), int8, as the device's kernel reads them."""
    if values.is_cuda:
        codes = (values + 8).to(torch.uint8)
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
        return packed
    of_cpu: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int() + 8, 1)
    return of_cpu


def _read(words: Tensor, columns: int) -> Tensor:
    """What :func:`_pack` has packed, (out, in), int8, in whichever layout: the products with the unit matrix."""
    rows = words.shape[0] * (8 if words.is_cuda else 1)
    group = next(group for group in GROUPS if columns % group == 0)
    both = torch.ones(columns // group, rows, 2, dtype=torch.bfloat16, device=words.device)
    both[..., 1] = 0
    values = torch.empty(rows, columns, dtype=torch.int8, device=words.device)
    for start in range(0, columns, CHUNK):
        count = min(CHUNK, columns - start)
        unit = torch.zeros(count, columns, dtype=torch.bfloat16, device=words.device)
        unit.diagonal(start).fill_(1)
        values[:, start : start + count] = multiply(unit, words, group, both).T
    return values


@functools.cache
def works_on(device: torch.device) -> bool:
    """True if the device has the kernel, and the kernel computes what it should: it is asked."""
    if device.type not in ("cpu", "cuda"):
        return False
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (64 + ROWS, 256), dtype=torch.int8, generator=draw).to(device)
    try:
        return torch.equal(_read(_pack(values), values.shape[1]), values)
    except RuntimeError:
        return False
