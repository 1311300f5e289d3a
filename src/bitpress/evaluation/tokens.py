"""The figures of every token that is scored, of one model or of two side by side."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.evaluation.scores import divergence, negative_log_likelihood
from bitpress.evaluation.subjects import Subject, common_vocabulary
from bitpress.evaluation.text import Text
from bitpress.evaluation.windows import Window, batches

# Tokens before the one that is shown.
CONTEXT = 12


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One value for each scored token, on the CPU; all of shape (tokens,).

    Attributes:
        sequence: int64, which sequence of the dataset.
        position: int64, the place in it.
        token: int64, its id.
        nll: float32, ``-log p(token)`` of the model, in nats.
        top: int64, the token that the model holds most likely.
        original_nll: float32, the original's; None without one, as those below.
        original_top: int64, the original's.
        divergence: float32, ``KL(original || model)`` of the two predictions, in nats.
    """

    sequence: Tensor
    position: Tensor
    token: Tensor
    nll: Tensor
    top: Tensor
    original_nll: Tensor | None = None
    original_top: Tensor | None = None
    divergence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.token)

    def tensors(self) -> dict[str, Tensor]:
        """By name, without those that are None."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if value is not None}

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write all of it to a .safetensors or .json file.

        Raises:
            BitpressError: the name has another ending.
        """
        path = check_file(file)
        if path.suffix == ".json":
            path.write_text(json.dumps({name: value.tolist() for name, value in self.tensors().items()}))
        else:
            save_file({name: value.contiguous() for name, value in self.tensors().items()}, path)


@dataclass(frozen=True)
class WorstToken:
    """A token before which the model departs from the original.

    Attributes:
        divergence: ``KL(original || model)`` there, in nats.
        sequence: which sequence of the dataset.
        position: the token's place in it.
        context: what comes before it.
        token: the token itself.
        original_says: what the original holds most likely.
        model_says: what the model does.
    """

    divergence: float
    sequence: int
    position: int
    context: str
    token: str
    original_says: str
    model_says: str


def check_file(file: str | os.PathLike[str]) -> Path:
    """The path of a file that :meth:`TokenScores.save` can write.

    Raises:
        BitpressError: the name has another ending.
    """
    path = Path(file).expanduser()
    if path.suffix not in (".json", ".safetensors"):
        raise BitpressError(f"{path}: figures of tokens are written to a .safetensors or a .json file.")
    return path


def score_tokens(
    subject: Subject,
    original: Subject | None,
    text: Text,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> TokenScores:
    """Run all windows, once through each model.

    Args:
        subject: the model.
        original: what it is compared with.
        text: the windows.
        batch_size: windows that run together.
        on_batch: called after each batch with the number of its windows.

    Raises:
        BitpressError: an output has no logits, or they are of different tokens.
    """
    rows: list[dict[str, Tensor]] = []
    for group in batches(text.windows, batch_size):
        rows += _score(subject, original, group)
        on_batch(len(group))
    return TokenScores(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def worst_tokens(scores: TokenScores, text: Text, tokenizer: Any, count: int) -> tuple[WorstToken, ...]:
    """The tokens of the largest divergence, the worst first."""
    if scores.divergence is None or scores.original_top is None:
        return ()
    values, order = scores.divergence.sort(descending=True, stable=True)
    found = []
    for value, index in zip(values[:count].tolist(), order[:count].tolist(), strict=True):
        sequence, position = int(scores.sequence[index]), int(scores.position[index])
        before = text.sequences[sequence][max(0, position - CONTEXT) : position]
        says = [_spelled(tokenizer, ids[index : index + 1]) for ids in (scores.token, scores.original_top, scores.top)]
        found.append(WorstToken(value, sequence, position, _spelled(tokenizer, before), *says))
    return tuple(found)


def _score(subject: Subject, original: Subject | None, group: Sequence[Window]) -> Iterator[dict[str, Tensor]]:
    """The figures of each window."""
    ids = torch.stack([window.ids for window in group])
    outputs = subject.logits(ids)
    others = original.logits(ids) if original is not None else None
    for row, window in enumerate(group):
        scored = slice(window.scored - 1, -1)
        yield _score_window(window, outputs[row, scored], None if others is None else others[row, scored], subject)


def _score_window(window: Window, logits: Tensor, other: Tensor | None, subject: Subject) -> dict[str, Tensor]:
    targets = window.ids[window.scored :]
    position = torch.arange(window.scored, len(window.ids)) + window.start
    found = {
        "sequence": torch.full_like(position, window.sequence),
        "position": position,
        "token": targets,
        "nll": negative_log_likelihood(logits, targets.to(logits.device)),
        "top": logits.argmax(-1),
    }
    if other is not None:
        known = len(subject.tokenizer) if subject.tokenizer is not None else None
        common = common_vocabulary(logits.shape[-1], other.shape[-1], known)
        found["original_nll"] = negative_log_likelihood(other, targets.to(other.device))
        found["original_top"] = other.argmax(-1)
        found["divergence"] = divergence(other[:, :common].to(logits.device), logits[:, :common])
    return {name: value.cpu() for name, value in found.items()}


def _spelled(tokenizer: Any, ids: Tensor) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
