"""A quantized weight, loose (one point of its grid a byte) and packed (as it is stored)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from bitpress.quantization.formats import LOOSE, weight_only_format
from bitpress.quantization.grid import dequantize, integer_range, quantize
from bitpress.quantization.packing import pack_integers, pack_points, repack, unpack_floats
from bitpress.quantization.scales import read_scale, step_sizes, stored_scale


@dataclass(frozen=True)
class QuantizedWeight:
    """Points with the grid they live on.

    Attributes:
        values: (out, in): int8, or float8_e4m3fn on a grid of floats of 4, 6 or 8 bits.
        scale: the weight's dtype, values as they are stored; (1,), (out, 1), (out, groups) or (row blocks, column
            blocks).
        zero_point: int8, of ``scale``'s shape; all zero on a symmetric grid.
        args: the scheme of the weight.
        global_scale: (1,), float32: what the scales are relative to, on a grid that has one (NVFP4).
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    args: QuantizationArgs
    global_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight as every reader of the checkpoint computes it: (out, in) in ``scale``'s dtype."""
        steps = step_sizes(self.scale, self.global_scale)
        return dequantize(self.values, steps, self._offset(), self.args, self.scale.dtype)

    def pack(self) -> "PackedWeight":
        """The same weight in ``num_bits`` bits a value."""
        rows, columns = self.values.shape
        packed = pack_points(self.values, self.args)
        return PackedWeight(packed, (rows, columns), self.scale, self.zero_point, self.args, self.global_scale)

    def _offset(self) -> Tensor | None:
        return None if self.args.symmetric else self.zero_point

    @classmethod
    def on_grid(
        cls,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        args: QuantizationArgs,
        global_scale: Tensor | None = None,
    ) -> "QuantizedWeight":
        """Round a weight to a given grid, in float32 whatever its dtype.

        A weight that :meth:`dequantize` made is found again exactly: the result dequantizes to it.

        Args:
            weight: (out, in), any float dtype.
            scale: of the shapes that the class names.
            zero_point: int8, the shape of ``scale``.
            args: the scheme.
            global_scale: (1,), float32: what scales are relative to, where the scheme has one.
        """
        offset = None if args.symmetric else zero_point
        values = quantize(weight.float(), step_sizes(scale, global_scale).float(), offset, args)
        found = cls(values, scale, zero_point, args, global_scale)
        if weight.dtype == torch.bfloat16 and args.num_bits == 8 and not args.symmetric:
            return found._exact(weight)
        return found

    def _exact(self, weight: Tensor) -> "QuantizedWeight":
        """Where bfloat16 rounds a point more than 128 steps from 0 past its neighbour, the neighbour that fits."""
        step = (weight - self.dequantize()).sign()
        beside = (self.values + step).clamp_(*integer_range(self.args)).to(torch.int8)
        neighbour = replace(self, values=beside)
        return replace(self, values=torch.where(neighbour.dequantize() == weight, beside, self.values))


