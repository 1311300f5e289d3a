"""Report, page and card beside checkpoints: of every way to make one."""

import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from compressing import sentences, token_ids, tokenizer
from huggingface_hub import ModelCard

import bitpress
from bitpress import AWQModifier, BitpressError, GPTQModifier, QuantizationModifier
from bitpress.models.experts import find_layer
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.report.words import percent
from bitpress.solvers import round_to_nearest


def four_bits(**more):
    weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=16)
    return {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, **more}


def recipe():
    return [AWQModifier(), GPTQModifier(**four_bits(ignore=["lm_head"]))]


def source(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def told(directory):
    return json.loads((Path(directory) / "report.json").read_text())


WAYS = {
    "in memory": (recipe, token_ids, False),
    "streamed": (recipe, token_ids, True),
    "tensor by tensor": (lambda: QuantizationModifier(**four_bits(ignore=["lm_head"])), lambda: None, True),
    "without data": (lambda: QuantizationModifier(**four_bits(ignore=["lm_head"])), lambda: None, False),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_writes_report_page_and_card(way, tmp_path):
    make, data, stream = WAYS[way]
    bitpress.oneshot(
        source(tmp_path), data(), make(), output_dir=tmp_path / "out", stream=stream, progress=False
    )  # fmt: skip
    report, text = told(tmp_path / "out"), (tmp_path / "out" / "report.html").read_text()
    assert report["model"] == {"name": "model", "class": "LlamaForCausalLM"}
    assert str(tmp_path) not in json.dumps(report) + text
    assert len(report["layers"]) == 14
    for name, figures in report["layers"].items():
        assert name in text
        assert percent(figures.get("relative_error", figures["weight_error"])) in text
    assert set(report["histograms"]) <= set(report["layers"])
    assert len(report["histograms"]) == 6
    for name, each in report["histograms"].items():
        assert sum(each["weights"]["counts"]) == 16 * report["layers"][name]["shape"][1]
    model = bitpress.load(tmp_path / "out", packed=False)
    assert report["bits_per_weight"] * sum(
        find_layer(model, name).weight.numel() for name in report["layers"]
    ) == pytest.approx(8 * report["weight_bytes_after"], rel=1e-3)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert set(card.data.tags) == {"bitpress", "compressed-tensors"}
    assert card.data.base_model is None  # a directory is no id of the hub
    assert "vllm serve ." in card.text
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()) == yaml.safe_load(report["recipe"])


@pytest.fixture(scope="module")
def solved():
    return bitpress.oneshot(tiny.llama(num_hidden_layers=3), token_ids(), recipe(), progress=False)


def test_steps_go_from_nearest_to_what_is_stored(solved):
    layers = solved.bitpress.report["layers"]
    for each in layers.values():
        assert list(each["steps"]) == ["nearest", "AWQModifier", "GPTQModifier"]
        # Of the same layer by more rows.
        assert each["steps"]["GPTQModifier"] == pytest.approx(each["relative_error"], rel=0.5)
    sums = [sum(each["steps"][s] for each in layers.values()) for s in ("nearest", "AWQModifier", "GPTQModifier")]
    assert sums[0] > sums[1] > sums[2] > 0


@torch.no_grad()
def test_the_first_step_is_round_to_nearest(solved):
    original = tiny.llama(num_hidden_layers=3)
    layer = original.model.layers[0].self_attn.q_proj
    x = torch.cat(inputs(original, layer))
    args = four_bits()["config_groups"]["all"].weights
    rows = layer.weight[::2]  # 32 of 64
    rounded = round_to_nearest(rows, args, rows.dtype).dequantize()
    expected = (x @ (rounded - rows).T).square().sum() / (x @ rows.T).square().sum()
    found = solved.bitpress.report["layers"]["model.layers.0.self_attn.q_proj"]["steps"]["nearest"]
    assert found == pytest.approx(float(expected), rel=1e-3)


def inputs(model, layer):
    """What the layer is given by the calibration data."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for row in token_ids():
        model(torch.tensor([row]), use_cache=False)
    handle.remove()
    return seen


@torch.no_grad()
def test_errors_of_blocks_are_those_of_the_first_batch(solved):
    original, data = tiny.llama(num_hidden_layers=3), token_ids()
    blocks = solved.bitpress.report["blocks"]
    assert list(blocks) == [f"model.layers.{i}" for i in range(3)]
    candidates = []
    for row in data:
        ids = torch.tensor([row])
        exact, ours = (
            m.model(ids, output_hidden_states=True, use_cache=False).hidden_states for m in (original, solved)
        )
        # The last hidden state is behind the final norm: blocks 0 and 1 are seen as they are.
        errors = [
            ((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(ours[1:3], exact[1:3], strict=True)
        ]
        candidates.append([float(e) for e in errors])
    found = [blocks[f"model.layers.{i}"]["accumulated_error"] for i in range(2)]
    assert any(each == pytest.approx(found, rel=1e-3) for each in candidates)
    assert blocks["model.layers.0"]["own_error"] == pytest.approx(found[0], rel=1e-4)
    assert all(0 < each["own_error"] < 1 for each in blocks.values())


def test_inputs_are_described_before_they_are_smoothed(solved):
    figures = solved.bitpress.report["layers"]["model.layers.0.self_attn.q_proj"]["input"]
    assert figures == solved.bitpress.report["layers"]["model.layers.0.self_attn.v_proj"]["input"]
    original = tiny.llama(num_hidden_layers=3)
    with torch.no_grad():
        seen = inputs(original, original.model.layers[0].self_attn.q_proj)
    sizes = torch.cat(seen).square().mean(0).sqrt()
    assert figures["largest"] == pytest.approx(float(sizes.max()), rel=1e-4)
    assert figures["median"] == pytest.approx(float(sizes.median()), rel=1e-4)
    assert figures["channel"] == int(sizes.argmax())


def test_a_readme_of_the_users_stays(solved, tmp_path, caplog):
    solved.save_pretrained(tmp_path / "out")
    assert "bitpress writes this file" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text("Mine.\n")
    with caplog.at_level(logging.WARNING):
        solved.save_pretrained(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "Mine.\n"
    assert "# LlamaForCausalLM" in (tmp_path / "out" / "README.bitpress.md").read_text()
    assert "README.md stays as it is" in caplog.text
    # Its own is written anew.
    solved.save_pretrained(tmp_path / "again")
    first = (tmp_path / "again" / "README.md").read_text()
    (tmp_path / "again" / "README.md").write_text(first + "stale")
    solved.save_pretrained(tmp_path / "again", overwrite=True)
    assert (tmp_path / "again" / "README.md").read_text() == first


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_a_converted_checkpoint_has_a_card_of_its_format(kind, solved, tmp_path):
    fitting = bitpress.oneshot(
        tiny.llama(intermediate_size=128), recipe=QuantizationModifier(**four_bits(ignore=["lm_head"])), progress=False
    )
    fitting.save_pretrained(tmp_path / "out", format=kind)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["bitpress", kind]
    assert "gptqmodel" in card.text
    assert "bitpress.load" not in card.text
    assert (tmp_path / "out" / "report.html").is_file()


def test_dense_weights_and_plain_modules_have_cards(solved, tmp_path):
    solved.save_pretrained(tmp_path / "dense", save_compressed=False)
    text = (tmp_path / "dense" / "README.md").read_text()
    assert "Stored dense" in text
    assert "vllm serve" not in text
    module = bitpress.oneshot(
        tiny.MLP(16, 16, 16), [torch.randn(4, 16)], QuantizationModifier(**four_bits()), progress=False
    )
    bitpress.save(module, tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "bitpress.load" in text
    assert "from transformers" not in text
    assert ModelCard.load(tmp_path / "plain" / "README.md").data.pipeline_tag is None
    assert (tmp_path / "plain" / "report.html").is_file()


class Hub:
    """What the hub's client would do, without a hub."""

    there: str | None = None

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def file_exists(self, *_, **__):
        return Hub.there is not None

    def hf_hub_download(self, *_, **__):
        return Hub.there

    def upload_folder(self, *, repo_id, folder_path, **_):
        Hub.uploaded = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}"})


