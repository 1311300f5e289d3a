"""A quantized weight, loose (one integer a byte) and packed (as it is stored)."""

from dataclasses import dataclass, replace

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from bitpress.quantization.formats import LOOSE, weight_only_format
from bitpress.quantization.grid import dequantize, integer_range, quantize


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers with the grid they live on.

    Attributes:
        values: (out, in), int8.
        scale: the stored dtype; (1,), (out, 1) or (out, groups).
        zero_point: int8, of ``scale``'s shape; all zero on a symmetric grid.
        args: the scheme of the weight.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    args: QuantizationArgs

    def dequantize(self) -> Tensor:
        """The weight as every reader of the checkpoint computes it: (out, in) in ``scale``'s dtype."""
        return dequantize(self.values, self.scale, self._offset(), self.args)

    def pack(self) -> "PackedWeight":
        """The same weight in ``num_bits`` bits a value."""
        packed = pack_to_int32(self.values, self.args.num_bits)
        rows, columns = self.values.shape
        return PackedWeight(packed, (rows, columns), self.scale, self.zero_point, self.args)

    def _offset(self) -> Tensor | None:
        return None if self.args.symmetric else self.zero_point

    @classmethod
    def on_grid(cls, weight: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs) -> "QuantizedWeight":
        """Round ``weight`` (out, in) to a given grid, in float32 whatever its dtype.

        A weight that :meth:`dequantize` made is found again exactly: the result dequantizes to it.
        """
        offset = None if args.symmetric else zero_point
        found = cls(quantize(weight.float(), scale.float(), offset, args), scale, zero_point, args)
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
        packed: (out, ceil(in * num_bits / 32)), int32 (3, 5, 6 and 7 bits: as the installed version packs them).
        shape: (out, in).
        scale: see :class:`QuantizedWeight`.
        zero_point: see :class:`QuantizedWeight`; not packed here.
        args: the scheme of the weight.
    """

    packed: Tensor
    shape: tuple[int, int]
    scale: Tensor
    zero_point: Tensor
    args: QuantizationArgs

    def unpack(self) -> QuantizedWeight:
        """The integers again, one a byte."""
        values = unpack_from_int32(self.packed, self.args.num_bits, torch.Size(self.shape))
        return QuantizedWeight(values.contiguous(), self.scale, self.zero_point, self.args)

    def tensors(self, format: str | None = None) -> dict[str, Tensor]:
        """What a checkpoint stores, by the names that the tensors have behind the layer's.

        Args:
            format: see :func:`bitpress.quantization.stored_format`; by default that of a scheme with these weights only.
        """
        if (format or weight_only_format(self.args)) in LOOSE:
            stored = {"weight": self.unpack().values, "weight_scale": self.scale}
            return stored if self.args.symmetric else {**stored, "weight_zero_point": self.zero_point}
        stored = {
            "weight_packed": self.packed,
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
        }
        if not self.args.symmetric:
            stored["weight_zero_point"] = self._stored_zero_point()
        return stored

    def nbytes(self, format: str | None = None) -> int:
        """Bytes of :meth:`tensors` in a checkpoint."""
        return sum(t.numel() * t.element_size() for t in self.tensors(format).values())

    def _stored_zero_point(self) -> Tensor:
        if self.args.strategy == QuantizationStrategy.TENSOR:
            return self.zero_point
        packed: Tensor = pack_to_int32(self.zero_point, self.args.num_bits, packed_dim=0)
        return packed.contiguous()

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor], args: QuantizationArgs) -> "PackedWeight":
        """Read what :meth:`tensors` wrote, in whichever format."""
        scale = stored["weight_scale"]
        if "weight" in stored:
            zero_point = stored.get("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
            return QuantizedWeight(stored["weight"], scale, zero_point, args).pack()
        rows, columns = (int(n) for n in stored["weight_shape"])
        zero_point = stored.get("weight_zero_point")
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int8)
        elif args.strategy != QuantizationStrategy.TENSOR:
            # Not by packed_dim=0: compressed-tensors 0.20 fails at a single row of words with several groups.
            words = zero_point.T.clone(memory_format=torch.contiguous_format)
            shape = torch.Size((scale.shape[-1], rows))
            zero_point = unpack_from_int32(words, args.num_bits, shape).T.contiguous()
        return cls(stored["weight_packed"], (rows, columns), scale, zero_point, args)
