"""Checkpoints of each scheme behind vLLM: it says what the model in memory says, or refuses the scheme.

Its CPU backend is what is tested: others read the same files, and take more schemes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from serving.comparing import PROMPTS, Agreement, compare, smollm2
from serving.server import RefusedError, serve

from bitpress import oneshot
from bitpress.modifiers import QuantizationModifier
from bitpress.quantization import QuantizationArgs, QuantizationScheme

pytestmark = pytest.mark.serving

logger = logging.getLogger(__name__)

ATTENTION, MLP = r"re:.*self_attn\..*_proj$", r"re:.*mlp\.(gate|up)_proj$"
DOWN = r"re:.*down_proj$"


def group(weights: dict[str, Any], inputs: dict[str, Any] | None = None, *targets: str, **more: Any) -> Any:
    of_inputs = None if inputs is None else QuantizationArgs(**inputs)
    found = list(targets) or ["Linear"]
    return QuantizationScheme(
        targets=found, weights=QuantizationArgs(**weights), input_activations=of_inputs, **more
    )


def integers(bits: int, size: int | None = None, *, symmetric: bool = True) -> dict[str, Any]:
    extent = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **extent}


def grouped(*groups: Any, **fields: Any) -> QuantizationModifier:
    return QuantizationModifier(
        ignore=["lm_head"], config_groups={f"group_{i}": each for i, each in enumerate(groups)}, **fields
    )


def preset(name: str, **fields: Any) -> QuantizationModifier:
    return QuantizationModifier(ignore=["lm_head"], scheme=name, **fields)


INT8, PER_TOKEN, PER_TENSOR = integers(8), {"num_bits": 8, "strategy": "token", "dynamic": True}, {"num_bits": 8}
FP8 = {"num_bits": 8, "type": "float"}


@dataclass(frozen=True)
class Case:
    """A scheme, and what becomes of it.

    Attributes:
        recipe: makes the modifier.
        refusal: a pattern of the server's error, of a scheme that its CPU backend does not take.
        calibrated: its activations are static.
        options: of the server.
    """

    recipe: Callable[[], QuantizationModifier]
    refusal: str | None = None
    calibrated: bool = False
    options: tuple[str, ...] = field(default=())


SERVED = {
    "W4A16, groups of 32": Case(lambda: grouped(group(integers(4, 32)))),
    "W4A16, groups of 64": Case(lambda: grouped(group(integers(4, 64)))),
    "W4A16, per channel": Case(lambda: grouped(group(integers(4)))),
    "W4A16 asymmetric, groups of 32": Case(lambda: grouped(group(integers(4, 32, symmetric=False)))),
    "W4A16 asymmetric, groups of 64": Case(lambda: grouped(group(integers(4, 64, symmetric=False)))),
    "W4A16 asymmetric, per channel": Case(lambda: grouped(group(integers(4, symmetric=False)))),
    "W4A16, groups of 128 in down_proj, of 64 elsewhere": Case(
        lambda: grouped(group(integers(4, 128), None, DOWN), group(integers(4, 64), None, ATTENTION, MLP))
    ),
    "W8A8, inputs per token": Case(lambda: preset("W8A8")),
    "W8A8, inputs per token, asymmetric": Case(lambda: grouped(group(INT8, {**PER_TOKEN, "symmetric": False}))),
    "W8A8, static inputs": Case(lambda: grouped(group(INT8, PER_TENSOR)), calibrated=True),
    "W8A8, static asymmetric inputs": Case(
        lambda: grouped(group(INT8, {**PER_TENSOR, "symmetric": False})), calibrated=True
    ),
    "W8A8 attention, W4A16 MLP": Case(
        lambda: grouped(group(INT8, PER_TOKEN, ATTENTION), group(integers(4, 64), None, MLP, DOWN))
    ),
    "W4A16 MLP, attention as it is": Case(lambda: grouped(group(integers(4, 64), None, MLP, DOWN))),
}
