"""All or nothing: what has been solved is kept aside, packed, until everything has been."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.models.blocks import Block
from bitpress.models.experts import find_layer, fused_experts
from bitpress.models.linears import weight_matrix
from bitpress.quantization import PackedWeight, QuantizedWeight


class Changes:
    """The new values of a model's parameters, block by block, apart from the model.

    While a block is worked on its parameters hold the new values; afterwards they hold the old ones again, until
    :meth:`commit`. An error half-way, or a keyboard interrupt, leaves the model as it was, at the price of the packed
    weights' memory.
    """

    def __init__(self) -> None:
        self.packed: dict[str, PackedWeight] = {}
        self.dense: dict[str, Tensor] = {}

    @contextmanager
    def of(self, block: Block, quantized: Mapping[str, QuantizedWeight]) -> Iterator[None]:
        """Inside the ``with`` the block's parameters may be written to; ``quantized`` fills meanwhile."""
        parameters = dict(_parameters(block))
        saved = {name: p.data.clone() for name, p in parameters.items()}
        try:
            yield
            self._remember(parameters, saved, quantized)
            release_free_memory()
        finally:
            for name, p in parameters.items():
                p.data.copy_(saved[name])

    def notes(self, label: str) -> dict[str, Any] | None:  # noqa: ARG002
        """What was noted of a block that needs no solving any more: here of none."""
        return None

    def restore(self, block: Block) -> dict[str, dict[str, Tensor]]:
        """Give a block that needs no solving its new values; the tensors of its static activations are returned."""
        raise NotImplementedError

    def finish(self, block: Block, activations: Mapping[str, Mapping[str, Tensor]], notes: dict[str, Any]) -> None:
        """All of the block is known: what :meth:`of` saw, its static activations, and notes for the report."""

    def _remember(
        self,
        parameters: Mapping[str, nn.Parameter],
        saved: Mapping[str, Tensor],
        quantized: Mapping[str, QuantizedWeight],
    ) -> None:
        weights = {f"{name}.weight": name for name in quantized}
        for name, p in parameters.items():
            if name in weights:
                layer = weights[name]
                self.packed[layer] = quantized[layer].pack()
            elif not torch.equal(p.data, saved[name]):
                self.dense[name] = p.data.clone()

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the ``with`` the model is as :meth:`commit` will leave it."""
        owners = [(find_layer(model, n.rpartition(".")[0]), n.rpartition(".")[2]) for n in self.dense]
        held = [weight_matrix(find_layer(model, n)) for n in self.packed]
        held += [owner.get_parameter(parameter).data for owner, parameter in owners]
        saved = [tensor.clone() for tensor in held]
        try:
            with torch.no_grad():
                self.commit(model)
            yield
        finally:
            for tensor, value in zip(held, saved, strict=True):
                tensor.copy_(value)

    def commit(self, model: nn.Module) -> None:
        """Write everything to the model: the dequantized weights, and what smoothing changed."""
        for name, packed in self.packed.items():
            weight_matrix(find_layer(model, name)).copy_(packed.unpack().dequantize())
        for name, value in self.dense.items():
            owner, _, parameter = name.rpartition(".")
            find_layer(model, owner).get_parameter(parameter).data.copy_(value)


def release_free_memory() -> None:
    """Give the system back what a block has freed: glibc would keep it, in holes between the packed weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _parameters(block: Block) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once; those of fused experts as the parameters of the experts' layers."""
    seen: set[int] = set()
    for name, module in block.named_modules():
        experts = fused_experts(module)
        fused = experts.parameters if experts is not None else ()
        for local, p in module._parameters.items():
            if p is not None and local not in fused and id(p) not in seen:
                seen.add(id(p))
                yield f"{name}.{local}" if name else local, p
