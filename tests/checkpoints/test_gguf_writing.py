"""GGUF files of our grids, read by the gguf package and by transformers."""

import json
import logging

import compressing
import gguf
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import bitpress
from bitpress import BitpressError
from bitpress.checkpoints import packed_weight
from bitpress.checkpoints.formats.gguf.architectures import extra_tensors
from bitpress.checkpoints.formats.gguf.blocks import block_type, to_blocks
from bitpress.checkpoints.formats.gguf.vocabulary import _LLAMA3, _QWEN2, pre_tokenizer
from bitpress.checkpoints.formats.layer import Layer
from bitpress.checkpoints.formats.rounding import Rounding
from bitpress.quantization import QuantizationStrategy, QuantizedWeight

DTYPE = torch.bfloat16


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([(2, True), (3, False), (4, True), (4, False), (8, True)]),
    st.integers(0, 2**32 - 1),
)
def test_blocks_are_what_ggml_reads(rows, groups, group, grid, seed):
    bits, symmetric = grid
    scheme = compressing.scheme(bits, symmetric, group_size=group)
    shape, half = (rows, group * groups), 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(-half, half, (rows, groups), generator=generator, dtype=torch.int8)
    weight = QuantizedWeight(
        torch.randint(-half, half, shape, generator=generator, dtype=torch.int8),
        (torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3).half(),
        torch.zeros_like(zeros) if symmetric else zeros,
        scheme.weights,
    )
    layer = Layer("layer", shape, scheme)
    minima = Rounding(torch.float16)
    blocks = to_blocks(layer, weight, Rounding(torch.float16), minima)
    read = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[block_type(layer)])
    scale, zero = (x.float().repeat_interleave(group, 1) for x in (weight.scale, weight.zero_point))
    exact = (weight.values - zero) * scale
    off = ((torch.from_numpy(np.asarray(read)) - exact) / scale).abs().max().item()
    assert off <= minima.greatest * 1.001
    assert minima.greatest <= (0.0 if symmetric else 16 * 2**-11)


def compressed(path, build, tokenizer=None, **options):
    model = build().to(DTYPE)
    bitpress.oneshot(model, None, compressing.rtn(**options), tokenizer=tokenizer, progress=False)
    model.save_pretrained(path, format="gguf")
    return model


@pytest.mark.parametrize("build", [tiny.llama, tiny.mistral, tiny.qwen2, tiny.qwen3], ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        {"symmetric": True, "bits": 8, "strategy": QuantizationStrategy.CHANNEL},
        {"symmetric": True, "group_size": 64, "targets": ["re:.*self_attn.o_proj"]},
    ],
    ids=["Q4_0", "Q8_0", "part"],
)
def test_transformers_reads_the_same_weights(tmp_path, build, options):
    model = compressed(tmp_path / "out", build, **options)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=DTYPE)
    wanted, found = model.state_dict(), read.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_zero_points_move_weights_by_less_than_a_hundredth_of_a_step(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "bitpress"):
        model = compressed(tmp_path / "out", tiny.llama)
    assert any("of a step of the grid" in record.getMessage() for record in caplog.records)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    moved = []
    for name, layer in model.named_modules():
        if hasattr(layer, "quantization_scheme"):
            weight = packed_weight(name, layer).unpack()
            scale, zero = (x.float().repeat_interleave(32, 1) for x in (weight.scale, weight.zero_point))
            off = (weight.values - zero) * scale - read.get_submodule(name).weight
            moved.append((off / scale).abs().max().item())
    assert 0 < max(moved) < 0.01


def test_models_that_are_not_covered_are_refused(tmp_path):
    model = tiny.opt().to(DTYPE)
    with pytest.raises(BitpressError, match=r"not of 'opt'.*convert_hf_to_gguf"):
        bitpress.oneshot(model, None, compressing.rtn(), output_dir=tmp_path / "out", format="gguf", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_context_ends_where_the_window_does(tmp_path):
    compressed(tmp_path / "out", tiny.mistral, symmetric=True)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.get_field("llama.context_length").contents() == 8


def test_llama_3_stretches_its_frequencies(tmp_path):
    rotary = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = tiny.llama(rope_parameters=rotary, max_position_embeddings=512)
    plain = tiny.llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, max_position_embeddings=512)
    factors = extra_tensors(model.config.to_dict())["rope_freqs.weight"]
    stretched = plain.model.rotary_emb.inv_freq / factors
    torch.testing.assert_close(stretched, model.model.rotary_emb.inv_freq)
    assert factors.min() == 1
    assert factors.max() == 8


def byte_level(steps) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat " * 5, "in 1984 they'd sing: la la la!"], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def split(pattern):
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


STEPS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "dbrx": split(_LLAMA3),
    "qwen2": split(_QWEN2),
}


@pytest.mark.parametrize("kind", STEPS)
def test_the_tokenizer_is_in_the_file(tmp_path, kind):
    tokenizer = byte_level(STEPS[kind])
    compressed(tmp_path / "out", lambda: tiny.llama(vocab_size=320), tokenizer, symmetric=True)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    assert said["tokenizer.ggml.pre"] == kind
    tokens = said["tokenizer.ggml.tokens"]
    assert len(tokens) == 320
    assert {token: tokens[i] for token, i in tokenizer.get_vocab().items()} == {t: t for t in tokenizer.get_vocab()}
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert said["tokenizer.ggml.merges"] == [" ".join(pair) for pair in stored]
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
    types = said["tokenizer.ggml.token_type"]
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert types[-1] == gguf.TokenType.UNUSED


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(BitpressError, match=r"WordLevel.*Remove tokenizer\.json"):
        compressed(tmp_path / "out", tiny.llama, compressing.tokenizer(), symmetric=True)
    assert not list(tmp_path.iterdir())
    whole = {"model": {"type": "BPE", "ignore_merges": True}, "pre_tokenizer": {"pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}}, {"type": "ByteLevel", "use_regex": False},
    ]}}  # fmt: skip
    assert pre_tokenizer(whole) == "llama-bpe"
