"""Calibration text that the model writes itself.

A model's own text is a sample of all that it has learned, and no dataset is needed for it: Liu et al., 2023, LLM-QAT
(https://arxiv.org/abs/2305.17888, section 3.1), train on nothing else. Here it stands beside the user's data, so that
what learns from this data does not forget the rest.
"""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.devices import device_of
from bitpress.modifiers.state import Writing
from bitpress.pipelines.data.batches import Batch, CalibrationData
from bitpress.ranks import current

logger = logging.getLogger(__name__)

# Tokens of a batch, where there is no other data to say.
BATCH = 512


def with_generated(
    data: CalibrationData | None, model: nn.Module, writing: Writing, tokenizer: Any, seed: int
) -> CalibrationData:
    """The data, and among it, evenly, batches of text that the model writes; these alone if there is no other.

    Args:
        data: what the user gave; its batches hold token ids.
        model: a transformers model that generates text, in memory.
        writing: how much of it.
        tokenizer: tells which tokens every text begins with, and which are no text; or None.
        seed: of what is drawn.

    Raises:
        BitpressError: the model does not generate text, and there is no other data.
    """
    given = [] if data is None else data.batches
    positions = [_positions(batch) for batch in given]
    if not can_write(model) or None in positions:
        what = "batches of other than token ids" if can_write(model) else type(model).__name__
        if data is None:
            raise BitpressError(
                f"GeneratedTextModifier: {what} writes no text to calibrate on: give oneshot a dataset."
            )
        logger.warning("GeneratedTextModifier: with %s no text is written; the dataset is all there is.", what)
        return data
    logger.log(
        logging.WARNING if data is None else logging.INFO,
        "the model writes %d sequences of %d tokens%s.",
        writing.samples,
        writing.length,
        ", which is all there is to calibrate on: no dataset was given" if data is None else "",
    )
    ids = current().from_first(write(model, writing, tokenizer, seed))
    rows = max(1, (max(p or 0 for p in positions) if positions else BATCH) // writing.length)
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    own = [
        Batch((), {"input_ids": part, **({"attention_mask": torch.ones_like(part)} if takes_mask else {})})
        for part in ids.split(rows)
    ]
    samples, tokens = (0, 0) if data is None else (data.samples, data.tokens)
    sliceable = data is None or data.sliceable
    return CalibrationData(_among(given, own), samples + len(ids), tokens + ids.numel(), sliceable)


def can_write(model: nn.Module) -> bool:
    """True for a transformers model that goes on with a text, and needs nothing else for it."""
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    return can is not None and can() and not getattr(config, "is_encoder_decoder", False)


@torch.no_grad()
def write(model: nn.Module, writing: Writing, tokenizer: Any, seed: int) -> Tensor:
    """Sequences that begin with a random token each, and go on as the model's predictions say, at temperature 1.

    Returns:
        (samples, length), int64, on the CPU.
    """
    from transformers import GenerationConfig, LogitsProcessorList  # noqa: PLC0415

    prefix = _prefix(tokenizer)
    size = model.get_input_embeddings().num_embeddings if tokenizer is None else len(tokenizer)  # type: ignore[operator]
    special = set(getattr(tokenizer, "all_special_ids", ())) | _ends(model)
    draw = torch.Generator().manual_seed(seed)
    texts = torch.tensor([token for token in range(size) if token not in special])
    first = texts[torch.randint(len(texts), (writing.samples, 1), generator=draw)]
    start = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(writing.samples, -1), first], 1)
    missing = writing.length - start.shape[1]
    # Nothing of the model's own settings: they make the text likelier than its predictions are.
    settings = GenerationConfig(do_sample=False, max_new_tokens=missing, pad_token_id=0, use_cache=True)
    device = device_of(model)
    draws = LogitsProcessorList([_Draws(sorted(special), draw)])
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        start = start.to(device)
        mask = torch.ones_like(start)
        found: Tensor = model.generate(start, attention_mask=mask, generation_config=settings, logits_processor=draws)  # type: ignore[operator]
    finally:
        for module, training in modes.items():
            module.training = training
    return found.cpu()


class _Draws:
    """Draws each next token from the model's predictions, and leaves no choice but it.

    A logits processor, for a search that takes the likeliest. The inverse of the cumulative distribution needs one
    random number for each sequence, where torch.multinomial draws one for each word.
    """

    def __init__(self, forbidden: list[int], generator: torch.Generator) -> None:
        self._forbidden, self._generator = torch.tensor(forbidden, dtype=torch.int64), generator

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        scores = scores.index_fill(1, self._forbidden.to(scores.device), -torch.inf)
        sums = scores.softmax(-1).cumsum(-1)
        # Just short of 1, where rounding could point behind the last word.
        at = torch.rand(len(scores), 1, generator=self._generator) * (1 - 2.0**-20)
        chosen = torch.searchsorted(sums, at.to(sums) * sums[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _ends(model: nn.Module) -> set[int]:
    """The tokens at which the model would stop."""
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    around: list[int] = [] if tokenizer is None else tokenizer("")["input_ids"]
    ends = around and around[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id
    return around[:-1] if ends else around


def _positions(batch: Batch) -> int | None:
    """How many token ids a batch holds; None if it holds none."""
    ids = batch.kwargs.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else None


def _among(given: list[Batch], own: list[Batch]) -> list[Batch]:
    """Both, each in its order, evenly mixed."""
    places = [
        ((i + 0.5) / len(part), kind, batch) for kind, part in enumerate((given, own)) for i, batch in enumerate(part)
    ]
    return [batch for _, _, batch in sorted(places, key=lambda place: place[:2])]
