"""Continuations of prompts: what a model says, and what the original said."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitpress.errors import BitpressError
from bitpress.evaluation.subjects import Subject

NEW_TOKENS = 48


@dataclass(frozen=True)
class Continuation:
    """How a prompt goes on, always by the likeliest token.

    Attributes:
        prompt: the text.
        model: what the model adds, 48 tokens at most.
        original: what the original adds; None if there is none.
    """

    prompt: str
    model: str
    original: str | None = None


def check_prompts(subject: Subject, prompts: Sequence[str]) -> None:
    """Refuse prompts to what does not generate text.

    Raises:
        BitpressError: there is no tokenizer, the model does not generate, or there is nothing to go on from.
    """
    if not prompts:
        return
    if subject.tokenizer is None:
        raise BitpressError("prompts need a tokenizer: pass tokenizer=.")
    if not hasattr(subject.model, "generate"):
        raise BitpressError(f"{subject.name} does not generate text: leave the prompts out.")
    for prompt in prompts:
        if not subject.tokenizer(prompt)["input_ids"]:
            raise BitpressError(f"the prompt {prompt!r} has no tokens: leave it out.")


def continue_prompts(subject: Subject, original: Subject | None, prompts: Sequence[str]) -> tuple[Continuation, ...]:
    """Let the model, and the original, go on from each prompt."""
    return tuple(
        Continuation(prompt, _added(subject, prompt), None if original is None else _added(original, prompt))
        for prompt in prompts
    )


def _added(subject: Subject, prompt: str) -> str:
    model: Any = subject.model
    tokens = subject.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(subject.device)
    found = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    text: str = subject.tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
