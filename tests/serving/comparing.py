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


@dataclass(frozen=True)
class Agreement:
    """How a served model agrees with the model in memory.

    Attributes:
        same: how many of the prompts' continuations are those of the model in memory, to the last token.
        mean: of the absolute differences of the log-probabilities of all tokens of prompts and continuations, in nats.
        most: the greatest of them.
    """

    same: int
    mean: float
    most: float


@torch.no_grad()
def compare(model: Any, server: Server) -> Agreement:
    """The server's greedy continuations, read by the model in memory.

    Its own are the same where each token is the likeliest given those before it. It computes in float32 with the
    weights that it has, so that what is seen is the server's rounding.
    """
    model = model.float()
    same, apart = 0, []
    for prompt, served in zip(prompts(), server.continuations(prompts(), TOKENS), strict=True):
        ids = torch.tensor(prompt + served.tokens)
        predicted = model(ids[None]).logits[0, :-1].log_softmax(-1)
        own = predicted.gather(1, ids[1:, None])[:, 0]
        same += torch.equal(predicted.argmax(-1)[-TOKENS:], ids[-TOKENS:])
        apart.append((own - torch.tensor(served.log_probabilities)).abs())
    return Agreement(same, float(torch.cat(apart).mean()), float(torch.cat(apart).max()))
