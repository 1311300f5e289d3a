"""A model that stays on the disk: its structure here, its weights in the files until a part of it asks for them.

transformers says which tensors of the files a parameter is made of, and makes it of them: prefixes are renamed, and the
experts of a mixture are joined, as when it loads the model itself.
"""

import copy
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints.headers import StoredTensor
from bitpress.checkpoints.shards import Shards
from bitpress.errors import BitpressError, nearest_file


class CannotStreamError(BitpressError):
    """The model has to be loaded as a whole; the message says why."""


class UnknownArchitectureError(CannotStreamError):
    """transformers has no config of this kind."""


@dataclass
class Source:
    """A model without weights, and the files that they are in.

    Attributes:
        model: parameters are on the meta device, buffers are real.
        shards: the checkpoint's tensors.
        directory: of the checkpoint.
        parts: the tensors that each parameter or persistent buffer is made of, by its name in the model.
        unclaimed: tensors that no parameter is made of.
        tied: names of parameters that are others, with those.
    """

    model: nn.Module
    shards: Shards
    directory: Path
    parts: dict[str, list[str]]
    unclaimed: list[str]
    tied: dict[str, str]
    _together: dict[str, list[str]]  # the parameters that one conversion makes, by each of their names
    _loading: dict[str, Any]

    def origins(self, name: str) -> list[str]:
        """The stored tensors that a parameter or buffer is made of; of an unclaimed tensor, itself."""
        return self.parts.get(self.tied.get(name, name), [name])

    def is_converted(self, name: str) -> bool:
        """True for what is made of parts of stored tensors, or of several."""
        return self.tied.get(name, name) in self._together

    def read(self, names: Collection[str], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameters and buffers as transformers would load them, by their names; each has memory of its own.

        Args:
            names: of them.
            out: by name, what to read a tensor into; used where it is stored as it is, in that dtype.
        """
        values: dict[str, Tensor] = {}
        into = {self.tied.get(name, name): tensor for name, tensor in (out or {}).items()}
        converted: list[str] = []
        for name in {self.tied.get(name, name) for name in names}:
            if name in self._together:
                converted.append(name)
            else:
                stored, dtype = self.parts[name][0], parameter_or_buffer(self.model, name).dtype
                fits = self.shards[stored].dtype == dtype
                values[name] = self.shards.read(stored, into.get(name) if fits else None).to(dtype)
        if converted:
            values |= self._convert(converted)
        return {name: values[self.tied.get(name, name)] for name in names}

    def read_pinned(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of ``names`` that are stored as they are, in pinned memory; it touches nothing of the model."""
        plain = [name for name in names if not self.is_converted(name)]
        out = {}
        for name in plain:
            stored = self.shards[self.parts[self.tied.get(name, name)][0]]
            out[name] = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=torch.cuda.is_available())
        return self.read(plain, out)

    def _convert(self, names: Collection[str]) -> dict[str, Tensor]:
        every = {together for name in names for together in self._together[name]}
        stored = dict.fromkeys(part for name in every for part in self.parts[name])
        lazy = {part: _Unread(self.shards, part) for part in stored}
        owners = {name: name.rpartition(".") for name in every}
        before = {n: self.model.get_submodule(owner)._parameters.get(local) for n, (owner, _, local) in owners.items()}
        try:
            _load(self.model, lazy, self._loading, "cpu")
            return {name: parameter_or_buffer(self.model, name) for name in every}
        finally:
            for name, (owner, _, local) in owners.items():
                if before[name] is not None:
                    self.model.get_submodule(owner)._parameters[local] = before[name]


