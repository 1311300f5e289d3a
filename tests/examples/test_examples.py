"""Every example, run as a user runs it: what it claims is what it shows."""

import json
import math
import re
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
NUMBER = r"(\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?)"


def found(pattern, text):
    """The numbers of the first match; the pattern has # for each."""
    match = re.search(pattern.replace("#", NUMBER), text)
    assert match, f"{pattern!r} is not in:\n{text}"
    return [float(number.replace(",", "")) for number in match.groups()]


def stored(folder):
    """The names of the tensors in a checkpoint."""
    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def test_every_example_has_a_test():
    examples = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")}
    sources = [*Path(__file__).parent.glob("test_*.py"), ROOT / "tests" / "test_smollm2.py"]
    tested = {name for source in sources for name in re.findall(r'"([\w-]+\.(?:py|ipynb))"', source.read_text())}
    assert examples - tested == set()


def test_every_example_is_in_the_docs():
    docs = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    examples = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")}
    assert {name for name in examples if name not in docs} == set()


def test_tiny_models(tiny_models):
    """What "tiny_models.py" makes has learned: guessing one of 512 tokens would be 6.2 nats."""
    losses = [float(n) for n in re.findall(r"([\d.]+) nats a token", tiny_models["said"])]
    assert len(losses) == 3
    assert max(losses[:2]) < 0.9 * math.log(512)
    assert losses[2] < math.log(512)


def test_llama_awq(workshop, tiny_models):
    said = workshop.run("llama_awq.py", tiny_models["llama"], "awq")
    layers, mappings, before, after = found(r"# layers, # mappings .*\n# bytes of weights, now #", said)
    rounded, rounded_lost = found(r"rounded +perplexity #   KL divergence #", said)
    awq, awq_lost = found(r"AWQ +perplexity #   KL divergence #", said)
    assert (layers, mappings) == (2 * 7, 2 * 4)
    assert after < before / 6
    assert awq_lost < rounded_lost / 2
    assert awq < rounded
    packed = [name for name in stored(workshop.folder / "awq") if name.endswith("weight_packed")]
    assert len(packed) == layers
    assert (workshop.folder / "awq" / "recipe.yaml").exists()


def test_custom_architecture(workshop):
    said = workshop.run("custom_architecture.py")
    assert 'AWQMapping(r"re:blocks\\.\\d+\\.norm$", [' in said
    refused = said.partition("a wrong mapping:")[2].partition("Digits")[0]
    assert "re:.*gate$" in refused
    moved, rounding = found(r"moves by\s+# of what.*explains\s+#\)", " ".join(refused.split()))
    assert moved > 100 * rounding
    won = [int(percent) for percent in re.findall(r"blocks\.\d\.\w+ +\(user\) (-?\d+)% less", said)]
    assert len(won) == 3 * 2
    assert min(won) >= 0
    assert max(won) > 5


def test_custom_modifier(workshop, tiny_models):
    source = (ROOT / "examples" / "custom_modifier.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    said = workshop.run("custom_modifier.py", tiny_models["llama"])
    by_weight, weight_perplexity = found("#% zeros by weight alone +perplexity #", said)
    by_input, input_perplexity, original = found("#% zeros by weight and input +perplexity #, of the original #", said)
    assert by_weight == by_input == pytest.approx(40, abs=2)
    assert original < input_perplexity < weight_perplexity


def test_bert_encoder(workshop, tiny_models):
    said = workshop.run("bert_encoder.py", tiny_models["bert"], "encoder")
    (rounded,), (gptq,) = found("Quantization +embeddings off by #%", said), found("GPTQ +embeddings off by #%", said)
    assert 0 < gptq < rounded
    assert "the same, bit for bit" in said
    assert not [name for name in stored(workshop.folder / "encoder") if "pooler" in name and "packed" in name]


def test_mixture_of_experts(workshop, tiny_models):
    said = workshop.run("mixture_of_experts.py", tiny_models["moe"], "experts")
    perplexity, original, lost = found("perplexity #, of the original #; KL divergence #", said)
    assert original < 1.5 * perplexity
    assert perplexity < 1.5 * original
    assert 0 < lost < 1
    names = stored(workshop.folder / "experts")
    experts = [name for name in names if ".experts." in name and name.endswith("weight_packed")]
    # 2 blocks of 4 experts with 3 layers each
    assert len(experts) == 2 * 4 * 3
    assert not [name for name in names if ".gate.weight_packed" in name]
    # Gate and up of all experts, and the router
    assert found("is balanced with # layers", said) == [9]


def test_w8a8(workshop, tiny_models):
    said = workshop.run("w8a8.py", tiny_models["llama"], "w8a8")
    lost = {name: found(rf"{name} +perplexity [\d.]+ +KL divergence #", said)[0] for name in (
        "W8A8", "SmoothQuant 0.5", "SmoothQuant search",
    )}  # fmt: skip
    assert lost["SmoothQuant search"] < lost["W8A8"]
    assert "8-bit weights, 8-bit activations" in said
    config = json.loads((workshop.folder / "w8a8" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True


def test_bit_budget(workshop, tiny_models):
    said = workshop.run("bit_budget.py", tiny_models["llama"], "bits")
    spent, budget = found("# bytes in all; 4 bits throughout: # bytes", said)
    uniform, mixed = (
        found(rf"{name} +perplexity [\d.]+ +KL divergence #", said)[0]
        for name in ("4 bits throughout", "bits by budget")
    )
    assert 0.9 * budget < spent <= budget
    assert mixed < uniform
    groups = json.loads((workshop.folder / "bits" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len({group["weights"]["num_bits"] for group in groups.values()}) > 1


def test_two_processes(workshop, tiny_models):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = workshop.run("two_processes.py", tiny_models["llama"], "by-two", launcher=torchrun)
    checksums = re.findall(r"process (\d) of 2: checksum ([0-9a-f]{8})", said)
    assert sorted(number for number, _ in checksums) == ["1", "2"]
    assert len({checksum for _, checksum in checksums}) == 1
    assert json.loads((workshop.folder / "by-two" / "report.json").read_text())["ranks"] == 2


def test_evaluation(workshop, tiny_models):
    said = workshop.run("evaluation.py", tiny_models["llama"])
    (four,), (three,) = (found(rf"{bits} bits +│ [\d.]+ +│ [\d.]+ +│ # ±", said) for bits in (4, 3))
    assert 0 < four < three
    assert said.count("the original says") == 3


def test_packed_runtime(workshop, tiny_models):
    said = workshop.run("packed_runtime.py", tiny_models["llama"], "packed")
    size, off = {}, {}
    for name in ("unpacked", "packed", "packed, exact"):
        size[name], off[name] = found(rf"(?m)^{name} +# MB +logits off by #", said)
    assert size["packed"] < size["unpacked"]
    assert off["packed"] < 0.1
    assert off["packed, exact"] == 0
    assert "Emma Woodhouse, handsome, clever, and rich, had …" in said


@pytest.mark.slow
def test_demo(workshop, tiny_models):
    """With a tiny model in SmolLM2's place."""
    said = workshop.run("demo.py", SMOLLM2=str(tiny_models["llama"]))
    before, after = found(r"weights on disk +│ # MB +│ # MB", said)
    assert after < before
    assert re.search(r"what memory says +│ +│ bit for bit", said)
    assert (workshop.folder / "smollm2-135m-awq" / "config.json").exists()