def test_the_card_goes_to_the_hub(solved, tmp_path, monkeypatch):
    monkeypatch.setattr("bitpress.checkpoints.pushing.HfApi", Hub)
    assert solved.push_to_hub("small", tags=["mine"]) == "https://hub/me/small"
    card = ModelCard(Hub.uploaded["README.md"].decode())
    assert set(card.data.tags) == {"bitpress", "compressed-tensors", "mine"}
    assert {"report.html", "report.json", "recipe.yaml", "model.safetensors"} <= Hub.uploaded.keys()
    monkeypatch.setattr(Hub, "there", str(tmp_path / "README.md"))
    (tmp_path / "README.md").write_text("Mine.")
    solved.push_to_hub("small")
    assert "README.md" not in Hub.uploaded
    assert b"# LlamaForCausalLM" in Hub.uploaded["README.bitpress.md"]


def test_an_evaluation_goes_into_the_report(tmp_path):
    path = source(tmp_path)
    bitpress.oneshot(path, token_ids(), recipe(), output_dir=tmp_path / "out", progress=False)
    before = told(tmp_path / "out")
    prompt = sentences()[0][:20]
    found = bitpress.evaluate(
        tmp_path / "out", sentences(), original=path, prompts=[prompt], report=True, max_seq_length=32, progress=False
    )
    after = told(tmp_path / "out")
    assert after["evaluation"]["perplexity"]["perplexity"] == found.perplexity.perplexity
    assert after["evaluation"]["continuations"][0]["prompt"] == prompt
    assert {name: value for name, value in after.items() if name != "evaluation"} == before
    text = (tmp_path / "out" / "report.html").read_text()
    assert f"{found.perplexity.perplexity:.4f}" in text
    assert f"{found.perplexity.perplexity:.4g}" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(BitpressError, match=r"report\.json of a checkpoint"):
        bitpress.evaluate(path, sentences(), report=True)


def test_a_hub_id_is_named_and_a_fence_holds(tmp_path):
    from bitpress.checkpoints.card import make_card

    config = {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "recipe.yaml").write_text("a: |\n  ````\n  # x\n")
    text = make_card(tmp_path)
    assert "`````yaml" in text
    report = {"model": {"name": "org/model", "class": "X"}, "layers": {}, "tokens": 0, "samples": 0, "versions": {}}
    report |= dict.fromkeys(("weight_bytes_before", "weight_bytes_after", "model_bytes_before", "bits_per_weight"), 1)
    (tmp_path / "report.json").write_text(json.dumps(report))
    card = ModelCard(make_card(tmp_path))
    assert (card.data.base_model, card.data.base_model_relation) == ("org/model", "quantized")
