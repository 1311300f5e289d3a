"""A transformers model without its weights, and where on disk each of them is."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.shards import Shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, as transformers would have loaded it.

    Attributes:
        model: its structure, with the dtypes and ties that it would have.
        sources: what each tensor of its state is called in the checkpoint; tied ones have one source.
        shards: the checkpoint.
    """

    model: nn.Module
    sources: dict[str, str]
    shards: Shards

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor of the model's state, in the model's dtype; into ``out`` if it is stored in that."""
        source = self.sources[name]
        model: Any = self.model
        dtype = model.get_parameter_or_buffer(name).dtype
        stored = self.shards.read(source, out if self.shards[source].dtype == dtype else None)
        return stored if stored.dtype == dtype else stored.to(dtype)


def skeleton_of(path: Path, *, trust_remote_code: bool = False) -> Skeleton | None:
    """The model of a checkpoint, of which only the headers are read.

    None, with a word in the log, where it takes more than reading to have a weight: transformers does not know the
    architecture, joins or splits tensors of the checkpoint, or makes up some that are missing.

    Raises:
        BitpressError: the checkpoint is damaged; see :meth:`Shards.of`.
    """
    try:
        return _built(path, trust_remote_code=trust_remote_code)
    except _NeedsWeightsError as why:
        logger.info("%s is loaded into memory: %s.", path, why)
        return None


class _NeedsWeightsError(Exception):
    """Why the model has to be loaded."""


def _built(path: Path, *, trust_remote_code: bool) -> Skeleton:
    import transformers  # noqa: PLC0415

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _NeedsWeightsError(f"transformers does not know it ({error})") from error
    model_class: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None or getattr(config, "quantization_config", None) is not None:
        raise _NeedsWeightsError("its class is not transformers', or it is quantized already")
    shards = Shards.of(path)
    stored = {name: tensor.meta() for name, tensor in shards.items()}
    names = {_storage(tensor): name for name, tensor in stored.items()}
    try:
        model: Any = model_class.from_pretrained(
            None, config=config, state_dict=dict(stored), dtype="auto", device_map={"": "meta"}
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise _NeedsWeightsError(f"transformers needs its weights to build it ({error})") from error
    if any(type(each).__name__ != "WeightRenaming" for each in getattr(model, "_weight_conversions", None) or ()):
        raise _NeedsWeightsError("transformers joins or splits its tensors")
    sources: dict[str, str] = {}
    state = model.state_dict()
    tied = _tied(model, state)
    for name, tensor in state.items():
        # Where the dtype is another, transformers has made a tensor of its own; where it is tied, one for all.
        ways = [names.get(_storage(tensor), name), *tied[name]]
        source = next((way for way in ways if way in stored and stored[way].shape == tensor.shape), None)
        if source is None or not tensor.is_meta:
            raise _NeedsWeightsError(f"its checkpoint does not hold {name} as it is")
        sources[name] = source
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return Skeleton(model, sources, shards)


def _tied(model: Any, names: Collection[str]) -> dict[str, list[str]]:
    """All names of each tensor, by each of them."""
    of: dict[int, list[str]] = {}
    own = {name: id(model.get_parameter_or_buffer(name)) for name in names}
    for name, tensor in own.items():
        of.setdefault(tensor, []).append(name)
    return {name: of[tensor] for name, tensor in own.items()}


def _storage(tensor: Tensor) -> int:
    """Equal for tensors that share their memory, though they have none."""
    address: int = tensor.untyped_storage()._cdata
    return address


def stand_ins(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A small tensor for each, the same for those on the meta device that are one."""
    made: dict[Any, Tensor] = {}
    return {
        name: made.setdefault(_storage(tensor) if tensor.is_meta else name, torch.zeros(1))
        for name, tensor in tensors.items()
    }
