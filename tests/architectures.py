"""A zoo of tiny random models: as many architectures of transformers as can be built without a download."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny import HEADS, VOCABULARY, WIDTH, seeded, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A tiny random model and its input."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    """(rows, length, seed) to the keyword arguments of forward."""
    listed: bool = False
    """Whether peers list it as supported."""


# Whatever of these a configuration class has is set, under each of the names that families have for it.
_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "emb_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "linear_num_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "linear_head_dim", "d_kv", "kv_channels"), WIDTH // HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "ffn_hidden_size", "feed_forward_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("initializer_range", "init_std"), 0.12),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size"), 8),
    # Mixtures of experts: 2 of 4, behind a dense layer.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    # Latent, indexed and linear attention.
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **{"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2},
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    # State spaces.
    **{"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "state_size": 16},
    # Images and sound.
    **{"image_size": 32, "patch_size": 16, "num_mel_bins": 32},
}


def _config(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of the shape above, but for ``own``; likewise its sub-configurations."""
    # A sequence has a value for each stage of a network: that is its own shape.
    fields = {field.name for field in dataclasses.fields(kind) if not isinstance(field.default, (list, tuple))}
    options = {**{name: value for name, value in _SHAPE.items() if name in fields}, **own}
    for name, sub_kind in kind.sub_configs.items():
        if name not in fields or own.get(name, {}) is None:
            continue
        sub = dict(own.get(name) or {})
        if sub_kind is AutoConfig:
            default = getattr(getattr(kind, "sub_configs_defaults", {}).get(name), "model_type", None)
            model_type = sub.pop("model_type", default)
            if not model_type:
                continue
            sub_kind = type(AutoConfig.for_model(model_type))  # noqa: PLW2901
        options[name] = _config(sub_kind, sub)
    return kind(**options)


_KNOWN = frozenset(dir(transformers))
# Those in the tables of models that peers support.
_LISTED = frozenset(
    (
        "afmoe", "baichuan", "bloom", "cohere", "cohere2", "deepseek_v3", "ernie4_5_moe", "exaone4", "falcon",
        "gemma2", "gemma3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_bigcode", "gpt_neox", "gptj", "granite",
        "llama", "llama4", "mistral", "mistral3", "mpt", "olmo", "olmo3", "opt", "phi3", "qwen2", "qwen2_5_vl",
        "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "stablelm", "starcoder2",
    )
)  # fmt: skip


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """What one forward gives: the logits, else the last hidden state, else the first floats there are."""
    with torch.no_grad():
        given = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(given, name, None), Tensor):
            return value
    return next(x for x in tree_leaves(_plain(given)) if isinstance(x, Tensor) and x.is_floating_point())


def _plain(given: Any) -> Any:
    return given.to_tuple() if hasattr(given, "to_tuple") else given


def _built(name: str, own: dict[str, Any]) -> Callable[[], nn.Module]:
    def fresh() -> nn.Module:
        kind = getattr(transformers, name)
        model = kind(_config(kind.config_class, own))
        with torch.no_grad():
            for parameter in model.parameters():
                # A projection of zeros lets nothing through.
                if parameter.dim() > 1 and not parameter.any():
                    parameter.normal_(std=0.12)
        return model

    return lambda: seeded(fresh)


def _cached(rows: int, length: int, seed: int) -> Inputs:
    return {**tokens(rows, length, seed), "use_cache": False}


def _translated(rows: int, length: int, seed: int) -> Inputs:
    return {**_cached(rows, length, seed), "decoder_input_ids": tokens(rows, length, seed + 1000)["input_ids"]}


Entry = tuple[str, Callable[[], nn.Module], Callable[[int, int, int], Inputs]]


def _decoder(model: str, **own: Any) -> Entry:
    """From tokens to logits, with a cache that the input declines."""
    return model, _built(model, own), _cached


def _encoder(model: str, **own: Any) -> Entry:
    return model, _built(model, own), tokens


def _translator(model: str, **own: Any) -> Entry:
    return model, _built(model, own), _translated


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_LATENT = {"num_key_value_heads": HEADS}

