"""oneshot from end to end: whatever the model, the data and the recipe are given as."""

import json
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from compressing import awq, rtn, scheme, sentences, token_ids, tokenizer
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitpress
from bitpress import AWQMapping, AWQModifier, QuantizationModifier, Recipe, oneshot

LLAMA_LAYERS = 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A dense model with its tokenizer, as a user has it on the disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}


def wide():
    """Wide enough for the presets' groups of 128."""
    return tiny.llama(hidden_size=128, intermediate_size=128)


def same_weights(a, b):
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


# The whole way.


@pytest.mark.parametrize("as_text", [str, Path])
def test_from_a_path_to_a_checkpoint(as_text, checkpoint, tmp_path):
    (tmp_path / "novel.txt").write_text("\n\n".join(sentences()))
    out = tmp_path / "deep" / "out"
    oneshot(
        as_text(checkpoint),
        as_text(tmp_path / "novel.txt"),
        awq(),
        num_calibration_samples=8,
        max_seq_length=16,
        output_dir=as_text(out),
    )
    model = bitpress.load(out)
    assert len(layers(model)) == LLAMA_LAYERS
    assert torch.equal(tiny.logits(load(out)), tiny.logits(model))
    assert not torch.equal(tiny.logits(model), tiny.logits(load(checkpoint)))
    text = sentences(1)[0]
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == tokenizer()(text).input_ids
    assert Recipe.of(out / "recipe.yaml") == Recipe.of(awq())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "novel.txt"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_report(checkpoint, tmp_path):
    oneshot(checkpoint, sentences(), awq(), num_calibration_samples=6, max_seq_length=20, output_dir=tmp_path)
    model = bitpress.load(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert (report["samples"], report["tokens"], report["pipeline"]) == (6, 120, "sequential")
    assert report["quantized_layers"] == LLAMA_LAYERS == len(report["layers"])
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in layers(model).items():
        figures = report["layers"][name]
        own = [t.nbytes for key, t in stored.items() if key.startswith(f"{name}.")]
        assert figures["stored_bytes"] == sum(own)
        assert (figures["bits"], figures["shape"]) == (4, list(layer.weight.shape))
        assert 0 < figures["relative_error"] < 1
    assert report["weight_bytes_after"] == sum(f["stored_bytes"] for f in report["layers"].values())
    assert report["weight_bytes_before"] == sum(layer.weight.nbytes for layer in layers(model).values())
    assert len(report["mappings"]) == 8
    for mapping in report["mappings"]:
        assert mapping["source"] == "discovery"
        assert mapping["error"] <= mapping["error_before"]
        assert mapping["proof"] < 1e-3
    assert set(report["seconds"]) >= {"dry run", "proofs", "calibrate", "solve"}
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__


def test_the_model_is_changed_in_place_and_returned():
    model = tiny.llama()
    before, parameters = tiny.snapshot(model), dict(model.named_parameters())
    modes = {name: index % 2 == 0 for index, (name, _) in enumerate(model.named_modules())}
    for name, module in model.named_modules():
        module.training = modes[name]
    assert oneshot(model, token_ids(), awq(), num_calibration_samples=6) is model
    assert {name: module.training for name, module in model.named_modules()} == modes
    # The state dict has the same keys, and the parameters are the same objects; what is quantized is not trained.
    assert model.state_dict().keys() == before.keys()
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {f"{n}.weight" for n in layers(model)}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"{name}.weight" for name in layers(model)} <= changed
    assert not changed & {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for layer in layers(model).values():
        groups = layer.weight.unflatten(1, (-1, 32))
        assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= 16
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [name for name, m in model.named_modules() if "forward" in m.__dict__]


def test_it_is_deterministic_and_heeds_the_seed(checkpoint):
    def once(**options):
        return oneshot(checkpoint, sentences(40), awq(), num_calibration_samples=4, max_seq_length=16, **options)

    first = once()
    torch.manual_seed(123)
    assert same_weights(first, once())
    assert not same_weights(first, once(seed=7))
    assert same_weights(once(shuffle_calibration_samples=False), once(shuffle_calibration_samples=False, seed=7))


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    oneshot(tiny.llama(), token_ids(), awq(), num_calibration_samples=6)
    assert torch.equal(torch.rand(3), expected)


def test_a_recipe_serves_two_models():
    recipe = awq()
    models = [oneshot(tiny.llama(), token_ids(), recipe, num_calibration_samples=6) for _ in range(2)]
    assert same_weights(*models)
    opt = oneshot(tiny.opt(), token_ids(), recipe, num_calibration_samples=6)
    assert same_weights(opt, oneshot(tiny.opt(), token_ids(), awq(), num_calibration_samples=6))


def test_awq_is_better_than_rounding_to_nearest():
    # Channels that stand out are what AWQ is for.
    def outlying():
        model = tiny.llama()
        with torch.no_grad():
            for layer in model.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight[::9] *= 20
        return model

    reference = tiny.logits(outlying())
    smoothed = oneshot(outlying(), token_ids(24), awq(bits=3), num_calibration_samples=24)
    rounded = oneshot(outlying(), None, rtn(bits=3))
    error, worse = ((tiny.logits(m) - reference).square().mean() for m in (smoothed, rounded))
    assert error < 0.8 * worse


# The recipe.


@pytest.mark.parametrize("way", ["name", "file", "text", "modifier", "tuple", "recipe"])
def test_ways_to_state_a_recipe(way, tmp_path):
    stated = QuantizationModifier(ignore=["lm_head"], scheme="W8A16")
    text = Recipe.of(stated).to_yaml()
    (tmp_path / "r.yaml").write_text(text)
    ways = {
        "name": "w8a16",
        "file": tmp_path / "r.yaml",
        "text": text,
        "modifier": stated,
        "tuple": (stated,),
        "recipe": Recipe.of(stated),
    }
    model = oneshot(wide(), recipe=ways[way])
    assert same_weights(model, oneshot(wide(), None, [stated]))
    weights = next(iter(layers(model).values())).quantization_scheme.weights
    assert (weights.num_bits, weights.symmetric) == (8, True)


def test_awq_alone_quantizes_as_well():
    both = oneshot(tiny.llama(), token_ids(), awq(), num_calibration_samples=6)
    for alone in (
        AWQModifier(ignore=["lm_head"], config_groups={"group_0": scheme()}),
        AWQModifier(ignore=["lm_head"], scheme=scheme()),
        AWQModifier(ignore=["lm_head"], targets=["Linear"], bits=4, symmetric=False, group_size=32),
    ):
        assert same_weights(oneshot(tiny.llama(), token_ids(), alone, num_calibration_samples=6), both)


def test_users_mappings():
    mappings = [AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])]
    model = oneshot(tiny.llama(), token_ids(), awq(mappings=mappings), num_calibration_samples=6)
    original = tiny.llama()
    assert torch.equal(
        model.get_submodule("model.layers.0.input_layernorm").weight,
        original.get_submodule("model.layers.0.input_layernorm").weight,
    )
    assert not same_weights(model, oneshot(tiny.llama(), None, rtn()))


