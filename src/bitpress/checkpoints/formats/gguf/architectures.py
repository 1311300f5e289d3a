"""Models that llama.cpp knows: what it calls them, and what it wants to know of their config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import BitpressError


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        name: llama.cpp's.
        interleaved: rotary embeddings turn neighbouring channels of a head, not those half a head apart: the rows of
            queries and keys are reordered.
    """

    name: str
    interleaved: bool = False


# By transformers' model_type. All are decoders with gated MLPs, RMS norms and rotary embeddings.
KNOWN = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}
_LLAMA3 = "llama3"


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """What llama.cpp calls the model of a config.json.

    Raises:
        BitpressError: it is not covered; names those that are, and the way out.
    """
    kind = config.get("model_type")
    if kind not in KNOWN:
        raise BitpressError(
            f"GGUF is written of {', '.join(KNOWN)}, not of {kind!r}: llama.cpp's own convert_hf_to_gguf.py knows more "
            "models (and quantizes anew); or keep a format of safetensors."
        )
    scaling = _rotary(config).get("rope_type", "default")
    if scaling not in ("default", "linear", _LLAMA3):
        raise BitpressError(f"rotary embeddings of the type {scaling!r} are not written to GGUF: keep another format.")
    return KNOWN[kind]


def head_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("num_key_value_heads") or heads)


def add_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """Give a ``gguf.GGUFWriter`` what llama.cpp reads of a model's shape."""
    import gguf  # noqa: PLC0415

    heads, of_keys = head_counts(config)
    size = _head_size(config)
    rotary = _rotary(config)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(of_keys)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rotary.get("rope_theta", 10000.0)))
    writer.add_vocab_size(int(config["vocab_size"]))
    if rotary.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))


def extra_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What llama.cpp reads as a tensor, and transformers computes: how Llama 3 stretches each frequency."""
    rotary = _rotary(config)
    if rotary.get("rope_type") != _LLAMA3:
        return {}
    size = _head_size(config)
    factor, low, high = (float(rotary[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rotary["original_max_position_embeddings"])
    frequencies = 1.0 / float(rotary["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = context * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).float()}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys in llama.cpp's order: those that turn together side by side."""
    order = torch.arange(len(rows)).view(heads, 2, -1).transpose(1, 2).flatten()
    return rows[order]


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 5 states it, or as earlier releases did."""
    stated = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    stated.setdefault("rope_type", stated.get("type", "default"))
    if "rope_theta" in config:
        stated.setdefault("rope_theta", config["rope_theta"])
    return stated


def _context(config: Mapping[str, Any]) -> int:
    """Tokens at most: no more than a sliding window, which llama.cpp does not know of these models."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return longest if window is None else min(longest, int(window))


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
