"""Which kernel computes from which packed weight."""

import sys

import torch
from torch import nn

from bitpress.quantization import PackedWeight
from bitpress.runtime.int4 import Int4Layer
from bitpress.runtime.int8 import Int8Layer
from bitpress.runtime.layers import PackedLayer

# In the order in which they are tried.
KERNELS: tuple[type[PackedLayer], ...] = (Int4Layer, Int8Layer)


def kernel_for(own: type[nn.Module], weight: PackedWeight, dtype: torch.dtype) -> type[PackedLayer]:
    """The kind of layer that computes fastest from ``weight``, or the one that takes every weight.

    torch's kernels are fast in bfloat16 alone; in other dtypes they are slow references.

    Args:
        own: the layer's class, whose forward must be that of a plain linear layer.
        weight: on the device where it will be used.
        dtype: in which products are computed.
    """
    if dtype != torch.bfloat16 or not _is_plain(own):
        return PackedLayer
    return next((kind for kind in KERNELS if kind.fits(weight)), PackedLayer)


def _is_plain(own: type[nn.Module]) -> bool:
    """True for classes that compute x @ W.T + b and nothing else."""
    library = sys.modules.get("transformers.pytorch_utils")
    plain = [nn.Linear.forward] + ([] if library is None else [library.Conv1D.forward])
    return getattr(own, "forward", None) in plain


def kernel_in_bfloat16(own: type[nn.Module], weight: PackedWeight, dtype: torch.dtype) -> type[PackedLayer]:
    """The same where products are computed in bfloat16 whatever ``dtype`` says."""
    del dtype
    return kernel_for(own, weight, torch.bfloat16)


def no_kernel(own: type[nn.Module], weight: PackedWeight, dtype: torch.dtype) -> type[PackedLayer]:
    """The one that computes what the dense layer does, bit for bit."""
    del own, weight, dtype
    return PackedLayer
