"""Loading without unpacking: what stands in a model for a weight that stays packed until the rest is loaded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitpress.quantization import PackedWeight


@dataclass(frozen=True)
class Keep:
    """Who takes packed weights as they are.

    Attributes:
        which: of a model's quantized layers, by name, those whose weights it takes.
        put: gives the layers of the loaded model their packed weights, by the layers' names.
    """

    which: Callable[[nn.Module, Iterable[str]], list[str]]
    put: Callable[[nn.Module, Mapping[str, PackedWeight]], None]


def stand_in(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """A tensor of a weight's shape (out, in) that takes no memory: one zero, many times."""
    return torch.zeros((), dtype=dtype).expand(weight.shape)
