"""What the checkpoint of a compressed transformers model holds: under which names, and of what each tensor is.

It is settled from names, shapes and schemes alone, so that it is known before any weight is.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitpress.checkpoints.attached import scheme_of, static_activations
from bitpress.checkpoints.config import have_one_scheme
from bitpress.checkpoints.experts import (
    StoredExperts,
    checkpoint_names,
    choose_packed,
    is_expert,
    stored_experts,
    tensor_names,
)
from bitpress.models.experts import find_layer
from bitpress.quantization import PackedWeight, stored_format


@dataclass
class Stored:
    """The parts of a checkpoint, in their order.

    Attributes:
        dense: what a parameter or buffer is called in the checkpoint, by its name in the model.
        experts: the same of layers of fused experts that are stored dense, one by one.
        layers: the same of layers that are stored packed.
        attentions: the same of attentions with static scales.
        apart: experts that are stored one by one and packed.
        whole: all other fused experts.
    """

    dense: dict[str, str]
    experts: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    attentions: dict[str, str] = field(default_factory=dict)
    apart: Sequence[StoredExperts] = ()
    whole: Sequence[StoredExperts] = ()

    @property
    def one_by_one(self) -> set[str]:
        """The tensors that are parts of one in the model."""
        return {f"{stored}.weight" for stored in self.experts.values()}

    @classmethod
    def of(
        cls,
        model: Any,
        dimensions: Mapping[str, int],
        read: Mapping[str, nn.Module],
        attentions: Mapping[str, nn.Module],
    ) -> "Stored":
        """Settle it.

        Args:
            model: the model; ``read`` and ``attentions`` have their schemes.
            dimensions: how many each of its parameters and persistent buffers has, by name.
            read: the layers that readers take packed, by name.
            attentions: those whose states are quantized, by name.
        """
        one_scheme = have_one_scheme([layer for layer in read.values() if is_expert(layer)])
        apart, whole = choose_packed(stored_experts(model), read, one_scheme=one_scheme)
        read = {name: layer for name, layer in read.items() if not any(name in s.names for s in whole)}
        names = {name: stored_name for s in apart for name, stored_name in s.names.items()}
        # Where transformers puts a layer for each expert, it looks for a weight of each, dense or packed.
        one_by_one = [s for s in whole if s.as_layers]
        gone = {f"{name}.weight" for name in read} | {p for s in (*apart, *one_by_one) for p in s.parameters}
        return cls(
            tensor_names(model, {name: count for name, count in dimensions.items() if name not in gone}),
            {name: stored for s in one_by_one for name, stored in s.names.items()},
            checkpoint_names(model, [name for name in read if name not in names]) | names,
            checkpoint_names(model, list(attentions)),
            apart,
            whole,
        )

    def tensors(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        packed: Mapping[str, PackedWeight],
        attentions: Collection[str],
    ) -> dict[str, Tensor]:
        """The tensors of as much of the model as there is in ``state`` and ``packed``, by their stored names.

        Args:
            model: the model, whose layers carry their schemes and static scales.
            state: parameters and buffers, by their names in the model.
            packed: what the layers' weights hold, by the layers' names.
            attentions: names of those whose static scales are wanted.
        """
        found = {stored: state[name] for name, stored in self.dense.items() if name in state}
        for name, stored in self.experts.items():
            layer: Any = find_layer(model, name)
            whole = state.get(name.removesuffix(layer.local) + layer.projection.parameter)
            if whole is not None:
                found[f"{stored}.weight"] = layer.projection.within(whole[layer.expert])
        for name, stored in self.layers.items():
            if name in packed:
                found |= _named(stored, stored_tensors(find_layer(model, name), packed[name]))
        for name in attentions:
            stored = self.attentions[name]
            found |= _named(stored, static_activations(find_layer(model, name)))
        return found


def _named(stored: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{stored}.{kind}", tensor) for kind, tensor in tensors.items())


def stored_tensors(layer: nn.Module, weight: PackedWeight) -> dict[str, Tensor]:
    """All that a checkpoint holds of a quantized layer but its bias."""
    return {**weight.tensors(stored_format(scheme_of(layer))), **static_activations(layer)}
