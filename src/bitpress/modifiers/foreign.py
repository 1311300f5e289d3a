"""What llm-compressor's recipes say and modifiers here have no field for: each is taken, or refused with the way out.

A value that asks for what is done anyway is taken without a word. One that has no meaning here is taken with a warning
that says what there is in its place. All else is an error.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foreign:
    """A field, or an argument, of the other tool.

    Attributes:
        instead: what there is in its place: the end of the warning, or of the error.
        same: values that ask for what is done anyway.
        refused: True if another value asks for what is not done.
        silent: True if nothing is lost, whatever the value.
    """

    instead: str
    same: tuple[Any, ...] = (None,)
    refused: bool = False
    silent: bool = False

    def take(self, name: str, value: Any, where: str) -> str | None:
        """Why ``value`` of field ``name``, of the modifier or function ``where``, cannot be taken; None if it can.

        That it means nothing here is warned of.
        """
        if self.silent or any(value is each or (type(value) is type(each) and value == each) for each in self.same):
            return None
        if self.refused:
            return f"{where}: {name}={value!r} of llm-compressor is not supported: {self.instead}"
        logger.warning("%s: %s=%r of llm-compressor has no meaning here: %s", where, name, value, self.instead)
        return None


_ONE_SHOT = Foreign("bitpress does not train: leave it out.", (None, -1, -1.0, 0, 0.0), refused=True)
_MINMAX = (None, "static_minmax", "minmax", "memoryless_minmax")
_SEQUENTIAL = "blocks are found; oneshot(sequential_targets=...) states them."

OF_ALL: Mapping[str, Foreign] = {
    "requires_calibration_data": Foreign("the modifier knows.", silent=True),
    "index": Foreign("modifiers run in the order in which they stand.", silent=True),
    "group": Foreign("stages are not told apart.", silent=True),
    "start": _ONE_SHOT,
    "end": _ONE_SHOT,
    "update": _ONE_SHOT,
}
OF_QUANTIZATION: Mapping[str, Foreign] = {
    **OF_ALL,
    "bypass_divisibility_checks": Foreign(
        "group sizes divide the inputs of a layer: choose one that does, or add the layer to ignore.",
        (None, False),
        refused=True,
    ),
    "input_observer": Foreign(
        "static ranges reach from the least to the greatest value of calibration: leave it out.", _MINMAX, refused=True
    ),
    "output_observer": Foreign(
        "static ranges reach from the least to the greatest value of calibration: leave it out.", _MINMAX, refused=True
    ),
}
OF_GPTQ: Mapping[str, Foreign] = {
    **OF_QUANTIZATION,
    "batched_quantization": Foreign("layers that share their input are solved together anyway.", (None, "auto")),
    "offload_hessians": Foreign("Gram matrices are there for one block at a time.", (None, False)),
    "sequential_update": Foreign(
        'each block sees what the compressed ones before it give; oneshot(pipeline="basic") is the other way.',
        (None, True),
    ),
    "sequential_targets": Foreign(_SEQUENTIAL),
}
OF_AWQ: Mapping[str, Foreign] = {
    **OF_QUANTIZATION,
    "offload_device": Foreign("nothing is kept but statistics; oneshot(activations=...) says where batches wait."),
    "max_chunk_memory": Foreign("nothing is kept but statistics; oneshot(activations=...) says where batches wait."),
    "sequential_targets": Foreign(_SEQUENTIAL),
}
OF_SMOOTHQUANT: Mapping[str, Foreign] = {
    **OF_ALL,
    "num_calibration_steps": Foreign("give oneshot num_calibration_samples=.", refused=True),
    "calibration_function": Foreign("the model's own forward runs: give oneshot batches that it takes.", refused=True),
    "algorithm": Foreign(
        'log_equalization is not there: use smoothing_strength="search".', (None, "smoothquant"), refused=True
    ),
}
# Modifiers that are not here, with what to use in their place.
ABSENT: Mapping[str, str] = {
    "AutoRoundModifier": "LearnedRoundingModifier after GPTQModifier learns from there (the recipe w4a16-best)",
    "ConstantPruningModifier": "bitpress does not prune",
    "IMatrixGatherer": "observer: imatrix_mse gathers what it needs: leave it out",
    "LogarithmicEqualizationModifier": "use SmoothQuantModifier, with smoothing_strength: search",
    "MagnitudePruningModifier": "bitpress does not prune",
    "QuIPModifier": "bitpress does not rotate: use AWQModifier before GPTQModifier",
    "REAPPruningModifier": "bitpress does not prune",
    "SparseGPTModifier": "bitpress does not prune",
    "SpinQuantModifier": "bitpress does not rotate: use AWQModifier before GPTQModifier",
    "WandaPruningModifier": "bitpress does not prune",
}
