"""GGUF files in llama.cpp: needs llama-cpp-python. It rounds activations to 8 bits, so logits are near ours."""

import os
from pathlib import Path

import compressing
import numpy as np
import pytest
import tiny
import torch

import bitpress

pytestmark = pytest.mark.serving
llama_cpp = pytest.importorskip("llama_cpp")

# A model directory with a tokenizer, for what random weights cannot show: SmolLM2-135M, for instance.
MODEL = os.environ.get("BITPRESS_TEST_MODEL", "")
TEXTS = ["The capital of France is", "def fibonacci(n):\n    ", "In 1984 they'd said: 123 cats — naïve café…\n\n  and"]


def logits_of(path: Path, tokens: list[int]) -> torch.Tensor:
    """The logits of every token: (tokens, vocabulary)."""
    run = llama_cpp.Llama(str(path / "model.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    run.eval(tokens)
    return torch.from_numpy(np.array(run.scores[: len(tokens)]))


@pytest.mark.parametrize("build", [tiny.llama, tiny.qwen2, tiny.qwen3], ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    "options", [{"symmetric": True}, {"symmetric": False}, {"symmetric": True, "bits": 8}], ids=["Q4_0", "Q4_1", "Q8_0"]
)
def test_logits_are_near(tmp_path, build, options):
    wide = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
    model = build(**wide)
    bitpress.oneshot(model, None, compressing.rtn(**options), progress=False)
    model.save_pretrained(tmp_path / "out", format="gguf")
    tokens = compressing.token_ids(1, 32)[0]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    found = logits_of(tmp_path / "out", tokens)
    # A wrong order of rows, or of nibbles, would make it about 1.4.
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.skipif(not MODEL, reason="BITPRESS_TEST_MODEL names no model")
@pytest.mark.parametrize("symmetric", [True, False], ids=["Q4_0", "Q4_1"])
def test_text_goes_on_as_ours_does(tmp_path, symmetric):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    recipe = compressing.rtn(symmetric=symmetric)
    bitpress.oneshot(model, None, recipe, tokenizer=tokenizer, progress=False)
    model.save_pretrained(tmp_path / "out", format="gguf")
    run = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    same = 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert run.tokenize(text.encode(), add_bos=False, special=True) == ids
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        run.reset()
        made = [token for token, _ in zip(run.generate(ids, temp=0.0), range(16), strict=False)]
        same += sum(a == b for a, b in zip(out, made, strict=False)) >= 8
    assert same >= len(TEXTS) - 1
