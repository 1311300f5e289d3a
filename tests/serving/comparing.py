"""What a served model says beside what the model in memory says: SmolLM2-135M, five prompts, 32 tokens each."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.utils import helpers
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
        rounding: the mean for the model in memory in float16 beside itself in float32.
    """

    same: int
    mean: float
    most: float
    rounding: float


@contextmanager
def inputs_rounded_as_served() -> Iterator[None]:
    """Within it, a scale of inputs found at run time on a symmetric grid of 8 bits is the greatest value over 127.

    So vLLM's kernels have it, and most; compressed-tensors divides by 127.5, which rounds every input another way.
    """
    own = helpers.calculate_qparams

    def calculate_qparams(least: Any, greatest: Any, args: Any, *more: Any, **options: Any) -> Any:
        scale, zero_point = own(least, greatest, args, *more, **options)
        return (scale * (127.5 / 127) if args.symmetric and args.type == "int" else scale), zero_point

    helpers.calculate_qparams = calculate_qparams
    try:
        yield
    finally:
        helpers.calculate_qparams = own


@torch.no_grad()
def compare(model: Any, server: Server) -> Agreement:
    """The server's greedy continuations, read by the model in memory, which is given in float16.

    Its own are the same where each token is the likeliest given those before it. It computes in float32 with the
    weights that it has, so that what is seen is the server's rounding.
    """
    read = list(zip(prompts(), server.continuations(prompts(), TOKENS), strict=True))
    rows = [torch.tensor(prompt + served.tokens) for prompt, served in read]
    with inputs_rounded_as_served():
        halved = [_log_probabilities(model, ids) for ids in rows]
        model = model.float()
        full = [_log_probabilities(model, ids) for ids in rows]
    same = sum(
        torch.equal(predicted.argmax(-1)[-TOKENS:], ids[-TOKENS:]) for predicted, ids in zip(full, rows, strict=True)
    )
    own = [_of_tokens(predicted, ids) for predicted, ids in zip(full, rows, strict=True)]
    apart = torch.cat([o - torch.tensor(s.log_probabilities) for o, (_, s) in zip(own, read, strict=True)]).abs()
    rounding = torch.cat([o - _of_tokens(h, ids) for o, h, ids in zip(own, halved, rows, strict=True)]).abs()
    return Agreement(same, float(apart.mean()), float(apart.max()), float(rounding.mean()))


def _log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of all tokens at each place but the first: (tokens - 1, vocabulary), in float32."""
    return model(ids[None]).logits[0, :-1].float().log_softmax(-1)


def _of_tokens(predicted: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return predicted.gather(1, ids[1:, None])[:, 0]