_DECODERS: dict[str, Entry] = {
    "afmoe": _decoder("AfmoeForCausalLM", **_SLIDING, num_shared_experts=1),
    "apertus": _decoder("ApertusForCausalLM"),
    "arcee": _decoder("ArceeForCausalLM"),
    "aria_text": _decoder("AriaTextForCausalLM", moe_num_shared_experts=1),
    "axk1": _decoder("AXK1ForCausalLM", **_LATENT, **_SPARSE),
    "axk2": _decoder("AXK2ForCausalLM", **_LATENT, **_SPARSE),
    "bailing_hybrid": _decoder("BailingHybridForCausalLM", **_LATENT, **_LINEAR, **_SPARSE),
    "bamba": _decoder("BambaForCausalLM", attn_layer_indices=[1]),
    "bart_decoder": _decoder("BartForCausalLM"),
    "beam": _decoder("BeamForCausalLM", **_SLIDING, **_SPARSE),
    "bert_generation": _decoder("BertGenerationDecoder", is_decoder=True),
    "biogpt": _decoder("BioGptForCausalLM"),
    "bitnet": _decoder("BitNetForCausalLM"),
    "bloom": _decoder("BloomForCausalLM"),
    "codegen": _decoder("CodeGenForCausalLM", rotary_dim=8),
    "cohere": _decoder("CohereForCausalLM", logit_scale=1.0),
    "cohere2": _decoder("Cohere2ForCausalLM", **_SLIDING, logit_scale=1.0),
    "cohere2_moe": _decoder("Cohere2MoeForCausalLM", **_SLIDING, **_SPARSE, num_shared_experts=1, logit_scale=1.0),
    "cohere_compass_text": _decoder(
        "CohereCompassForCausalLM",
        **_SLIDING,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
    ),
    "ctrl": _decoder("CTRLLMHeadModel", dff=96),
    "cwm": _decoder("CwmForCausalLM", **_SLIDING),
    "dbrx": _decoder(
        "DbrxForCausalLM",
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_top_k": 2},
    ),
    "deepseek_v2": _decoder("DeepseekV2ForCausalLM", **_LATENT, n_shared_experts=1),
    "deepseek_v3": _decoder("DeepseekV3ForCausalLM", **_LATENT),
    "deepseek_v32": _decoder("DeepseekV32ForCausalLM", **_LATENT, **_SPARSE),
    "deepseek_v4": _decoder("DeepseekV4ForCausalLM", num_key_value_heads=1, o_groups=2, o_lora_rank=32),
    "diffllama": _decoder("DiffLlamaForCausalLM"),
    "doge": _decoder("DogeForCausalLM"),
    "doge_moe": _decoder("DogeForCausalLM", is_moe=True, num_experts=16),
    "dots1": _decoder("Dots1ForCausalLM", **_SLIDING, n_shared_experts=1),
    "emu3_text": _decoder("Emu3ForCausalLM"),
    "ernie4_5": _decoder("Ernie4_5ForCausalLM"),
    "ernie4_5_moe": _decoder("Ernie4_5_MoeForCausalLM", moe_num_shared_experts=1),
    "eurobert": _encoder("EuroBertForMaskedLM"),
    "exaone4": _decoder("Exaone4ForCausalLM", **_SLIDING),
    "exaone_moe": _decoder("ExaoneMoeForCausalLM", **_SLIDING, **_SPARSE),
    "falcon": _decoder("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_h1": _decoder("FalconH1ForCausalLM", mamba_d_ssm=128),
    "falcon_mamba": _decoder("FalconMambaForCausalLM", time_step_rank=32),
    "flex_olmo": _decoder("FlexOlmoForCausalLM"),
    "flint": _decoder("FlintForCausalLM", **_SLIDING, mlp_only_layers=[0]),
    "gemma": _decoder("GemmaForCausalLM"),
    "gemma2": _decoder("Gemma2ForCausalLM", **_SLIDING),
    "gemma3": _decoder("Gemma3ForCausalLM", **_SLIDING),
    "gemma3n": _decoder(
        "Gemma3nForCausalLM",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=32,
        intermediate_size=[96] * 4,
    ),
    "gemma4": _decoder(
        "Gemma4ForCausalLM",
        **_SLIDING,
        enable_moe_block=True,
        top_k_experts=2,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCABULARY,
        global_head_dim=32,
    ),
    "gemma4_unified": _decoder("Gemma4UnifiedForCausalLM", **_SLIDING, global_head_dim=32),
    "glm": _decoder("GlmForCausalLM"),
    "glm4": _decoder("Glm4ForCausalLM"),
    "glm4_moe": _decoder("Glm4MoeForCausalLM"),
    "glm4_moe_lite": _decoder("Glm4MoeLiteForCausalLM", **_LATENT, **_SPARSE),
    "glm_moe_dsa": _decoder("GlmMoeDsaForCausalLM", **_LATENT, **_SPARSE),
    "gpt2": _decoder("GPT2LMHeadModel"),
    "gpt_bigcode": _decoder("GPTBigCodeForCausalLM"),
    "gpt_neo": _decoder("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    "gpt_neox": _decoder("GPTNeoXForCausalLM"),
    "gpt_neox_japanese": _decoder("GPTNeoXJapaneseForCausalLM"),
    "gpt_oss": _decoder("GptOssForCausalLM", **_SLIDING),
    "gptj": _decoder("GPTJForCausalLM", rotary_dim=8),
    "granite": _decoder("GraniteForCausalLM"),
    "granite_swa": _decoder("GraniteSWAForCausalLM"),
    "granitemoe": _decoder("GraniteMoeForCausalLM"),
    "granitemoe_swa": _decoder("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": _decoder("GraniteMoeHybridForCausalLM", **_LINEAR, shared_intermediate_size=32),
    "granitemoeshared": _decoder("GraniteMoeSharedForCausalLM", shared_intermediate_size=32),
    "helium": _decoder("HeliumForCausalLM"),
    "hrm_text": _decoder("HrmTextForCausalLM"),
    "hunyuan_v1_dense": _decoder("HunYuanDenseV1ForCausalLM"),
    "hunyuan_v1_moe": _decoder("HunYuanMoEV1ForCausalLM"),
    "hy_v3": _decoder("HYV3ForCausalLM", **_SPARSE),
    "hy_v4": _decoder("HYV4ForCausalLM", **_SPARSE),
    "hyperclovax": _decoder("HyperCLOVAXForCausalLM"),
    "inkling": _decoder(
        "InklingForCausalLM",
        **_SPARSE,
        layer_types=["hybrid_sliding", "hybrid"],
        n_shared_experts=1,
        logits_mup_width_multiplier=1.0,
    ),
    "jais2": _decoder("Jais2ForCausalLM"),
    "jamba": _decoder("JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=32),
    "jetmoe": _decoder("JetMoeForCausalLM"),
    "kimi_linear": _decoder("KimiLinearForCausalLM", **_LATENT, **_LINEAR, **_SPARSE, linear_head_dim=32),
    "kolibri1": _decoder("Kolibri1ForCausalLM", **_SLIDING),
    "laguna": _decoder("LagunaForCausalLM", **_SLIDING, **_SPARSE),
    "lfm2": _decoder("Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_multiple_of=32),
    "lfm2_moe": _decoder("Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"]),
    "llama": _decoder("LlamaForCausalLM"),
    "llama4": _decoder(
        "Llama4ForCausalLM", interleave_moe_layer_step=2, no_rope_layer_interval=2, intermediate_size_mlp=96
    ),
    "longcat_flash": _decoder("LongcatFlashForCausalLM", **_LATENT, head_dim=16, zero_expert_num=2),
    "mamba": _decoder("MambaForCausalLM", time_step_rank=32),
    "mamba2": _decoder("Mamba2ForCausalLM", head_dim=32, n_groups=1),
    "megatron_bert_decoder": _decoder("MegatronBertForCausalLM", is_decoder=True),
    "mellum": _decoder("MellumForCausalLM", **_SLIDING, **_SPARSE),
    "mimo_v2_flash": _decoder("MiMoV2FlashForCausalLM", **_SLIDING, **_SPARSE),
    "minicpm3": _decoder("MiniCPM3ForCausalLM", **_LATENT),
    "minimax": _decoder("MiniMaxForCausalLM", **_LINEAR, block_size=8),
    "minimax_m2": _decoder("MiniMaxM2ForCausalLM"),
    "minimax_m3": _decoder(
        "MiniMaxM3VLForCausalLM", **_SPARSE, dense_intermediate_size=96, shared_intermediate_size=32, rotary_dim=8
    ),
    "ministral": _decoder("MinistralForCausalLM", **_SLIDING),
    "ministral3": _decoder("Ministral3ForCausalLM"),
    "mistral": _decoder("MistralForCausalLM"),
    "mistral4": _decoder("Mistral4ForCausalLM", **_LATENT),
    "mixtral": _decoder("MixtralForCausalLM"),
    "modernbert_decoder": _decoder("ModernBertDecoderForCausalLM", **_SLIDING, local_attention=8),
    "moshi": _decoder("MoshiForCausalLM", ffn_dim=192),
    "mpt": _decoder("MptForCausalLM"),
    "nanochat": _decoder("NanoChatForCausalLM"),
    "nemotron": _decoder("NemotronForCausalLM"),
    "nemotron_h": _decoder(
        "NemotronHForCausalLM",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=1,
        moe_shared_expert_intermediate_size=32,
    ),
    "olmo": _decoder("OlmoForCausalLM"),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "olmo3": _decoder("Olmo3ForCausalLM", **_SLIDING),
    "olmo_hybrid": _decoder("OlmoHybridForCausalLM", **_LINEAR, linear_num_value_heads=2),
    "olmoe": _decoder("OlmoeForCausalLM"),
    "openai_gpt": _encoder("OpenAIGPTLMHeadModel"),
    "opt": _decoder("OPTForCausalLM", word_embed_proj_dim=WIDTH),
    "persimmon": _decoder("PersimmonForCausalLM"),
    "phi": _decoder("PhiForCausalLM"),
    "phi3": _decoder("Phi3ForCausalLM"),
    "phimoe": _decoder("PhimoeForCausalLM"),
    "plbart_decoder": _decoder("PLBartForCausalLM"),
    "qwen2": _decoder("Qwen2ForCausalLM", use_sliding_window=True, max_window_layers=1),
    "qwen2_moe": _decoder("Qwen2MoeForCausalLM", mlp_only_layers=[0]),
    "qwen3": _decoder("Qwen3ForCausalLM", head_dim=32),
    "qwen3_5": _decoder("Qwen3_5ForCausalLM", **_LINEAR),
    "qwen3_5_moe": _decoder("Qwen3_5MoeForCausalLM", **_LINEAR),
    "qwen3_moe": _decoder("Qwen3MoeForCausalLM", mlp_only_layers=[0]),
    "qwen3_next": _decoder("Qwen3NextForCausalLM", **_LINEAR, mlp_only_layers=[0]),
    "qwen4_exp": _decoder(
        "Qwen4ExpForCausalLM",
        layer_types=["linear_attention", "indexed_attention"],
        hc_lowrank=32,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=32,
        indexer_budget=8,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": _decoder(
        "RecurrentGemmaForCausalLM",
        block_types=["recurrent", "attention"],
        attention_window_size=8,
        intermediate_size=192,
    ),
    "reformer": _decoder(
        "ReformerModelWithLMHead",
        is_decoder=True,
        attn_layers=["local", "lsh"],
        axial_pos_embds_dim=[32, 32],
        axial_pos_shape=[8, 16],
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        attention_head_size=16,
        hash_seed=0,
    ),
    "rwkv": _decoder("RwkvForCausalLM"),
    "seed_oss": _decoder("SeedOssForCausalLM"),
    "smollm3": _decoder("SmolLM3ForCausalLM", no_rope_layers=[1, 0]),
    "solar_open": _decoder("SolarOpenForCausalLM"),
    "stablelm": _decoder("StableLmForCausalLM"),
    "starcoder2": _decoder("Starcoder2ForCausalLM"),
    "trocr": _decoder("TrOCRForCausalLM"),
    "vaultgemma": _decoder("VaultGemmaForCausalLM", **_SLIDING),
    "whisper_decoder": _decoder("WhisperForCausalLM"),
    "xglm": _decoder("XGLMForCausalLM"),
    "xlm": _encoder("XLMWithLMHeadModel"),
    "xlnet": _encoder("XLNetLMHeadModel", d_inner=96),
    "xlstm": _decoder(
        "xLSTMForCausalLM", chunk_size=8, ffn_round_up_to_multiple_of=32, autocast_kernel_dtype="float32"
    ),
    "youtu": _decoder("YoutuForCausalLM", **_LATENT),
    "zamba": _decoder(
        "ZambaForCausalLM",
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        mamba_dt_rank=32,
        num_key_value_heads=HEADS,
    ),
    "zamba2": _decoder(
        "Zamba2ForCausalLM",
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        n_mamba_heads=4,
        num_key_value_heads=HEADS,
        use_shared_attention_adapter=True,
        adapter_rank=32,
    ),
    "zaya": _decoder("ZayaForCausalLM", num_experts_per_tok=1, router_hidden_size=32),
}

_ENCODERS: dict[str, Entry] = {
    "albert": _encoder("AlbertForMaskedLM"),
    "bert": _encoder("BertForMaskedLM"),
    "big_bird": _encoder("BigBirdForMaskedLM", attention_type="original_full"),
    "camembert": _encoder("CamembertForMaskedLM"),
    "convbert": _encoder("ConvBertForMaskedLM"),
    "data2vec_text": _encoder("Data2VecTextForMaskedLM"),
    "deberta": _encoder("DebertaForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "deberta_v2": _encoder(
        "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16
    ),
    "distilbert": _encoder("DistilBertForMaskedLM"),
    "electra": _encoder("ElectraForMaskedLM"),
    "ernie": _encoder("ErnieForMaskedLM"),
    "esm": _encoder("EsmForMaskedLM", mask_token_id=3),
    "esmc": _encoder("EsmcForMaskedLM", num_key_value_heads=HEADS),
    "flaubert": _encoder("FlaubertWithLMHeadModel"),
    "fnet": _encoder("FNetForMaskedLM"),
    "funnel": _encoder("FunnelForMaskedLM", block_sizes=[1, 1], d_head=16, d_inner=96, num_decoder_layers=1),
    "gte": _encoder("GteForMaskedLM"),
    "ibert": _encoder("IBertForMaskedLM"),
    "jina_embeddings_v3": _encoder("JinaEmbeddingsV3ForMaskedLM"),
    "layoutlm": _encoder("LayoutLMForMaskedLM", max_2d_position_embeddings=128),
    "longformer": _encoder("LongformerForMaskedLM", attention_window=[8, 8]),
    "luke": _encoder("LukeForMaskedLM", entity_vocab_size=16, entity_emb_size=32),
    "megatron_bert": _encoder("MegatronBertForMaskedLM"),
    "mobilebert": _encoder("MobileBertForMaskedLM", intra_bottleneck_size=32, embedding_size=32),
    "modernbert": _encoder("ModernBertForMaskedLM", **_SLIDING, local_attention=8),
    "mpnet": _encoder("MPNetForMaskedLM"),
    "mra": _encoder("MraForMaskedLM"),
    "neomme": _encoder("NeoMMEForMaskedLM"),
    "nomic_bert": _encoder("NomicBertForMaskedLM"),
    "nystromformer": _encoder("NystromformerForMaskedLM", num_landmarks=8, segment_means_seq_len=24),
    "rembert": _encoder("RemBertForMaskedLM", input_embedding_size=32, output_embedding_size=32),
    "roberta": _encoder("RobertaForMaskedLM"),
    "roberta_prelayernorm": _encoder("RobertaPreLayerNormForMaskedLM"),
    "roc_bert": _encoder(
        "RoCBertForMaskedLM",
        pronunciation_vocab_size=32,
        shape_vocab_size=32,
        pronunciation_embed_dim=32,
        shape_embed_dim=32,
    ),
    "roformer": _encoder("RoFormerForMaskedLM"),
    "squeezebert": _encoder("SqueezeBertForMaskedLM"),
    "tapas": _encoder("TapasForMaskedLM"),
    "ultrabert": _encoder("UltrabertForMaskedLM"),
    "xlm_roberta": _encoder("XLMRobertaForMaskedLM"),
    "xlm_roberta_xl": _encoder("XLMRobertaXLForMaskedLM"),
    "xmod": _encoder("XmodForMaskedLM", default_language="en_XX"),
    "yoso": _encoder("YosoForMaskedLM"),
}

_TRANSLATORS: dict[str, Entry] = {
    "bart": _translator("BartForConditionalGeneration"),
    "bigbird_pegasus": _translator("BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    "blenderbot": _translator("BlenderbotForConditionalGeneration"),
    "blenderbot_small": _translator("BlenderbotSmallForConditionalGeneration"),
    "fsmt": _translator("FSMTForConditionalGeneration", src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
    "led": _translator(
        "LEDForConditionalGeneration",
        attention_window=8,
        max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=128,
    ),
    "longt5": _translator("LongT5ForConditionalGeneration", local_radius=8),
    "m2m_100": _translator("M2M100ForConditionalGeneration"),
    "marian": _translator("MarianMTModel"),
    "mbart": _translator("MBartForConditionalGeneration"),
    "mt5": _translator("MT5ForConditionalGeneration"),
    "mvp": _translator("MvpForConditionalGeneration"),
    "nllb_moe": _translator("NllbMoeForConditionalGeneration", encoder_sparse_step=2, decoder_sparse_step=2),
    "pegasus": _translator("PegasusForConditionalGeneration"),
    "pegasus_x": _translator("PegasusXForConditionalGeneration", block_size=8, num_global_tokens=8),
    "plbart": _translator("PLBartForConditionalGeneration"),
    "prophetnet": _translator(
        "ProphetNetForConditionalGeneration", num_encoder_layers=2, num_encoder_attention_heads=4
    ),
    "switch_transformers": _translator(
        "SwitchTransformersForConditionalGeneration", num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    ),
    "t5": _translator("T5ForConditionalGeneration"),
    "t5_gated": _translator("T5ForConditionalGeneration", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5gemma": _translator("T5GemmaForConditionalGeneration"),
    "umt5": _translator("UMT5ForConditionalGeneration"),
}


_IMAGE_TOKEN = VOCABULARY - 1
_HALF_MIXED_ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    }
}
_MIXED_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2000))


def _pictures(name: str = "pixel_values", side: int = 32) -> Callable[[int, int, int], Inputs]:
    return lambda rows, length, seed: {name: _noise(seed, rows, 3, side, side)}


def _captions(rows: int, length: int, seed: int) -> Inputs:
    return {**tokens(rows, length, seed), **_pictures()(rows, length, seed)}


def _placed(rows: int, length: int, seed: int, places: int, marker: int = _IMAGE_TOKEN) -> Inputs:
    """Tokens of which the second and ``places`` - 1 more stand for what is seen or heard."""
    made = _cached(rows, length, seed)
    ids = made["input_ids"]
    ids[ids == marker] = 3
    ids[:, 1 : 1 + places] = marker
    return made


def _seen(places: int = 4, side: int = 32, **more: Any) -> Callable[[int, int, int], Inputs]:
    def inputs(rows: int, length: int, seed: int) -> Inputs:
        given = {key: value(rows, seed) if callable(value) else value for key, value in more.items()}
        return {**_placed(rows, length, seed, places), "pixel_values": _noise(seed, rows, 3, side, side), **given}

    return inputs


def _grid(width: int = 3 * 2 * 16 * 16, places: int = 4) -> Callable[[int, int, int], Inputs]:
    """An image a row, of 4 x 4 flat patches that are merged to 2 x 2 tokens."""

    def inputs(rows: int, length: int, seed: int) -> Inputs:
        made = _placed(rows, length, seed, places)
        kinds = (made["input_ids"] == _IMAGE_TOKEN).int()
        grid = torch.tensor([[1, 4, 4]] * rows)
        pixels = _noise(seed, rows * 16, width)
        return {**made, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}

    return inputs


def _vision(model: str, inputs: Callable[[int, int, int], Inputs] | None = None, **own: Any) -> Entry:
    return model, _built(model, own), inputs or _pictures()


_TWO_TOWERS = {"text_config": {"eos_token_id": 2}, "projection_dim": WIDTH}
_IMAGE_ID = {"image_token_id": _IMAGE_TOKEN}
_IMAGE_INDEX = {"image_token_index": _IMAGE_TOKEN}
_MERGED = {"out_hidden_size": WIDTH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_PYRAMID = {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
_STAGES = {"depths": [1, 1], "num_heads": [2, 4]}

_PICTURES: dict[str, Entry] = {
    "aimv2": _vision("Aimv2Model", _captions, **_TWO_TOWERS),
    "altclip": _vision("AltCLIPModel", _captions, projection_dim=WIDTH, text_config={"project_dim": WIDTH}),
    "beit": _vision("BeitForImageClassification", use_relative_position_bias=True),
    "blip_itm": _vision("BlipModel", _captions, projection_dim=WIDTH),
    "bridgetower": _vision("BridgeTowerModel", _captions),
    "chinese_clip": _vision("ChineseCLIPModel", _captions, projection_dim=WIDTH),
    "clip": _vision("CLIPModel", _captions, **_TWO_TOWERS),
    "clipseg": _vision("CLIPSegModel", _captions, **_TWO_TOWERS),
    "convnext": _vision("ConvNextForImageClassification", num_stages=2, hidden_sizes=[32, 64], depths=[1, 1]),
    "convnextv2": _vision("ConvNextV2ForImageClassification", num_stages=2, hidden_sizes=[32, 64], depths=[1, 1]),
    "data2vec_vision": _vision("Data2VecVisionForImageClassification"),
    "deit": _vision("DeiTForImageClassification"),
    "dinov2": _vision("Dinov2ForImageClassification", mlp_ratio=2),
    "dinov2_swiglu": _vision("Dinov2ForImageClassification", use_swiglu_ffn=True, mlp_ratio=3),
    "dinov2_with_registers": _vision("Dinov2WithRegistersForImageClassification", mlp_ratio=2),
    "dinov3_vit": _vision("DINOv3ViTModel", num_register_tokens=2),
    "donut_swin": _vision("DonutSwinModel", patch_size=4, embed_dim=32, window_size=4, **_STAGES),
    "dpt": _vision(
        "DPTForDepthEstimation",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[32, 32, 32, 32],
        fusion_hidden_size=32,
        is_hybrid=False,
        backbone_config=None,
    ),
    "flava": _vision("FlavaImageModel"),
    "focalnet": _vision(
        "FocalNetForImageClassification",
        patch_size=4,
        embed_dim=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "glpn": _vision("GLPNForDepthEstimation", **_PYRAMID, decoder_hidden_size=32),
    "hiera": _vision(
        "HieraForImageClassification",
        image_size=[32, 32],
        embed_dim=32,
        depths=[1, 1],
        num_heads=[1, 2],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_size=[4, 4],
    ),
    "ijepa": _vision("IJepaForImageClassification"),
    "metaclip_2": _vision("MetaClip2Model", _captions, **_TWO_TOWERS),
    "mlcd": _vision("MLCDVisionModel"),
    "mobilevit": _vision(
        "MobileViTForImageClassification",
        hidden_sizes=[32, 64, 96],
        neck_hidden_sizes=[16, 16, 32, 32, 64, 64, 64],
        num_attention_heads=2,
        patch_size=2,
    ),
    "owlvit": _vision("OwlViTModel", _captions, **_TWO_TOWERS),
    "perceiver": _vision(
        "PerceiverForMaskedLM",
        tokens,
        num_latents=8,
        d_latents=WIDTH,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=WIDTH,
        v_channels=WIDTH,
    ),
    "pixtral_vision": _vision("PixtralVisionModel"),
    "poolformer": _vision("PoolFormerForImageClassification", hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 1, 1]),
    "pvt": _vision("PvtForImageClassification", **_PYRAMID),
    "pvt_v2": _vision("PvtV2ForImageClassification", **_PYRAMID),
    "resnet": _vision("ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
    "segformer": _vision("SegformerForImageClassification", **_PYRAMID),
    "siglip": _vision("SiglipModel", _captions),
    "siglip_vision": _vision("SiglipVisionModel"),
    "swin": _vision("SwinForImageClassification", patch_size=4, embed_dim=32, window_size=4, **_STAGES),
    "swin2sr": _vision("Swin2SRForImageSuperResolution", patch_size=1, embed_dim=32, window_size=4, **_STAGES),
    "swinv2": _vision("Swinv2ForImageClassification", patch_size=4, embed_dim=32, window_size=4, **_STAGES),
    "timesformer": _vision(
        "TimesformerForVideoClassification", lambda r, _, s: {"pixel_values": _noise(s, r, 2, 3, 32, 32)}, num_frames=2
    ),
    "videomae": _vision(
        "VideoMAEForVideoClassification", lambda r, _, s: {"pixel_values": _noise(s, r, 4, 3, 32, 32)}, num_frames=4
    ),
    "vit": _vision("ViTForImageClassification"),
    "vit_msn": _vision("ViTMSNForImageClassification"),
    "vitdet": _vision("VitDetModel", window_block_indices=[0], window_size=2, pretrain_image_size=32),
    "vivit": _vision(
        "VivitForVideoClassification", lambda r, _, s: {"pixel_values": _noise(s, r, 4, 3, 32, 32)}, num_frames=4
    ),
    "yolos": _vision("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=8),
}

# Those that take `_cached` see nothing: only their language models run.
_SEEING: dict[str, Entry] = {
    "aria": _vision(
        "AriaForConditionalGeneration",
        _seen(),
        **_IMAGE_INDEX,
        vision_feature_layer=-1,
        projector_patch_to_query_dict={"4": 4},
    ),
    "aya_vision": _vision(
        "AyaVisionForConditionalGeneration",
        _seen(4, 64),
        **_IMAGE_INDEX,
        vision_feature_layer=-1,
        vision_config={"image_size": 64},
        text_config=_SLIDING,
    ),
    "blip": _vision("BlipForConditionalGeneration", _captions),
    "blip2": _vision(
        "Blip2ForConditionalGeneration",
        _seen(),
        **_IMAGE_INDEX,
        num_query_tokens=4,
        text_config={"word_embed_proj_dim": WIDTH},
        qformer_config={"encoder_hidden_size": WIDTH},
    ),
    "cohere2_vision": _vision(
        "Cohere2VisionForConditionalGeneration",
        _seen(4, 64),
        **_IMAGE_ID,
        alignment_intermediate_size=128,
        vision_config={"image_size": 64},
        text_config=_SLIDING,
    ),
    "deepseek_vl": _vision("DeepseekVLForConditionalGeneration", _seen(), **_IMAGE_ID),
    "ernie4_5_vl_moe": _vision(
        "Ernie4_5_VLMoeForConditionalGeneration",
        _grid(3 * 16 * 16),
        **_IMAGE_ID,
        text_config={
            "moe_intermediate_size": [32, 32],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        },
    ),
    "exaone4_5": _vision(
        "Exaone4_5_ForConditionalGeneration",
        _grid(),
        **_IMAGE_ID,
        vision_config={**_MERGED, "window_size": 64, "fullatt_block_indexes": [1]},
        text_config=_SLIDING,
    ),
    "fuyu": _vision("FuyuForCausalLM", _cached),
    "gemma3_vl": _vision(
        "Gemma3ForConditionalGeneration",
        _seen(4, 64, token_type_ids=None),
        **_IMAGE_INDEX,
        mm_tokens_per_image=4,
        vision_config={"image_size": 64},
        text_config=_SLIDING,
    ),
    "git": _vision("GitForCausalLM", _captions),
    "glm4v": _vision(
        "Glm4vForConditionalGeneration", _grid(), **_IMAGE_ID, vision_config=_MERGED, text_config=_MIXED_ROPE
    ),
    "glm4v_moe": _vision(
        "Glm4vMoeForConditionalGeneration", _grid(), **_IMAGE_ID, vision_config=_MERGED, text_config=_HALF_MIXED_ROPE
    ),
    "glm_ocr": _vision(
        "GlmOcrForConditionalGeneration", _grid(), **_IMAGE_ID, vision_config=_MERGED, text_config=_HALF_MIXED_ROPE
    ),
    "got_ocr2": _vision(
        "GotOcr2ForConditionalGeneration", _seen(1, 64), **_IMAGE_INDEX, vision_config={"image_size": 64}
    ),
    "idefics": _vision(
        "IdeficsForVisionText2Text",
        lambda r, n, s: {
            **_cached(r, n, s),
            "pixel_values": _noise(s, r, 1, 3, 32, 32),
            "image_attention_mask": torch.ones(r, n, 1, dtype=torch.long),
        },
        additional_vocab_size=0,
    ),
    "idefics2": _vision(
        "Idefics2ForConditionalGeneration",
        _seen(4, pixel_values=lambda r, s: _noise(s, r, 1, 3, 32, 32)),
        **_IMAGE_ID,
        perceiver_config={
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
        },
    ),
    "idefics3": _vision(
        "Idefics3ForConditionalGeneration",
        _seen(4, pixel_values=lambda r, s: _noise(s, r, 1, 3, 64, 64)),
        **_IMAGE_ID,
        vision_config={"image_size": 64},
    ),
    "instructblip": _vision(
        "InstructBlipForConditionalGeneration",
        _seen(4, qformer_input_ids=lambda r, s: tokens(r, 8, s)["input_ids"]),
        **_IMAGE_INDEX,
        num_query_tokens=4,
        text_config={"word_embed_proj_dim": WIDTH},
        qformer_config={"encoder_hidden_size": WIDTH},
    ),
    "internvl": _vision(
        "InternVLForConditionalGeneration",
        _seen(4, 64),
        **_IMAGE_ID,
        vision_config={"image_size": [64, 64], "patch_size": [16, 16]},
        image_seq_length=4,
    ),
    "kosmos2": _vision(
        "Kosmos2ForConditionalGeneration",
        lambda r, n, s: {
            **_cached(r, n, s),
            "pixel_values": _noise(s, r, 3, 32, 32),
            "image_embeds_position_mask": torch.tensor([[0] + [1] * 4 + [0] * (n - 5)] * r),
        },
        latent_query_num=4,
        text_config={"embed_dim": WIDTH, "layers": 2, "attention_heads": HEADS},
    ),
    "lfm2_vl": _vision(
        "Lfm2VlForConditionalGeneration",
        _cached,
        **_IMAGE_ID,
        text_config={"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
        projector_hidden_size=96,
    ),
    "lighton_ocr": _vision(
        "LightOnOcrForConditionalGeneration",
        _seen(1, image_sizes=lambda r, _: torch.tensor([[32, 32]] * r)),
        **_IMAGE_ID,
    ),
    "llama4_vl": _vision(
        "Llama4ForConditionalGeneration",
        _seen(4, 64),
        **_IMAGE_INDEX,
        text_config={"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "intermediate_size_mlp": 96},
        vision_config={
            "image_size": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
            "intermediate_size": 256,
        },
    ),
    "llava": _vision("LlavaForConditionalGeneration", _seen(), **_IMAGE_INDEX, image_seq_length=4),
    "llava_next": _vision(
        "LlavaNextForConditionalGeneration",
        _seen(
            10,
            pixel_values=lambda r, s: _noise(s, r, 2, 3, 32, 32),
            image_sizes=lambda r, _: torch.tensor([[32, 32]] * r),
        ),
        **_IMAGE_INDEX,
        image_grid_pinpoints=[[32, 32]],
        vision_feature_layer=-1,
    ),
    "llava_onevision": _vision(
        "LlavaOnevisionForConditionalGeneration",
        _seen(
            10,
            pixel_values=lambda r, s: _noise(s, r, 2, 3, 32, 32),
            image_sizes=lambda r, _: torch.tensor([[32, 32]] * r),
        ),
        **_IMAGE_INDEX,
        image_grid_pinpoints=[[32, 32]],
        vision_feature_layer=-1,
    ),
    "mistral3": _vision(
        "Mistral3ForConditionalGeneration",
        _seen(1, image_sizes=lambda r, _: torch.tensor([[32, 32]] * r)),
        **_IMAGE_INDEX,
        vision_feature_layer=-1,
    ),
    "mllama": _vision(
        "MllamaForConditionalGeneration",
        lambda r, n, s: {
            **_cached(r, n, s),
            "pixel_values": _noise(s, r, 1, 1, 3, 32, 32),
            "aspect_ratio_ids": torch.ones(r, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(r, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(r, n, 1, 1, dtype=torch.long),
        },
        text_config={"cross_attention_layers": [1]},
        vision_config={
            "num_global_layers": 1,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 3 * WIDTH,
            "attention_heads": HEADS,
            "num_channels": 3,
        },
        **_IMAGE_INDEX,
    ),
    "ovis2": _vision("Ovis2ForConditionalGeneration", _cached, **_IMAGE_ID),
    "paddleocr_vl": _vision("PaddleOCRVLForConditionalGeneration", _cached, **_IMAGE_ID, text_config=_MIXED_ROPE),
    "paligemma": _vision(
        "PaliGemmaForConditionalGeneration",
        _seen(token_type_ids=None),
        **_IMAGE_INDEX,
        projection_dim=WIDTH,
        vision_config={"projection_dim": WIDTH},
    ),
    "qianfan_ocr": _vision(
        "QianfanOCRForConditionalGeneration",
        _seen(4, 64),
        **_IMAGE_ID,
        vision_config={"image_size": [64, 64], "patch_size": [16, 16]},
        image_seq_length=4,
    ),
    "qwen2_5_vl": _vision(
        "Qwen2_5_VLForConditionalGeneration",
        _grid(),
        **_IMAGE_ID,
        vision_config={**_MERGED, "window_size": 64, "fullatt_block_indexes": [1]},
        text_config=_MIXED_ROPE,
    ),
    "qwen2_vl": _vision(
        "Qwen2VLForConditionalGeneration",
        _grid(),
        **_IMAGE_ID,
        vision_config={"hidden_size": WIDTH, "mlp_ratio": 2},
        text_config=_MIXED_ROPE,
    ),
    "qwen3_5_vl": _vision(
        "Qwen3_5ForConditionalGeneration",
        _grid(),
        **_IMAGE_ID,
        vision_config={**_MERGED, "num_position_embeddings": 16},
        text_config={**_LINEAR, **_MIXED_ROPE},
    ),
    "qwen3_vl": _vision(
        "Qwen3VLForConditionalGeneration",
        _grid(),
        **_IMAGE_ID,
        vision_config={**_MERGED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text_config=_MIXED_ROPE,
    ),
    "qwen3_vl_moe": _vision(
        "Qwen3VLMoeForConditionalGeneration",
        _grid(),
        **_IMAGE_ID,
        vision_config={**_MERGED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text_config={**_MIXED_ROPE, "mlp_only_layers": [0]},
    ),
    "smolvlm": _vision(
        "SmolVLMForConditionalGeneration",
        _seen(4, pixel_values=lambda r, s: _noise(s, r, 1, 3, 64, 64)),
        **_IMAGE_ID,
        scale_factor=2,
        vision_config={"image_size": 64},
    ),
    "video_llama_3": _vision("VideoLlama3ForConditionalGeneration", _cached, **_IMAGE_ID),
    "vipllava": _vision(
        "VipLlavaForConditionalGeneration", _seen(), **_IMAGE_INDEX, vision_feature_layers=[-1, -2], image_seq_length=4
    ),
    "phi4_multimodal": _vision(
        "Phi4MultimodalForCausalLM",
        _cached,
        vision_config={"crop_size": 32},
        audio_config={
            "input_size": 32,
            "nemo_conv_channels": 32,
            "conv_chunk": 2,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
        },
    ),
    "kimi_k25": _vision("Kimi_K25ForConditionalGeneration", _cached, **_IMAGE_ID, text_config=_LATENT),
    "mistral_large4": _vision(
        "MistralLarge4ForConditionalGeneration",
        _seen(1, image_sizes=lambda r, _: torch.tensor([[32, 32]] * r)),
        **_IMAGE_INDEX,
        vision_feature_layer=-1,
        text_config=_LATENT,
    ),
    "minimax_m3_vl": _vision(
        "MiniMaxM3SparseForConditionalGeneration",
        _cached,
        **_IMAGE_INDEX,
        text_config={**_SPARSE, "dense_intermediate_size": 96, "shared_intermediate_size": 32, "rotary_dim": 8},
        projector_hidden_size=64,
    ),
    "inkling_vl": _vision(
        "InklingForConditionalGeneration",
        _cached,
        text_config={
            **_SPARSE,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "n_shared_experts": 1,
            "logits_mup_width_multiplier": 1.0,
        },
    ),
    "qwen2_5_omni": _vision(
        "Qwen2_5OmniThinkerForConditionalGeneration", _cached, vision_start_token_id=125, text_config=_MIXED_ROPE
    ),
    "qwen2_audio": _vision("Qwen2AudioForConditionalGeneration", _cached),
    "qwen3_omni_moe": _vision(
        "Qwen3OmniMoeThinkerForConditionalGeneration", _cached, vision_start_token_id=125, text_config=_MIXED_ROPE
    ),
    "voxtral": _vision("VoxtralForConditionalGeneration", _cached, audio_token_id=_IMAGE_TOKEN),
    "granite_speech": _vision("GraniteSpeechForConditionalGeneration", _cached),
    "pix2struct": _vision(
        "Pix2StructForConditionalGeneration",
        lambda r, n, s: {
            "flattened_patches": _noise(s, r, 8, 770).abs(),
            "decoder_input_ids": tokens(r, n, s)["input_ids"],
        },
    ),
    "kosmos2_5": _vision("Kosmos2_5ForConditionalGeneration", _cached),
    "video_llava": _vision("VideoLlavaForConditionalGeneration", _cached),
    "t5gemma2": _vision("T5Gemma2ForConditionalGeneration", _translated),
    "step3p7": _vision("Step3p7ForConditionalGeneration", _cached),
    "lxmert": _vision(
        "LxmertModel",
        lambda r, n, s: {**tokens(r, n, s), "visual_feats": _noise(s, r, 4, 32), "visual_pos": _noise(s, r, 4, 4)},
        visual_feat_dim=32,
        l_layers=1,
        x_layers=1,
        r_layers=1,
    ),
    "visual_bert": _vision(
        "VisualBertModel",
        lambda r, n, s: {**tokens(r, n, s), "visual_embeds": _noise(s, r, 4, 32)},
        visual_embedding_dim=32,
    ),
    "detr": _vision(
        "DetrForObjectDetection",
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "out_features": ["stage2"],
        },
        num_queries=4,
    ),
    "decision_transformer": _vision(
        "DecisionTransformerModel",
        lambda r, n, s: {
            "states": _noise(s, r, n, 17),
            "actions": _noise(s, r, n, 4),
            "rewards": _noise(s, r, n, 1),
            "returns_to_go": _noise(s, r, n, 1),
            "timesteps": torch.arange(n).repeat(r, 1),
            "attention_mask": torch.ones(r, n),
        },
    ),
}


def _samples(rows: int, length: int, seed: int) -> Inputs:
    return {"input_values": _noise(seed, rows, 20 * length + 32)}


def _dictated(name: str, *shape: int) -> Callable[[int, int, int], Inputs]:
    def inputs(rows: int, length: int, seed: int) -> Inputs:
        ids = tokens(rows, length, seed)["input_ids"]
        return {name: _noise(seed, rows, *shape), "decoder_input_ids": ids, "use_cache": False}

    return inputs


_WAVE = {
    "conv_dim": [32, 32],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}

_HEARING: dict[str, Entry] = {
    "audio_spectrogram_transformer": _vision(
        "ASTForAudioClassification", lambda r, _, s: {"input_values": _noise(s, r, 64, 32)}, max_length=64
    ),
    "data2vec_audio": _vision("Data2VecAudioForCTC", _samples, **_WAVE, conv_pos_kernel_size=3),
    "hubert": _vision("HubertForCTC", _samples, **_WAVE),
    "moonshine": _vision(
        "MoonshineForConditionalGeneration",
        _dictated("input_values", 4096),
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
    ),
    "parakeet": _vision(
        "ParakeetForCTC",
        lambda r, _, s: {"input_features": _noise(s, r, 96, 32)},
        encoder_config={"subsampling_conv_channels": 32, "subsampling_factor": 4},
    ),
    "sew": _vision("SEWForCTC", _samples, **_WAVE, squeeze_factor=2),
    "sew_d": _vision("SEWDForCTC", _samples, **_WAVE, squeeze_factor=2),
    "speech_to_text": _vision(
        "Speech2TextForConditionalGeneration",
        _dictated("input_features", 96, 32),
        input_feat_per_channel=32,
        conv_channels=64,
        max_source_positions=64,
        max_target_positions=64,
    ),
    "unispeech": _vision("UniSpeechForCTC", _samples, **_WAVE, num_ctc_classes=VOCABULARY),
    "unispeech_sat": _vision("UniSpeechSatForCTC", _samples, **_WAVE),
    "wav2vec2": _vision("Wav2Vec2ForCTC", _samples, **_WAVE),
    "wav2vec2_bert": _vision(
        "Wav2Vec2BertForCTC", lambda r, n, s: {"input_features": _noise(s, r, n, 32)}, feature_projection_input_dim=32
    ),
    "wav2vec2_conformer": _vision("Wav2Vec2ConformerForCTC", _samples, **_WAVE, conv_depthwise_kernel_size=7),
    "wavlm": _vision("WavLMForCTC", _samples, **_WAVE),
    "whisper": _vision(
        "WhisperForConditionalGeneration",
        _dictated("input_features", 32, 48),
        max_source_positions=24,
        max_target_positions=64,
    ),
    "patchtst": _vision(
        "PatchTSTForPrediction",
        lambda r, _, s: {"past_values": _noise(s, r, 64, 2)},
        num_input_channels=2,
        context_length=64,
        patch_length=32,
        patch_stride=32,
        prediction_length=4,
    ),
    "timesfm": _vision(
        "TimesFmModel",
        lambda r, _, s: {
            "past_values": _noise(s, r, 64),
            "past_values_padding": torch.zeros(r, 64),
            "freq": torch.zeros(r, 1, dtype=torch.long),
        },
        patch_length=32,
        context_length=64,
    ),
}


class BaichuanConfig(PreTrainedConfig):
    """A configuration that no library knows."""

    model_type = "baichuan_like"
    vocab_size: int = VOCABULARY
    hidden_size: int = WIDTH
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = HEADS
    tie_word_embeddings: bool = False


class BaichuanNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)


class BaichuanAttention(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        packed = self.W_pack(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(packed[0], packed[1], packed[2], attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class BaichuanMLP(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class BaichuanLayer(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = BaichuanNorm(config.hidden_size)
        self.post_attention_layernorm = BaichuanNorm(config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor]:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask)
        return (hidden + self.mlp(self.post_attention_layernorm(hidden)),)


class BaichuanModel(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BaichuanLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = BaichuanNorm(config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        # As Baichuan-13B: no rotation, but distances added to the scores, a slope for each head.
        places = torch.arange(input_ids.shape[1], device=hidden.device)
        slopes = 0.5 ** torch.arange(1, HEADS + 1, device=hidden.device)
        distances = (places[None, :] - places[:, None]).to(hidden.dtype)
        mask = (slopes[:, None, None] * distances).masked_fill(distances > 0, -torch.inf)[None].to(hidden.dtype)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(hidden.dtype).min)
        for layer in self.layers:
            (hidden,) = layer(hidden, mask)
        return self.norm(hidden)


class BaichuanForCausalLM(PreTrainedModel):
    """What a repository's own code brings: fused attention projections, under names that no table has."""

    config_class = BaichuanConfig
    base_model_prefix = "model"
    _no_split_modules = ("BaichuanLayer",)

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.12)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, attention_mask)))


_TABLES = (_DECODERS, _ENCODERS, _TRANSLATORS, _PICTURES, _SEEING, _HEARING)

ARCHITECTURES: dict[str, Architecture] = {
    "baichuan": Architecture(lambda: seeded(lambda: BaichuanForCausalLM(BaichuanConfig())), _cached, True),
    **{
        name: Architecture(build, inputs, name in _LISTED)
        for table in _TABLES
        for name, (model, build, inputs) in table.items()
        if model in _KNOWN  # Older versions of transformers lack some.
    },
}
