"""Tiny random transformers models, and what tests do with any model."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitpress.models.blocks import Block, Call, find_blocks
from bitpress.models.experts import named_layers
from bitpress.models.linears import is_linear
from bitpress.modifiers import State
from bitpress.pipelines import dry_run
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.session import Session

VOCABULARY = 128
WIDTH = 64
HEADS = 4

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    **_TOKENS,
}
# Gated, with grouped-query attention: 4 query heads share 2 key/value heads.
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose norms and biases are not what a fresh model has: ones and zeros hide errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter).clamp_(-2, 2), alpha=0.3)
    return model


def llama(**options: Any) -> nn.Module:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**_GATED, "tie_word_embeddings": False, **options})))


def mistral(**options: Any) -> nn.Module:
    return seeded(lambda: MistralForCausalLM(MistralConfig(**{**_GATED, "sliding_window": 8, **options})))


def qwen2(**options: Any) -> nn.Module:
    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**{**_GATED, **options})))


def qwen3(**options: Any) -> nn.Module:
    return seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**{**_GATED, "head_dim": 32, **options})))


def gemma2(**options: Any) -> nn.Module:
    return seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**{**_GATED, "head_dim": 16, "sliding_window": 8, **options})))


def gemma3(**options: Any) -> nn.Module:
    # One layer in three attends to everything, so that both kinds of layer are there.
    own = {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3}
    return seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**{**_GATED, **own, **options})))


def phi3(**options: Any) -> nn.Module:
    return seeded(lambda: Phi3ForCausalLM(Phi3Config(**{**_GATED, **options})))


def opt(**options: Any) -> nn.Module:
    own = {"ffn_dim": 96, "word_embed_proj_dim": WIDTH, "init_std": 0.12}
    return seeded(lambda: OPTForCausalLM(OPTConfig(**{**_COMMON, **own, **options})))


def opt_post_norm() -> nn.Module:
    """As OPT-350m: norms behind the residual, and an embedding that is projected."""
    return opt(do_layer_norm_before=False, word_embed_proj_dim=32)


def gpt2(**options: Any) -> nn.Module:
    own = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 128}
    taken = {k: v for k, v in _COMMON.items() if k in ("vocab_size", "initializer_range", *_TOKENS)}
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**{**taken, **own, **options})))


def gpt_neox(**options: Any) -> nn.Module:
    own = {"intermediate_size": 96, "use_parallel_residual": True}
    return seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**_COMMON, **own, **options})))


def gpt_neox_serial() -> nn.Module:
    return gpt_neox(use_parallel_residual=False)


def bloom(**options: Any) -> nn.Module:
    own = {"n_layer": 2, "n_head": HEADS}
    taken = {k: v for k, v in _COMMON.items() if not k.startswith(("num_", "max_"))}
    return seeded(lambda: BloomForCausalLM(BloomConfig(**{**taken, **own, **options})))


def falcon(**options: Any) -> nn.Module:
    """As Falcon-7B: multi-query attention beside the MLP, one norm for both."""
    return seeded(lambda: FalconForCausalLM(FalconConfig(**{**_COMMON, **options})))


def falcon_new() -> nn.Module:
    """As Falcon-40B: grouped queries, a norm for each branch."""
    return falcon(new_decoder_architecture=True, num_kv_heads=2)


def falcon_new_one_norm() -> nn.Module:
    """As Falcon-11B: the new architecture with one norm."""
    return falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)


def falcon_rw() -> nn.Module:
    """As Falcon-RW-1B: one key and value per head, the MLP behind the attention, ALiBi and biases."""
    return falcon(multi_query=False, parallel_attn=False, alibi=True, bias=True)


def bert(**options: Any) -> nn.Module:
    taken = {k: v for k, v in _COMMON.items() if k not in _TOKENS}
    own = {"intermediate_size": 96, "pad_token_id": 0}
    return seeded(lambda: BertForMaskedLM(BertConfig(**{**taken, **own, **options})))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    function.__name__: function
    for function in (
        llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, opt, opt_post_norm, gpt2, gpt_neox, gpt_neox_serial,
        bloom, falcon, falcon_new, falcon_new_one_norm, falcon_rw, bert,
    )
}  # fmt: skip


class MLP(nn.Module):
    """Linear, ReLU, Linear, ...: a model that no library wrote."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def tokens(rows: int = 1, length: int = 24, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids with a full attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def token_data(batches: int = 4, rows: int = 2, length: int = 24) -> CalibrationData:
    return data_of([tokens(rows, length, seed) for seed in range(batches)])


def data_of(batches: Sequence[Any]) -> CalibrationData:
    """Calibration data of keyword arguments, or of tensors."""
    made = [Batch((), b) if isinstance(b, dict) else Batch((b,), {}) for b in batches]
    return CalibrationData(made, len(made), len(made), sliceable=False)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    return model(**without_cache(model, tokens(2) if batch is None else batch)).logits


def without_cache(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    return dict(batch) if isinstance(model, BertForMaskedLM) else {**batch, "use_cache": False}


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: each for name, each in named_layers(module) if is_linear(each)}


@torch.no_grad()
def probed_blocks(model: nn.Module, batch: dict[str, Tensor] | None = None) -> list[Block]:
    """The blocks of all linear layers, with their calls in one forward of ``batch``."""
    blocks = find_blocks(model, linears(model))
    state = State(model, {}, {}, blocks)
    dry_run(state, Batch((), without_cache(model, tokens(2) if batch is None else batch)))
    return blocks


@torch.no_grad()
def called(module: nn.Module, x: Tensor, name: str = "", layers: dict[str, nn.Module] | None = None) -> Block:
    """A module as a block of which a dry run has seen the call with ``x``."""
    call = Call((x,), {})
    return Block(name, module, layers or {}, [call], first_output=call.copy().of(module))


def compress(model: nn.Module, recipe: Any, data: CalibrationData | None = None, **options: Any) -> Session:
    """What oneshot does between reading the data and writing the report."""
    session = Session(model, recipe, **options)
    session.check()
    session.initialize(data)
    session.run()
    session.finalize()
    return session


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit, with NaN equal to itself."""
    after = module.state_dict()
    assert list(after) == list(before)
    changed = [name for name, value in before.items() if not same_bits(value, after[name])]
    assert changed == []


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else bool(a == b)