# The data.


def _text_files(folder):
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences()))
    return folder / "a.jsonl"


def _parquet(folder):
    datasets.Dataset.from_dict({"text": sentences()}).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


TEXTS = {
    "strings": lambda _: sentences(),
    "rows": lambda _: [{"text": text} for text in sentences()],
    "a dataset": lambda _: datasets.Dataset.from_dict({"text": sentences()}),
    "a jsonl file": _text_files,
    "a parquet file": _parquet,
    "token ids": lambda _: [tokenizer()(text).input_ids for text in sentences()],
    "input_ids": lambda _: datasets.Dataset.from_list([dict(tokenizer()(text)) for text in sentences()]),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_form_of_the_same_texts(kind, tmp_path):
    data = TEXTS[kind](tmp_path)
    options = {"num_calibration_samples": 6, "max_seq_length": 16, "tokenizer": tokenizer()}
    model = oneshot(tiny.llama(), data, awq(), **options)
    assert same_weights(model, oneshot(tiny.llama(), sentences(), awq(), **options))


def test_the_other_texts_options(tmp_path):
    options = {"num_calibration_samples": 4, "max_seq_length": 16, "tokenizer": tokenizer()}
    table = datasets.DatasetDict({
        "train": datasets.Dataset.from_dict({"story": sentences()}),
        "test": datasets.Dataset.from_dict({"story": sentences(seed=1)}),
    })  # fmt: skip
    test = oneshot(tiny.llama(), table, awq(), text_column="story", splits="test", **options)
    assert same_weights(test, oneshot(tiny.llama(), sentences(seed=1), awq(), **options))
    joined = oneshot(tiny.llama(), sentences(), awq(), concatenate_data=True, **(options | {"max_seq_length": 100}))
    assert not same_weights(test, joined)


def test_batches():
    def batches():
        return [tiny.tokens(2, 24, seed) for seed in range(3)]

    model = oneshot(tiny.llama(), batches(), awq(), num_calibration_samples=6)
    for data in (iter(batches()), DataLoader([b["input_ids"] for b in batches()], batch_size=None)):
        assert same_weights(oneshot(tiny.llama(), data, awq(), num_calibration_samples=6), model)


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_padding_does_not_count(pipeline):
    """Rows of different lengths, one by one and padded together, calibrate alike but for rounding."""
    data = [ids[: 10 + 3 * i] for i, ids in enumerate(token_ids())]
    options = {"num_calibration_samples": 6, "pipeline": pipeline, "shuffle_calibration_samples": False}
    alone, padded = (oneshot(tiny.llama(), data, awq(), batch_size=size, **options) for size in (1, 3))
    changed = oneshot(tiny.llama(), [ids + [0] * 60 for ids in data], awq(), batch_size=1, **options)

    def distance(a, b):
        return sum((x - y).square().sum() for x, y in zip(a.parameters(), b.parameters(), strict=True))

    assert distance(alone, padded) < 0.2 * distance(alone, changed)


@pytest.mark.parametrize("given", ["object", "path"])
def test_a_tokenizer_is_used_and_saved(given, checkpoint, tmp_path):
    model = oneshot(
        tiny.llama(),
        sentences(),
        awq(),
        tokenizer=tokenizer() if given == "object" else str(checkpoint),
        num_calibration_samples=4,
        output_dir=tmp_path / "out",
    )
    assert len(layers(model)) == LLAMA_LAYERS
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1").input_ids == tokenizer()("w1").input_ids


class Processor:
    """Of a multimodal model: its tokenizer is for text, it does not take text itself."""

    def __init__(self):
        self.tokenizer = tokenizer()

    def save_pretrained(self, folder):
        (Path(folder) / "processor_config.json").write_text("{}")


@pytest.mark.parametrize("as_path", [True, False])
def test_a_processors_tokenizer_is_used(as_path, checkpoint, tmp_path):
    source = checkpoint if as_path else tiny.llama()
    options = {"num_calibration_samples": 4, "max_seq_length": 16}
    model = oneshot(source, sentences(), awq(), processor=Processor(), output_dir=tmp_path / "out", **options)
    if as_path:
        model = bitpress.load(tmp_path / "out", packed=False)
    assert same_weights(model, oneshot(tiny.llama(), sentences(), awq(), tokenizer=tokenizer(), **options))
    assert (tmp_path / "out" / "processor_config.json").exists()


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    model = oneshot(tmp_path / "dense", token_ids(), awq(), num_calibration_samples=6)
    assert same_weights(model, oneshot(tiny.llama(), token_ids(), awq(), num_calibration_samples=6))


def test_a_checkpoint_keeps_its_dtype(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    oneshot(tmp_path / "half", None, rtn(), output_dir=tmp_path / "out")
    model = oneshot(tmp_path / "half", None, rtn())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    back = load(tmp_path / "out")
    assert torch.equal(tiny.logits(back), tiny.logits(model))
    assert tiny.logits(back).dtype == torch.bfloat16


def test_recipes_without_statistics_need_no_data(monkeypatch):
    monkeypatch.setattr(type(tiny.llama()), "forward", None)
    assert len(layers(oneshot(wide(), recipe="- QuantizationModifier: {scheme: W8A16}"))) == LLAMA_LAYERS + 1


# Pipelines.


def test_pipelines_can_be_named():
    models = {
        name: oneshot(tiny.llama(), token_ids(), awq(), num_calibration_samples=6, pipeline=name)
        for name in (None, "sequential", "basic")
    }
    assert same_weights(models[None], models["sequential"])
    assert not same_weights(models[None], models["basic"])
    free = oneshot(tiny.llama(), token_ids(), rtn(), num_calibration_samples=6, pipeline="datafree")
    sequential = oneshot(tiny.llama(), token_ids(), rtn(), num_calibration_samples=6, pipeline="sequential")
    assert same_weights(free, sequential)


def test_sequential_targets():
    seen = []

    def labels(**options):
        model = oneshot(tiny.llama(), token_ids(), rtn(), num_calibration_samples=6, pipeline="sequential", **options)
        return list(model.bitpress.report["seconds"]), seen.append(model)

    labels(sequential_targets=["LlamaMLP", "LlamaAttention"])
    labels()
    assert same_weights(*seen)


class Wrapper(nn.Module):
    """Passes on whatever it is given, as the wrappers of adapters do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_wrapped_model_keeps_no_cache():
    mappings = [AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"])]
    recipe = awq(ignore=["re:.*lm_head"], mappings=mappings)
    wrapper = Wrapper(tiny.llama())
    assert wrapper.config.use_cache
    oneshot(wrapper, [tiny.tokens(2)], recipe)
    assert wrapper.config.use_cache
    assert same_weights(wrapper.inner, oneshot(tiny.llama(), [tiny.tokens(2)], recipe))


# Saving at the end.


def test_dense_output(checkpoint, tmp_path):
    model = oneshot(checkpoint, None, rtn(), output_dir=tmp_path / "out", save_compressed=False)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert same_weights(load(tmp_path / "out"), model)


def test_into_the_directory_that_the_model_came_from(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = oneshot(tmp_path, None, rtn())
    oneshot(tmp_path, None, rtn(), output_dir=tmp_path, overwrite=True)
    assert torch.equal(tiny.logits(load(tmp_path)), tiny.logits(model))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_plain_module_with_an_output_directory(tmp_path):
    model = oneshot(tiny.MLP(32, 64, 32), None, rtn(ignore=()), output_dir=tmp_path / "out")
    back = bitpress.load(tmp_path / "out", tiny.MLP(32, 64, 32))
    x = torch.randn(4, 32)
    assert torch.equal(back(x), model(x))
    assert Recipe.of(tmp_path / "out" / "recipe.yaml") == Recipe.of(rtn(ignore=()))


def test_progress_goes_to_standard_error(capsys):
    oneshot(tiny.llama(), token_ids(), awq(), num_calibration_samples=6, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "14 layers in 2 blocks" in captured.err
    oneshot(tiny.llama(), token_ids(), awq(), num_calibration_samples=6, progress=False)
    assert capsys.readouterr().err == ""


def test_the_dry_run_is_small(monkeypatch):
    """Everything is checked on a few tokens before the calibration begins."""
    shapes = []
    original = tiny.llama().forward.__func__

    def forward(self, input_ids=None, use_cache=None, **options):
        shapes.append(tuple(input_ids.shape))
        assert use_cache is False
        return original(self, input_ids=input_ids, use_cache=use_cache, **options)

    monkeypatch.setattr(type(tiny.llama()), "forward", forward)
    oneshot(tiny.llama(), token_ids(4, 100), awq(), num_calibration_samples=4, batch_size=2)
    # The first batch goes through the original model as well, for the report.
    assert shapes == [(1, 32), (2, 100), (2, 100), (2, 100)]
