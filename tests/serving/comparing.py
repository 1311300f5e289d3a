"""What a served model says beside what the model in memory says: SmolLM2-135M, five prompts, 32 tokens each."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from serving.server import Server

TOKENS = 32
PROMPTS = (
    "The old lighthouse keeper had not spoken to anyone for three weeks, and when the boat finally came",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Water boils at 100 degrees Celsius at sea level, but on a high mountain it boils at a lower temperature because",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "To make a simple tomato soup for four people you need the following ingredients:",
)


@cache
def smollm2() -> Any:
    """The module of examples that makes the model."""
    file = Path(__file__).parents[2] / "examples" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tokenizer() -> Any:
    return smollm2().load_smollm2()[1]


def prompts() -> list[list[int]]:
    return [tokenizer()(text).input_ids for text in PROMPTS]


@torch.no_grad()
def continuations(model: Any) -> list[list[int]]:
    """The greedy continuation of each prompt, as :meth:`Server.continuations` has it."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts()]


@torch.no_grad()
def log_probabilities(model: Any, texts: list[list[int]]) -> list[list[float]]:
    """Of each text's tokens, but for the first, as :meth:`Server.log_probabilities` has them."""
    found = []
    for ids in texts:
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        found.append(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist())
    return found


@dataclass(frozen=True)
class Agreement:
    """How a served model agrees with the model in memory.

    Attributes:
        same: of the prompts, how many have the same continuation to the last token.
        mean: of the absolute differences of the log-probabilities of all tokens of prompts and continuations, in nats.
        most: the greatest of them.
    """

    same: int
    mean: float
    most: float


def compare(model: Any, server: Server) -> Agreement:
    """Continuations, and log-probabilities of the same texts: the prompts with the continuations of ``model``.

    The model in memory computes in float32 with the weights that it has, so that what is seen is the server's rounding.
    """
    model = model.float()
    own = continuations(model)
    served = server.continuations(prompts(), TOKENS)
    texts = [prompt + ids for prompt, ids in zip(prompts(), own, strict=True)]
    pairs = zip(log_probabilities(model, texts), server.log_probabilities(texts), strict=True)
    apart = torch.tensor([a - b for one, other in pairs for a, b in zip(one, other, strict=True)]).abs()
    same = sum(a == b for a, b in zip(own, served, strict=True))
    return Agreement(same, float(apart.mean()), float(apart.max()))
