"""bitpress: small models from a recipe."""

from bitpress.checkpoints import convert, save
from bitpress.compare import compare
from bitpress.errors import BitpressError
from bitpress.evaluate import evaluate
from bitpress.evaluation import Evaluation
from bitpress.inspect import inspect
from bitpress.mappings import find_mappings
from bitpress.modifiers import (
    AWQMapping,
    AWQModifier,
    DistillationModifier,
    GPTQModifier,
    Modifier,
    QuantizationModifier,
    SmoothQuantModifier,
    register_mappings,
)
from bitpress.oneshot import oneshot
from bitpress.plan import plan
from bitpress.runtime import load
from bitpress.session import Recipe

__all__ = [
    "AWQMapping",
    "AWQModifier",
    "BitpressError",
    "DistillationModifier",
    "Evaluation",
    "GPTQModifier",
    "Modifier",
    "QuantizationModifier",
    "Recipe",
    "SmoothQuantModifier",
    "compare",
    "convert",
    "evaluate",
    "find_mappings",
    "inspect",
    "load",
    "oneshot",
    "plan",
    "register_mappings",
    "save",
]
