"""The zoo: for each architecture discovery, smoothing, quantizing, saving and loading hold, as the docs say."""

from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from examining import examine, row

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# Beside those that peers list, families of every kind of structure; the rest is slow.
ALSO = (
    "albert", "apertus", "arcee", "bamba", "bart", "bert", "bitnet", "clip", "codegen", "deberta_v2", "deepseek_v2",
    "dinov2", "distilbert", "ernie4_5", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma3n", "gemma4", "glm4",
    "gpt2", "gpt_neo", "gpt_oss", "granitemoe", "granitemoehybrid", "helium", "idefics3", "jamba", "jetmoe",
    "kimi_linear", "lfm2", "lfm2_moe", "llava", "mamba", "mamba2", "minimax", "mixtral", "mllama", "modernbert",
    "moonshine", "nemotron", "nemotron_h", "olmo2", "olmo_hybrid", "olmoe", "paligemma", "persimmon", "phi", "phimoe",
    "qwen2_vl", "qwen3_5", "qwen3_vl_moe", "recurrent_gemma", "roberta", "rwkv", "siglip", "smollm3", "swin", "t5",
    "t5gemma", "vit", "wav2vec2", "whisper", "xglm", "xlstm", "zamba2",
)  # fmt: skip
IN_SUITE = [name for name, a in ARCHITECTURES.items() if a.listed or name in ALSO]


def marked(name):
    return pytest.param(name, marks=[] if name in IN_SUITE else [pytest.mark.slow])


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text().splitlines()


def test_the_suite_holds_sixty_architectures():
    assert len(IN_SUITE) >= 60
    assert set(ALSO) <= set(ARCHITECTURES), "a name that the zoo does not have (any more)"


@pytest.mark.parametrize("name", map(marked, ARCHITECTURES))
def test_architecture(name, page):
    examined = examine(name)
    assert examined.quantized
    assert row(name, examined) in page, "run make models"


def test_what_no_peer_lists_has_the_mappings_of_its_attention_and_mlp(page):
    """Of decoders whose norms run before their layers."""
    for name in ("smollm3", "nemotron", "arcee", "helium", "persimmon", "xglm", "phi", "codegen", "minimax", "gpt_neo"):
        line = next(line for line in page if line.startswith(f"| {name} |"))
        assert int(line.split("|")[4]) >= 2