def open_source(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Source:
    """The model of a path or hub id, without its weights.

    Raises:
        CannotStreamError: it is no checkpoint of safetensors that transformers knows by name, or lacks weights.
        BitpressError: a file of the checkpoint is missing or damaged.
    """
    import transformers  # noqa: PLC0415

    directory = directory_of(source)
    shards = Shards.of(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        why = f"transformers reads no config of {directory}: {error}"
        raise CannotStreamError(why) if _has_code(directory) else UnknownArchitectureError(why) from error
    dtype = stored_dtype(config, shards)
    model = skeleton(config, dtype, trust_remote_code=trust_remote_code)
    loading = _loading(model, dtype)
    meta = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in shards.items()}
    missing = _load(model, meta, loading, "meta")
    parts, together = _routes(model, shards, loading)
    parts = {name: stored for name, stored in parts.items() if _exists(model, name)}
    missing -= parts.keys()
    tied = _tie(model, shards, parts)
    claimed = {part for stored in parts.values() for part in stored}
    for name in tied:
        parts.pop(name, None)
        missing.discard(name)
    missing -= {n for n in missing if not _exists(model, n)}
    if missing:
        raise CannotStreamError(
            f"{directory} lacks {len(missing)} weights of a {type(model).__name__}, {min(missing)} for instance."
        )
    model.eval()
    if (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    unclaimed = [name for name in shards if name not in claimed]
    opened = Source(model, shards, directory, parts, unclaimed, tied, together, loading)
    buffers = [name for name, _ in model.named_buffers() if name in parts]
    for name, value in opened.read(buffers).items():
        owner, _, local = name.rpartition(".")
        model.get_submodule(owner)._buffers[local] = value
    return opened


def directory_of(source: str | os.PathLike[str]) -> Path:
    """The checkpoint's directory; a hub id's is fetched."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CannotStreamError(f"{path} is a file: what is streamed is a directory with safetensors files.")
    import huggingface_hub  # noqa: PLC0415

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*.py"]
    try:
        return Path(huggingface_hub.snapshot_download(os.fspath(source), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise CannotStreamError(
            f"{str(source)!r} is neither a directory nor found on the hub{nearest_file(path)} ({error})"
        ) from error


def _has_code(directory: Path) -> bool:
    """True if the checkpoint brings its own code: it is for the user to let it run, not for us to guess without it."""
    try:
        return "auto_map" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def stored_dtype(config: Any, shards: Mapping[str, StoredTensor]) -> torch.dtype:
    """What a config says of the model's dtype, or else that of its first floats."""
    stated = getattr(config, "dtype", None)
    if isinstance(stated, str):
        stated = getattr(torch, stated)
    floats = (tensor.dtype for tensor in shards.values() if tensor.dtype.is_floating_point)
    return stated or next(floats, torch.float32)


def skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The model with parameters on the meta device; buffers are what its constructor makes them."""
    import accelerate  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    config = copy.deepcopy(config)
    with accelerate.init_empty_weights(include_buffers=False):
        if named is not None:
            return named._from_config(config, dtype=dtype)
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _loading(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """How transformers would load this model.

    Raises:
        CannotStreamError: this release of transformers has another way of doing it.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415

        return {
            "dtype": dtype,
            "dtype_plan": model._get_dtype_plan(dtype),
            "weight_mapping": get_model_conversion_mapping(model, None, None),
        }
    except (ImportError, AttributeError, TypeError) as error:
        raise CannotStreamError(f"this release of transformers loads models another way ({error}).") from error


def _load(model: Any, tensors: dict[str, Any], loading: dict[str, Any], device: str) -> set[str]:
    """Let transformers make parameters of tensors; the names of those that it had none for are returned."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model  # noqa: PLC0415
    from transformers.modeling_utils import LoadStateDictConfig  # noqa: PLC0415

    conversions = model.__dict__.get("_weight_conversions")
    with _silent_progress():
        info, _ = convert_and_load_state_dict_in_model(
            model, tensors, LoadStateDictConfig(device_map={"": device}, **loading)
        )
    if conversions is not None:  # those of the whole model, not of this part of it
        model._weight_conversions = conversions
    wrong = [name for name, *_ in info.mismatched_keys] + list(info.conversion_errors)
    if wrong:
        raise CannotStreamError(f"{type(model).__name__} takes no {min(wrong)} of the shape that is stored.")
    return set(info.missing_keys)


@contextmanager
def _silent_progress() -> Iterator[None]:
    from transformers.utils import logging  # noqa: PLC0415

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _routes(model: Any, shards: Shards, loading: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The tensors of each parameter; and the parameters that are made together, of tensors that are converted."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: PLC0415

    mapping = loading["weight_mapping"] or []
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    own = model.state_dict()
    parts: dict[str, list[str]] = {}
    together: dict[str, list[str]] = {}
    for stored in shards:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, own)
        if name not in own and stored in own:
            name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, own)
        if name not in own:
            continue
        targets = [name]
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            first = converter.target_patterns[0]
            targets = [name.replace(first, target) for target in converter.target_patterns]
            targets = [target for target in targets if target in own]
        for target in targets:
            parts.setdefault(target, []).append(stored)
            if pattern is not None:
                together[target] = targets
    return parts, together


def _tie(model: Any, shards: Shards, parts: dict[str, list[str]]) -> dict[str, str]:
    """Tie what the model ties, as transformers does: both may be stored, if they are equal.

    Returns:
        Names of parameters that are others, with those.
    """
    stated = dict(getattr(model, "all_tied_weights_keys", None) or {})
    aliases: dict[str, str] = {}
    for target, source in stated.items():
        alias, main = (target, source) if source in parts else (source, target)
        if main not in parts:
            continue
        if alias in parts and not _equal(shards, parts[alias], parts[main]):
            continue
        owner, _, local = alias.rpartition(".")
        setattr(model.get_submodule(owner), local, model.get_parameter_or_buffer(main))
        aliases[alias] = main
    return aliases


def _equal(shards: Shards, first: list[str], second: list[str]) -> bool:
    same = len(first) == len(second) == 1 and shards[first[0]].shape == shards[second[0]].shape
    return same and torch.equal(shards.read(first[0]), shards.read(second[0]))


def parameter_or_buffer(model: nn.Module, name: str) -> Tensor:
    """The tensor of that name in a transformers model's state dict."""
    of_transformers: Any = model
    found: Tensor = of_transformers.get_parameter_or_buffer(name)
    return found.detach()


def _exists(model: nn.Module, name: str) -> bool:
    try:
        parameter_or_buffer(model, name)
    except AttributeError:
        return False
    return True


class _Unread:
    """A stored tensor that is read when transformers takes it."""

    def __init__(self, shards: Shards, name: str) -> None:
        self._shards, self._name = shards, name

    def __getitem__(self, _: Any) -> Tensor:
        return self._shards.read(self._name)