@dataclass(frozen=True)
class PackedWeight:
    """What a checkpoint stores of a quantized weight, in the layout of the installed compressed-tensors.

    Attributes:
        packed: integers: (out, ceil(in * num_bits / 32)), int32 (3, 5, 6 and 7 bits: as the installed version packs
            them); floats of 8 bits: (out, in), float8_e4m3fn, of fewer: (out, in * num_bits / 8), uint8.
        shape: (out, in).
        scale: see :class:`QuantizedWeight`.
        zero_point: see :class:`QuantizedWeight`; not packed here.
        args: the scheme of the weight.
        global_scale: see :class:`QuantizedWeight`.
    """

    packed: Tensor
    shape: tuple[int, int]
    scale: Tensor
    zero_point: Tensor
    args: QuantizationArgs
    global_scale: Tensor | None = None

    def unpack(self) -> QuantizedWeight:
        """The points again, one a byte."""
        values = _unpack(self.packed, self.shape, self.args)
        return QuantizedWeight(values, self.scale, self.zero_point, self.args, self.global_scale)

    def tensors(self, stored_as: str | None = None) -> dict[str, Tensor]:
        """What a checkpoint stores, by the names that the tensors have behind the layer's.

        Args:
            stored_as: see :func:`bitpress.quantization.stored_format`; by default the format of a scheme that has these
                weights only.
        """
        stored = {"weight_scale": stored_scale(self.scale, self.args)}
        if self.global_scale is not None:
            stored["weight_global_scale"] = self.global_scale
        if self.args.type != QuantizationType.INT:
            return {"weight" if self.args.num_bits == 8 else "weight_packed": self.packed, **stored}
        loose = (stored_as or weight_only_format(self.args)) in LOOSE
        if not self.args.symmetric:
            stored["weight_zero_point"] = self.zero_point if loose else self._packed_zero_point()
        if loose:
            return {"weight": self.unpack().values, **stored}
        return {"weight_packed": self.packed, "weight_shape": torch.tensor(self.shape, dtype=torch.int64), **stored}

    def nbytes(self, stored_as: str | None = None) -> int:
        """Bytes of :meth:`tensors` in a checkpoint, ``stored_as`` it is there."""
        return sum(t.numel() * t.element_size() for t in self.tensors(stored_as).values())

    def _packed_zero_point(self) -> Tensor:
        if self.args.strategy == QuantizationStrategy.TENSOR:
            return self.zero_point
        return pack_integers(self.zero_point.T, self.args.num_bits).T.contiguous()

    @classmethod
    def from_tensors(
        cls, stored: dict[str, Tensor], args: QuantizationArgs, dtype: torch.dtype = torch.bfloat16
    ) -> "PackedWeight":
        """Read what :meth:`tensors` wrote, in whichever format.

        Args:
            stored: the tensors by these names, in the shapes of :class:`PackedWeight`.
            args: the scheme of the weight.
            dtype: that of the weight, where it cannot be told from the scale.
        """
        rows, columns = (int(n) for n in stored["weight_shape"]) if "weight_shape" in stored else (0, 0)
        scale, zero_point = read_grid(stored, args, rows, dtype)
        if args.type != QuantizationType.INT:
            packed = stored["weight" if args.num_bits == 8 else "weight_packed"]
            shape = (packed.shape[0], packed.shape[1] * 8 // args.num_bits)
            return cls(packed, shape, scale, zero_point, args, stored.get("weight_global_scale"))
        if "weight" in stored:
            return QuantizedWeight(stored["weight"], scale, zero_point, args).pack()
        packed = repack(stored["weight_packed"], args.num_bits, columns)
        return cls(packed, (rows, columns), scale, zero_point, args)


def read_grid(
    stored: Mapping[str, Tensor], args: QuantizationArgs, rows: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight with so many rows; the other arguments are :meth:`PackedWeight.from_tensors`'s.

    Zero points that are packed are words; a weight that is not packed has them as they are.
    """
    scale = read_scale(stored["weight_scale"], args, dtype)
    zero_point = stored.get("weight_zero_point")
    if zero_point is None:
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    if zero_point.dtype != torch.int32 or args.strategy == QuantizationStrategy.TENSOR:
        return scale, zero_point
    # Not by packed_dim=0: compressed-tensors 0.20 fails at a single row of words with several groups.
    words = repack(zero_point.T.clone(memory_format=torch.contiguous_format), args.num_bits, rows)
    return scale, unpack_from_int32(words, args.num_bits, torch.Size((scale.shape[-1], rows))).T.contiguous()


def _unpack(packed: Tensor, shape: tuple[int, int], args: QuantizationArgs) -> Tensor:
    if args.type != QuantizationType.INT:
        return packed if args.num_bits == 8 else unpack_floats(packed, args.num_bits)
    values: Tensor = unpack_from_int32(packed, args.num_bits, torch.Size(shape))
    return values.contiguous()
