"""Linear layers, whichever way round they keep their weight."""

import sys

from torch import Tensor, nn


def _is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2), a linear layer with an (in, out) weight."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """True if ``module`` is an ``nn.Linear`` or computes the same from a transposed weight."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


def has_columns(module: nn.Module) -> bool:
    """True for whatever multiplies its input by a 2-D weight: linear layers, and routers of experts."""
    if is_linear(module):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a linear ``module`` as (out, in): a view, so that writing to it writes to the layer."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.T if _is_transposed(module) else weight


def in_features(module: nn.Module) -> int:
    """Columns of the input of a linear ``module``."""
    return weight_matrix(module).shape[1]


def as_parameter(module: nn.Module, matrix: Tensor) -> Tensor:
    """An (out, in) matrix the way round in which the layer keeps its weight."""
    return matrix.T.contiguous() if _is_transposed(module) else matrix
