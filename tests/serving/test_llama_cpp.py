"""GGUF files in llama.cpp: needs llama-cpp-python.

As a rule it rounds the inputs of quantized weights to 8 bits, so that what it says is near what we say, no more. Where
it has unpacked the same file itself, to floats of 32 bits, it says the same but for the order of adding up.
"""

from pathlib import Path

import compressing
import numpy as np
import pytest
import tiny
import torch
from serving.comparing import PROMPTS, smollm2

import bitpress

pytestmark = pytest.mark.serving
llama_cpp = pytest.importorskip("llama_cpp")

TOKENS = 24
GRIDS = {"Q4_0": {"symmetric": True}, "Q4_1": {"symmetric": False}, "Q8_0": {"symmetric": True, "bits": 8}}
# A weight in float16 is off by 2^-12 of itself; llama.cpp multiplies scale and integer in float32. Q4_1 holds the least
# weight of a group, zero point times scale, in float16, too.
ROUNDED = {"Q4_0": 2e-3, "Q4_1": 5e-3, "Q8_0": 2e-3}


def runner(file: Path, **options):
    return llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1, **options)


def unpacked(folder: Path):
    """The file as llama.cpp itself unpacks it, computing in float32 throughout."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    files = folder / "model.gguf", folder / "float32.gguf"
    assert llama_cpp.llama_model_quantize(*(bytes(file) for file in files), how) == 0
    return runner(files[1], type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False)


def logits_of(run, tokens: list[int]) -> torch.Tensor:
    """The logits of every token: (tokens, vocabulary)."""
    run.eval(tokens)
    return torch.from_numpy(np.array(run.scores[: len(tokens)]))


def continuation(run, ids: list[int]) -> list[int]:
    run.reset()
    return [token for token, _ in zip(run.generate(ids, temp=0.0), range(TOKENS), strict=False)]


@pytest.mark.parametrize("build", [tiny.llama, tiny.qwen2, tiny.qwen3], ids=lambda build: build.__name__)
@pytest.mark.parametrize("grid", GRIDS)
def test_logits(tmp_path, build, grid):
    # Scales of float16, which the file holds.
    model = build(hidden_size=128, intermediate_size=256, tie_word_embeddings=False).half()
    bitpress.oneshot(model, None, compressing.rtn(**GRIDS[grid]), progress=False)
    model.save_pretrained(tmp_path / "out", format="gguf")
    tokens = compressing.token_ids(1, 32)[0]
    with torch.no_grad():
        wanted = model.float()(torch.tensor([tokens])).logits[0]
    same = logits_of(unpacked(tmp_path / "out"), tokens)
    assert (same - wanted).norm() < ROUNDED[grid] * wanted.norm()
    near = logits_of(runner(tmp_path / "out" / "model.gguf"), tokens)
    assert (near - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("grid", ["Q4_0", "Q4_1"])
def test_a_real_model_goes_on_as_ours_does(tmp_path, grid):
    model, tokenizer = smollm2().load_smollm2(torch.float16)
    bitpress.oneshot(model, None, compressing.rtn(**GRIDS[grid]), tokenizer=tokenizer, progress=False)
    model.save_pretrained(tmp_path / "out", format="gguf")
    run, model = unpacked(tmp_path / "out"), model.float()
    for text in PROMPTS:
        ids = tokenizer(text)["input_ids"]
        assert run.tokenize(text.encode(), add_bos=False, special=True) == ids
        found = continuation(run, ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1]
        lead = logits.gather(1, torch.tensor(found)[:, None])[:, 0] - logits.max(-1).values
        # The likeliest token; only where the file's own rounding decides between two may it be the other.
        assert (lead >= -ROUNDED[grid] * logits.abs().max()).all()
