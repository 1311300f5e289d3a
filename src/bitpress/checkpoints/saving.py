"""Writing a compressed model: a compressed-tensors checkpoint, safetensors only, whole or not at all."""

import functools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bitpress.checkpoints.attached import (
    attached_attentions,
    attached_layers,
    holds_packed,
    packed_weight,
    scheme_of,
)
from bitpress.checkpoints.card import write_card
from bitpress.checkpoints.config import quantization_config
from bitpress.checkpoints.directory import (
    CONFIG_FILE,
    PAGE_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    WEIGHTS_FILE,
    check_destination,
    whole_directory,
)
from bitpress.checkpoints.experts import stored_experts
from bitpress.checkpoints.formats import COMPRESSED, check_format, convert
from bitpress.checkpoints.layout import MAX_SHARD_SIZE
from bitpress.checkpoints.pushing import push
from bitpress.checkpoints.readers import initializer_needs_weights, is_read_by_its_parent
from bitpress.checkpoints.stored import Stored, stored_tensors
from bitpress.checkpoints.unknown import Unknown
from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear, find_layer
from bitpress.quantization import PackedWeight, QuantizationType, stored_format
from bitpress.quantization.grid import block_shape
from bitpress.quantization.packing import LEAVES_GAPS, SHIFTS
from bitpress.quantization.scales import ScaleKind, scale_kind
from bitpress.ranks import is_first

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Companions:
    """What is saved beside a model's weights.

    Attributes:
        recipe: the recipe as YAML.
        processor: the tokenizer or processor, if known.
        report: what happened, as JSON can hold it.
        page: what makes the HTML page of the report.
    """

    recipe: str | None = None
    processor: Any = None
    report: dict[str, Any] | None = None
    page: Callable[[dict[str, Any]], str] | None = None


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    save_compressed: bool = True,
    format: str = COMPRESSED,  # noqa: A002
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a model's checkpoint.

    Args:
        model: what ``oneshot`` returned: a transformers model, or any module (``bitpress.load`` reads those).
        directory: where to; it appears only when all is written.
        save_compressed: packed weights; False writes dense ones.
        format: "compressed-tensors", "awq", "gptq" or "gguf"; see :func:`bitpress.convert`.
        overwrite: replace a model that is in the directory.
        **options: of transformers' ``save_pretrained``, for its models.

    Raises:
        BitpressError: the directory holds a model, the disk is full, a weight was changed since it was quantized, the
            format does not hold a layer, or transformers has loaded the model from a compressed checkpoint.
    """
    check_format(format)
    if format != COMPRESSED:
        return _save_as(model, Path(directory), format, overwrite, {"save_compressed": save_compressed, **options})
    _check_options(model, options)
    layers = attached_layers(model) if save_compressed else {}
    packed = {name: packed_weight(name, layer) for name, layer in layers.items()}
    # A state dict of the caller's (gathered from many devices) is packed like the model's own.
    state = _with_packed(model, dict(options.pop("state_dict", None) or _dense_state(model)))
    path = check_destination(directory, overwrite=overwrite, needed=_bytes(model, state, packed))
    with whole_directory(path) as draft:
        if _is_transformers(model):
            attentions = attached_attentions(model) if save_compressed else {}
            _write_transformers(model, draft, state, layers, packed, attentions, options)
        else:
            _write_plain(model, draft, state, layers, packed)
        write_companions(model, draft)
    return path


def _save_as(model: nn.Module, directory: Path, kind: str, overwrite: bool, options: dict[str, Any]) -> Path:
    """Write another format, by way of compressed-tensors."""
    if not _is_transformers(model):
        raise BitpressError(f"a {type(model).__name__} is saved as {COMPRESSED} only: {kind} is read by model classes.")
    path = check_destination(directory, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as aside:
        between = save(model, Path(aside) / path.name, **options)
        shards = options.get("max_shard_size", MAX_SHARD_SIZE)
        return convert(between, path, format=kind, overwrite=overwrite, max_shard_size=shards)


def bind_save_pretrained(model: nn.Module, companions: Companions) -> None:
    """Make ``model.save_pretrained`` write the compressed checkpoint, with what belongs beside it."""
    object.__setattr__(model, "bitpress", companions)
    if _is_transformers(model):
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]
        model.push_to_hub = MethodType(push, model)  # type: ignore[assignment]


def _save_pretrained(
    model: Any, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **options: Any
) -> None:
    """Write the compressed checkpoint; see :func:`bitpress.save` for its own options."""
    if args:
        names = ("is_main_process", "state_dict")
        options.update(zip(names, args, strict=False))
    if not options.pop("is_main_process", is_first()):
        return
    path = save(model, save_directory, **options)
    if push_to_hub:
        model.push_to_hub(options.get("repo_id") or path.name, token=options.get("token"))


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(type(model), "save_pretrained") and hasattr(model, "config")


def _check_options(model: Any, options: dict[str, Any]) -> None:
    if options and not _is_transformers(model):
        raise BitpressError(f"save has no option {next(iter(options))!r} for a {type(model).__name__}.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise BitpressError("transformers has loaded this model from a compressed checkpoint: use its save_pretrained.")


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _with_packed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which layers that hold packed weights have dense ones, of no memory until they are wanted."""
    packed = {name: layer for name, layer in model.named_modules() if holds_packed(layer)}
    held = {f"{name}.{kind}" for name, layer in packed.items() for kind in layer.HELD}
    state = {name: tensor for name, tensor in state.items() if name not in held}
    return state | {f"{name}.weight": layer.empty_weight() for name, layer in packed.items()}


