"""Who reads a checkpoint, by its config: what docs/schemes.md, docs/formats.md and docs/serving.md say, as data."""

from dataclasses import dataclass
from typing import Any

# Classes that servers generate text with.
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
COMPRESSED = "compressed-tensors"


@dataclass(frozen=True)
class Readers:
    """What a checkpoint can be used with.

    Attributes:
        format: what the hub calls its quantization; empty for dense weights.
        library: that the hub shows it with, if any.
        lines: what to say, the code, and the code's language.
        notes: what else its users should know.
    """

    format: str
    library: str | None
    lines: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """True if it is stored as bitpress packs it."""
        return self.format == COMPRESSED


def readers(config: dict[str, Any], *, gguf: bool = False, known: bool = True, by_transformers: bool = True) -> Readers:
    """Who reads the checkpoint with this config.json.

    Args:
        config: its config.json; empty where there is none.
        gguf: True for a GGUF file.
        known: False if transformers does not know the architecture.
        by_transformers: False if transformers cannot load the model packed.
    """
    if gguf:
        return Readers("gguf", None, (("llama.cpp:", "llama-cli -m model.gguf", "console"),))
    quantization = config.get("quantization_config") or {}
    if "tied_weights" in config:
        # A module of the user's own.
        code = 'import bitpress\n\nmodel = bitpress.load(".", model)  # a module of the same class'
        return Readers(COMPRESSED if quantization else "", None, (("In Python:", code, "python"),))
    architecture = (config.get("architectures") or [""])[0]
    method = quantization.get("quant_method", "")
    if method != COMPRESSED:
        return _of_others(method, architecture)
    schemes = list((quantization.get("config_groups") or {}).values())
    lines = []
    if architecture.endswith(GENERATES) and all(map(vllm_knows, schemes)):
        lines.append(_vllm())
    floats = any(_is_scaled_apart(scheme.get("weights")) for scheme in schemes)
    if by_transformers:
        lines.append(_transformers(architecture, "compressed-tensors", "torch.bfloat16" if floats else '"auto"'))
    if not known:
        return Readers(COMPRESSED, None, tuple(lines), ("transformers does not know this architecture.",))
    lines.append(("Packed, with no server:", 'import bitpress\n\nmodel = bitpress.load(".")', "python"))
    notes = () if by_transformers else ("transformers does not load this model packed.",)
    return Readers(COMPRESSED, "transformers", tuple(lines), notes)


def _of_others(method: str, architecture: str) -> Readers:
    lines = [_vllm()] if method and architecture.endswith(GENERATES) else []
    needed = {"awq": "gptqmodel", "gptq": "gptqmodel optimum"}.get(method, "")
    return Readers(method, "transformers", (*lines, _transformers(architecture, needed, '"auto"')))


def _vllm() -> tuple[str, str, str]:
    return ("vLLM, where it has a kernel for the scheme on your hardware:", "vllm serve .", "console")


def _transformers(architecture: str, needed: str, dtype: str) -> tuple[str, str, str]:
    kind = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else architecture or "AutoModel"
    before = "import torch\n" if dtype.startswith("torch") else ""
    code = f'{before}from transformers import {kind}\n\nmodel = {kind}.from_pretrained(".", dtype={dtype})'
    return f"transformers{f', with `pip install {needed}`' if needed else ''}:", code, "python"


def vllm_knows(scheme: dict[str, Any]) -> bool:
    """True if vLLM's reader of compressed-tensors has a class for a scheme; its kernels depend on the hardware."""
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    if weights is None:
        return False  # of attention
    bits: int = weights["num_bits"]
    strategy: str = weights["strategy"]
    if weights["type"] == "float":
        return bits == 4 or (bits == 8 and (strategy in ("tensor", "channel", "block") or _is_scaled_apart(weights)))
    if inputs is None:
        return strategy in ("group", "channel") and scheme.get("format") in (None, "pack-quantized")
    if inputs["type"] != "int" or inputs["num_bits"] != 8:
        return False
    if bits == 8:
        return strategy in ("tensor", "channel") and bool(weights["symmetric"])
    return bits == 4 and strategy in ("group", "channel") and bool(inputs.get("dynamic"))


def _is_scaled_apart(weights: dict[str, Any] | None) -> bool:
    """NVFP4 and microscaling floats, whose scales have a dtype of their own: transformers reads them as bfloat16."""
    if weights is None or weights["type"] != "float":
        return False
    return bool(weights["num_bits"] < 8 or weights["group_size"] == 32)
