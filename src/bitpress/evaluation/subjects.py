"""What is evaluated: a module, or what a path or hub id names, with its tokenizer."""

import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoints import load
from bitpress.checkpoints.directory import CONFIG_FILE, read_config
from bitpress.checkpoints.pretrained import load_named, split_gguf
from bitpress.errors import BitpressError
from bitpress.memory import free_memory
from bitpress.models.devices import device_of
from bitpress.pipelines.calibrating import calibrating
from bitpress.session.devices import find_device, parameters_bytes

# Of a model that does not look ahead another last token changes nothing before it, but for activations that are
# quantized by a tensor's range.
CAUSAL_WITHIN = 0.1  # of the logits' standard deviation


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under evaluation.

    Attributes:
        name: its path, hub id, or class.
        model: on its device.
        tokenizer: its own, or None.
    """

    name: str
    model: nn.Module
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return device_of(self.model)

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What it predicts at each position: (rows, positions, vocabulary).

        Raises:
            BitpressError: its output has none.
        """
        masked = {} if mask is None else {"attention_mask": mask.to(self.device)}
        logits = getattr(self.model(input_ids=ids.to(self.device), **masked), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[: ids.ndim] != ids.shape or logits.ndim != ids.ndim + 1:
            raise BitpressError(f"{self.name} gives no logits for each position. {_SUPPORTED}")
        return logits

    def predicts(self, ids: Tensor) -> bool:
        """Whether it predicts each token from those before it.

        That is tried: another last token must not move what is predicted before it.

        Args:
            ids: (tokens,) of the data, at least 2.
        """
        try:
            inspect.signature(self.model.forward).bind(input_ids=ids)
        except TypeError:
            return False
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return False
        rows = ids[:4].repeat(2, 1)
        rows[1, -1] = (rows[0, -1] + 1) % max(2, int(rows.max()) + 1)
        try:
            logits = self.logits(rows).float()
        except BitpressError:
            return False
        moved = (logits[0, :-1] - logits[1, :-1]).abs().max()
        # What is no number at all says nothing against it.
        return not bool(moved > CAUSAL_WITHIN * logits.std())

    def refuse(self) -> BitpressError:
        """The error for a model that does not predict tokens."""
        return BitpressError(
            f"{self.name} is no causal language model: it does not predict each token from those before it. "
            f"{_SUPPORTED}"
        )


_SUPPORTED = (
    "Perplexity, questions and tasks are for causal language models. Of any other module the agreement with an "
    "original can be measured: pass original= and, as dataset=, token ids or batches of what its forward takes."
)


def open_subject(
    given: nn.Module | str | os.PathLike[str],
    tokenizer: Any,
    *,
    device: torch.device | str | None,
    trust_remote_code: bool,
) -> Subject:
    """A model, loaded where it is named, with its tokenizer.

    Args:
        given: a module, or a path or hub id.
        tokenizer: one, or a path or hub id; None takes what lies beside a model that is named.
        device: for a model that is named.
        trust_remote_code: let transformers run code that comes with a checkpoint.

    Raises:
        BitpressError: nothing can be loaded by the name, or the device has no room for it.
    """
    if isinstance(given, nn.Module):
        # Computed where it is: `device` is for the other one, if that is named.
        return Subject(type(given).__name__, given, _tokenizer(tokenizer, trust_remote_code))
    place = find_device(device)
    model = _load(given, trust_remote_code)
    needed, free = parameters_bytes(model), free_memory(place)
    if place.type != "cpu" and needed > free:
        raise BitpressError(
            f'{given} takes {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that {place} has free: state device="cpu".'
        )
    found = _beside(given, trust_remote_code) if tokenizer is None else _tokenizer(tokenizer, trust_remote_code)
    return Subject(str(given), model.to(place), found)


def check_same_tokens(subject: Subject, original: Subject) -> None:
    """Refuse two models for which the same token ids say different things.

    Raises:
        BitpressError: names the first token that differs.
    """
    ours, theirs = (_by_id(each.tokenizer) for each in (subject, original))
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            raise BitpressError(
                f"{subject.name} and {original.name} have different tokenizers (token {index} is {ours[index]!r} for "
                f"the one, {theirs[index]!r} for the other), so that their predictions cannot be compared token by "
                "token. Compare their bits per byte: evaluate each without original=."
            )


def common_vocabulary(ours: int, theirs: int, tokens: int | None) -> int:
    """How many of the logits two models share: all, or those of the smaller one where the rest is padding.

    Args:
        ours: logits of the model.
        theirs: logits of the original.
        tokens: how many the tokenizer knows; None without one.

    Raises:
        BitpressError: one predicts tokens that the other does not have.
    """
    common = min(ours, theirs)
    if ours != theirs and (tokens is None or tokens > common):
        raise BitpressError(
            f"the model predicts {ours} tokens, the original {theirs}: they cannot be compared, unless the tokenizer "
            f"({tokens if tokens is not None else 'which is not given'}) has no more than {common} of them and the "
            "rest is padding."
        )
    return common


@contextmanager
def evaluating(*subjects: Subject | None) -> Iterator[None]:
    """Inside the ``with``: evaluation mode, no gradients, no cache; all as it was afterwards.

    Not ``torch.inference_mode``: a tensor that a module made inside it and kept could not be trained with later.
    """
    models = {id(each.model): each.model for each in subjects if each is not None}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(calibrating(model, all_experts=False, one_by_one=False))
        yield


def _load(given: Any, trust_remote_code: bool) -> nn.Module:
    config = Path(given).expanduser() / CONFIG_FILE if isinstance(given, (str, os.PathLike)) else None
    if config is not None and config.is_file():
        stated = read_config(config.parent)
        if (stated.get("quantization_config") or {}).get("quant_method") == "compressed-tensors":
            options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
            return load(config.parent, **options)
    return load_named(given, trust_remote_code=trust_remote_code)


def _tokenizer(given: Any, trust_remote_code: bool) -> Any:
    if not isinstance(given, (str, os.PathLike)):
        return given
    import transformers  # noqa: PLC0415

    place, file = split_gguf(given)
    try:
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **file)
    except (OSError, ValueError) as error:
        raise BitpressError(f"there is no tokenizer in {str(given)!r}: {error}") from error


def _beside(given: str | os.PathLike[str], trust_remote_code: bool) -> Any:
    """The tokenizer beside a model, or None."""
    try:
        return _tokenizer(given, trust_remote_code)
    except Exception:  # whatever a tokenizer's own code lacks: data of token ids need none
        return None


def _by_id(tokenizer: Any) -> dict[int, str]:
    known = getattr(tokenizer, "get_vocab", None)
    return {} if known is None else {index: token for token, index in known().items()}