def _dense(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the dense weights that are wanted."""
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if holds_packed(layer)}
    return {n: layers[n].weight if n in layers and t.is_meta else t for n, t in state.items()}


def _bytes(model: nn.Module, state: dict[str, Tensor], packed: dict[str, PackedWeight]) -> int:
    experts = [s for s in stored_experts(model) if s.packable and all(name in packed for name in s.names)]
    gone = {parameter for s in experts for parameter in s.parameters} | {f"{name}.weight" for name in packed}
    unique = {t.data_ptr(): t.numel() * t.element_size() for name, t in state.items() if name not in gone}
    formats = {name: stored_format(scheme_of(find_layer(model, name))) for name in packed}
    return sum(unique.values()) + sum(p.nbytes(formats[name]) for name, p in packed.items())


def _write_transformers(
    model: Any,
    draft: Path,
    state: dict[str, Tensor],
    layers: dict[str, nn.Module],
    packed: dict[str, PackedWeight],
    attentions: dict[str, nn.Module],
    options: dict[str, Any],
) -> None:
    stored, read = plan(model, state, layers, packed, attentions)
    for name in [parameter for s in stored.apart for parameter in s.parameters]:
        del state[name]
    state = _dense(model, {n: t for n, t in state.items() if n.removesuffix(".weight") not in read})
    if not read and not attentions:
        type(model).save_pretrained(model, draft, state_dict=state, **options)
        return
    tensors = stored.tensors(model, state, packed, attentions)
    tensors |= {name: _of_its_own(tensors[name]) for name in stored.one_by_one}
    type(model).save_pretrained(model, draft, state_dict=tensors, **{**options, "save_original_format": False})
    warn_of_readers(model, read, packed)
    write_quantization_config(model, draft, read, stored, attentions)


def plan(
    model: Any,
    state: Mapping[str, Tensor],
    layers: dict[str, nn.Module],
    packed: dict[str, PackedWeight],
    attentions: dict[str, nn.Module],
) -> tuple[Stored, dict[str, nn.Module]]:
    """What the checkpoint will hold, and the layers that readers take packed; tensors may be on the meta device."""
    read = _readable(model, layers, packed)
    stored = Stored.of(model, {name: tensor.dim() for name, tensor in state.items()}, read, attentions)
    return stored, {name: layer for name, layer in read.items() if name in stored.layers}


def write_quantization_config(
    model: Any, draft: Path, read: dict[str, nn.Module], stored: Stored, attentions: dict[str, nn.Module]
) -> None:
    """Add to the config in ``draft`` how the layers ``read`` and the attentions are quantized."""
    file = draft / CONFIG_FILE
    config = json.loads(file.read_text())
    config["quantization_config"] = quantization_config(model, read, stored.apart, stored.whole, attentions)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def warn_of_readers(model: Any, read: dict[str, nn.Module], packed: dict[str, PackedWeight]) -> None:
    """Say which readers will not take what is saved."""
    _warn_of_broken_pair(packed)
    _warn_of_gaps(packed)
    _warn_of_blocks(packed)
    _warn_of_failing_load(model, read)
    _warn_of_other_dtypes({name: packed[name] for name in read})


def _readable(model: nn.Module, layers: dict[str, nn.Module], packed: dict[str, PackedWeight]) -> dict[str, nn.Module]:
    """The layers that readers take packed, with a warning of those that they do not."""
    by_itself = {name for name in layers if is_read_by_its_parent(model, name)}
    read = {n: m for n, m in layers.items() if n not in by_itself and _is_readable(m, packed[n])}
    for names, why in (
        (by_itself, "the model's own code uses their weights"),
        (layers.keys() - read.keys() - by_itself, "compressed-tensors cannot read them packed"),
    ):
        if names:
            classes = ", ".join(sorted({type(layers[name]).__name__ for name in names}))
            message = (
                "%d quantized layers (of class %s; %s) are stored dense, because %s. To keep "
                "their values, at the same size, add them to ignore."
            )
            logger.warning(message, len(names), classes, min(names), why)
    return read


def _warn_of_failing_load(model: nn.Module, read: dict[str, nn.Module]) -> None:
    failing = initializer_needs_weights(model, read)
    if failing:
        logger.warning(
            "transformers cannot load a packed %s: to initialize its %s it needs their weights. vLLM reads this "
            "checkpoint if it knows the model; in Python, use bitpress.load.",
            type(model).__name__,
            failing,
        )


def _warn_of_gaps(packed: dict[str, PackedWeight]) -> None:
    """Of what compressed-tensors 0.17 packs as later versions, and vLLM, do not."""
    bits = sorted({p.args.num_bits for p in packed.values() if p.args.type == QuantizationType.INT} - set(SHIFTS))
    if LEAVES_GAPS and bits:
        logger.warning(
            "integers of %s bits are packed as compressed-tensors %s reads them: later versions, and vLLM, read them "
            "without gaps. Save with compressed-tensors 0.18 or later for these; bitpress.load reads both.",
            " and ".join(map(str, bits)),
            _versions()[1],
        )


def _warn_of_blocks(packed: dict[str, PackedWeight]) -> None:
    """Of blocks that compressed-tensors 0.17 and 0.18, which guess them from the scales' shape, do not guess."""
    compressed = _versions()[1]
    if tuple(map(int, compressed.split(".")[:2])) >= (0, 19):
        return
    wrong = [name for name, weight in packed.items() if not _guessed_right(weight)]
    if wrong:
        logger.warning(
            "transformers with compressed-tensors %s takes the blocks of %s (%d layers in all) for others: load the "
            "checkpoint with compressed-tensors 0.19 or later, or use bitpress.load.", compressed, wrong[0], len(wrong)
        )  # fmt: skip


def _guessed_right(weight: PackedWeight) -> bool:
    block = block_shape(weight.args)
    if block is None:
        return True
    (rows, columns), (height, width) = weight.shape, block
    return not rows % height and not columns % width and columns > width and rows > height


def _warn_of_other_dtypes(packed: dict[str, PackedWeight]) -> None:
    """compressed-tensors makes bfloat16 of weights whose scales are stored in a dtype of their own."""
    own = [p for p in packed.values() if p.scale.dtype != torch.bfloat16 and scale_kind(p.args) != ScaleKind.PLAIN]
    if own:
        logger.warning(
            "transformers reads these %d-bit float weights as bfloat16, and the model is %s: load it with "
            "dtype=torch.bfloat16, or use bitpress.load.",
            own[0].args.num_bits,
            str(own[0].scale.dtype).removeprefix("torch."),
        )


def _write_plain(
    model: nn.Module,
    draft: Path,
    state: dict[str, Tensor],
    layers: dict[str, nn.Module],
    packed: dict[str, PackedWeight],
) -> None:
    experts = [s for s in stored_experts(model) if all(layer in packed for layer in s.names)]
    for name in [parameter for s in experts for parameter in s.parameters]:
        del state[name]
    tensors = _dense(model, _replace_weights(state, layers, packed))
    shared: dict[int, str] = {}
    aliases = {}
    for name, tensor in list(tensors.items()):
        first = shared.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first != name and (tensors[first].shape, tensors[first].stride()) == (tensor.shape, tensor.stride()):
            aliases[name] = first
            del tensors[name]
    save_file({n: _of_its_own(t) for n, t in tensors.items()}, draft / WEIGHTS_FILE, metadata={"format": "pt"})
    config: dict[str, Any] = {"architectures": [type(model).__name__], "tied_weights": aliases}
    if layers:
        config["quantization_config"] = quantization_config(model, layers)
    (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _of_its_own(tensor: Tensor) -> Tensor:
    """Contiguous, and not a view of a part of another tensor, which safetensors refuses."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _is_readable(layer: nn.Module, weight: PackedWeight) -> bool:
    """False for what compressed-tensors cannot load packed; it is stored dense, on the same grid.

    It attaches schemes to nn.Linear only (not to GPT-2's Conv1D), and up to 0.20 fails to unpack 4-bit zero points of
    8 rows or fewer.
    """
    rows, groups = weight.shape[0], weight.scale.shape[-1]
    few_rows = weight.args.num_bits == 4 and not weight.args.symmetric and rows <= 8 and groups > 1
    return isinstance(layer, nn.Linear) and not few_rows


def _replace_weights(
    state: dict[str, Tensor], layers: dict[str, nn.Module], packed: dict[str, PackedWeight]
) -> dict[str, Tensor]:
    """The state dict with each quantized layer's weight in its stored form."""
    weights = {f"{name}.weight" for name in packed}
    tensors = {name: tensor for name, tensor in state.items() if name not in weights}
    for name, weight in packed.items():
        own = stored_tensors(layers[name], weight)
        tensors |= {f"{name}.{kind}": t for kind, t in own.items()}
    return tensors


def write_companions(model: nn.Module, draft: Path) -> None:
    """Write what belongs beside the weights, and the config, that are in ``draft``."""
    companions: Companions | None = getattr(model, "bitpress", None)
    if companions is None:
        return
    if companions.recipe:
        (draft / RECIPE_FILE).write_text(companions.recipe, encoding="utf-8")
    if companions.processor is not None:
        companions.processor.save_pretrained(draft)
    if companions.report:
        loads = _loads_in_transformers(model, companions.report["layers"])
        report = {**companions.report, "loads_in_transformers": loads}
        (draft / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if companions.page is not None:
            (draft / PAGE_FILE).write_text(companions.page(report), encoding="utf-8")
        write_card(draft)


def _loads_in_transformers(model: nn.Module, layers: Collection[str]) -> bool:
    """False for what :func:`warn_of_readers` and docs/schemes.md except."""
    if (
        not _is_transformers(model)
        or isinstance(model, Unknown)
        or any(isinstance(find_layer(model, n), ExpertLinear) for n in layers)
    ):
        return False
    return initializer_needs_weights(model, layers) is None


@functools.cache
def _versions() -> tuple[str, str]:
    return version("transformers"), version("compressed-tensors")


def _warn_of_broken_pair(packed: dict[str, PackedWeight]) -> None:
    """The pair of transformers 5.23.0 with compressed-tensors 0.18 to 0.20 cannot load asymmetric packed weights."""
    transformers, compressed = _versions()
    asymmetric = any(not p.args.symmetric for p in packed.values())
    if asymmetric and transformers == "5.23.0" and not compressed.startswith("0.17."):
        warnings.warn(
            f"transformers {transformers} with compressed-tensors {compressed} cannot load this asymmetric checkpoint "
            "(the load stops with a size mismatch of weight_zero_point). Load it with transformers 5.22.2, or with "
            "compressed-tensors 0.17.1.",
            stacklevel=4,
        )
