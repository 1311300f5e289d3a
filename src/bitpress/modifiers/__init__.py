"""What users compose into a recipe."""

from bitpress.modifiers.awq import AWQModifier
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.distillation import DistillationModifier
from bitpress.modifiers.generated import GeneratedTextModifier
from bitpress.modifiers.gptq import GPTQModifier
from bitpress.modifiers.mappings import AWQMapping, exclude_mapping, register_mappings
from bitpress.modifiers.quantization import QuantizationModifier
from bitpress.modifiers.rounding import LearnedRoundingModifier
from bitpress.modifiers.smoothquant import SmoothQuantModifier
from bitpress.modifiers.state import State

__all__ = [
    "AWQMapping",
    "AWQModifier",
    "DistillationModifier",
    "GPTQModifier",
    "GeneratedTextModifier",
    "LearnedRoundingModifier",
    "Modifier",
    "QuantizationModifier",
    "SmoothQuantModifier",
    "State",
    "exclude_mapping",
    "register_mappings",
]
