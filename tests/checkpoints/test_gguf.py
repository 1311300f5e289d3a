"""A GGUF file is a model like any other: transformers dequantizes it, and it counts as quantized no more."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bitpress
from bitpress import BitpressError, GPTQModifier, QuantizationModifier, checkpoints

WIDTH, MLP, LAYERS, WORDS = 64, 128, 2, 96


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small Llama whose weights have 8 bits, in blocks of 32 with a scale each."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(WORDS)
    random = np.random.default_rng(0)

    def add(name, *shape):
        values = random.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd", WORDS, WIDTH)
    add("output", WORDS, WIDTH)
    add("output_norm", WIDTH)
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH // 2, WIDTH), ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH), ("ffn_gate", MLP, WIDTH), ("ffn_up", MLP, WIDTH), ("ffn_down", WIDTH, MLP),
        ):  # fmt: skip
            add(f"blk.{i}.{name}", rows, columns)
        add(f"blk.{i}.attn_norm", WIDTH)
        add(f"blk.{i}.ffn_norm", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def groups(target="Linear"):
    return {"group_0": {"targets": [target], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}


def test_compresses_and_serves(file, tmp_path):
    ids = torch.randint(3, WORDS, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    recipe = [GPTQModifier(config_groups=groups(), ignore=["lm_head"])]
    bitpress.oneshot(file, ids, recipe, output_dir=tmp_path / "out", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = checkpoints.load(tmp_path / "out")
    with torch.no_grad():
        logits = served(torch.tensor(ids)).logits
        assert torch.equal(logits, loaded(torch.tensor(ids)).logits)
        original = dense(torch.tensor(ids)).logits
    assert 0 < (logits - original).norm() < 0.5 * original.norm()


def test_its_weights_are_those_of_the_file(file, tmp_path):
    quantizer = QuantizationModifier(config_groups=groups(r"re:.*self_attn.*"))
    bitpress.oneshot(file, None, [quantizer], output_dir=tmp_path / "out", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(kept["model.layers.1.mlp.up_proj.weight"], dense.model.layers[1].mlp.up_proj.weight)


def test_is_not_streamed(file, tmp_path):
    with pytest.raises(BitpressError, match="is a file"):
        bitpress.oneshot(file, None, "w4a16-fast", output_dir=tmp_path / "out", stream=True)
