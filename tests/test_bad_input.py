"""Bad input: a clear error before any computing, the model as it was, nothing written."""

import copy
import shutil
from collections import namedtuple

import datasets
import pytest
import tiny
import torch
from compressing import awq, rtn, scheme, sentences, token_ids, tokenizer
from torch import nn

from bitpress import AWQMapping, AWQModifier, BitpressError, QuantizationModifier, oneshot
from bitpress.checkpoints import directory
from bitpress.modifiers import Modifier
from bitpress.pipelines.solving import Progress
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.session import Session

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def nothing_runs(monkeypatch):
    """No modifier solves anything."""

    def solved(self, state, block):
        raise AssertionError("something was computed before everything was checked")

    for modifier in (QuantizationModifier, AWQModifier):
        monkeypatch.setattr(modifier, "on_block", solved)


def attributes(model):
    """All that a module carries besides its tensors."""
    return {name: sorted(m.__dict__) for name, m in model.named_modules()}


def refused(message, model, dataset, recipe, folder, **options):
    """Run oneshot; it must refuse, and leave everything as it was."""
    before, carried = tiny.snapshot(model), attributes(model)
    modes = [m.training for m in model.modules()]
    there = sorted(folder.rglob("*"))
    with pytest.raises(BitpressError, match=message) as error:
        oneshot(model, dataset, recipe, **{"output_dir": folder / "out", **options})
    tiny.assert_unchanged(model, before)
    assert attributes(model) == carried
    assert [m.training for m in model.modules()] == modes
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert sorted(folder.rglob("*")) == there
    return str(error.value)


def custom(**fields):
    return [QuantizationModifier(**{"config_groups": {"group_0": scheme()}, **fields})]


def activations(**inputs):
    return scheme().model_copy(update={"input_activations": QuantizationArgs(num_bits=8, **inputs)})


NO_MAPPING = AWQMapping("re:.*no_norm$", ["re:.*q_proj$"])
HALF = AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*no_proj$"])
WRONG = AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$"])
ACROSS = AWQMapping("re:.*gate_proj$", ["re:.*down_proj$"])
TWICE = AWQMapping("re:.*mlp.*", ["re:.*nothing$"])

RECIPES = {
    "target that matches nothing": (rtn(targets=["Linaer"]), r"target 'Linaer' matches no .*did you mean 'Linear'"),
    "one of several targets": (rtn(targets=["Linear", "re:.*experts.*"]), r"target 're:\.\*experts\.\*' matches no"),
    "target that is no linear layer": (rtn(targets=["LlamaRMSNorm"]), "target 'LlamaRMSNorm' matches no linear layer"),
    "everything is ignored": (custom(ignore=["Linear"]), "is ignored"),
    "group size": (
        rtn(group_size=40),
        r"group_size 40 does not divide the 64 inputs of model.layers.0.self_attn.q_proj, .* and \d+ more "
        r"\(sizes that fit: 64, 32, 16, 8\).*the 96 inputs of .*down_proj.* \(sizes that fit: 96, 48, 32, 16, 8\)",
    ),
    "group size of awq": ([AWQModifier(bits=4, ignore=["lm_head"])], "group_size 128 does not divide"),
    "no scheme": ([QuantizationModifier()], "states no scheme"),
    "no scheme at all": ([AWQModifier()], "quantizes nothing|no scheme"),
    "two schemes": ([QuantizationModifier(scheme="W4A16", config_groups={"g": scheme()})], "not both"),
    "bits that disagree": ([AWQModifier(bits=8), *rtn()], "bits=8, but the scheme of .* has bits=4"),
    "symmetry that disagrees": ([AWQModifier(symmetric=True), *rtn()], "symmetric=True, but .* has symmetric=False"),
    "static activations without their range": (
        custom(config_groups={"g": activations(dynamic=False, group_size=32)}),
        r"config group 'g': input_activations: dynamic=False with strategy 'group' is not supported.*\"tensor\"",
    ),
    "groups of activations": (
        custom(config_groups={"g": activations(dynamic=True, group_size=40)}),
        "input_activations: group_size 40 does not divide the 64 columns of model.layers.0.self_attn.q_proj",
    ),
    "kv cache": (
        custom(kv_cache_scheme=QuantizationArgs(num_bits=8, dynamic=False, group_size=8)),
        r"kv_cache_scheme: dynamic=False with strategy 'group'.*\"tensor\" or \"attn_head\"",
    ),
    "attention that is none": (
        custom(config_groups={"g": QuantizationScheme(targets=["Linear"], input_activations=QuantizationArgs())}),
        r"config group 'g' has no weights, and its targets \['Linear'\] match no attention \(LlamaAttention\)",
    ),
    "two schemes of the cache": (
        [custom(kv_cache_scheme=QuantizationArgs())[0], custom(kv_cache_scheme=QuantizationArgs())[0]],
        "both quantize the states of model.layers.0.self_attn",
    ),
    "mapping to no smooth layer": (awq(mappings=[NO_MAPPING]), r"AWQMapping\('re:\.\*no_norm\$'.* fits no block"),
    "mapping to no balance layer": (awq(mappings=[TWICE]), "fits no block"),
    "mapping to some balance layers": (awq(mappings=[HALF]), r"'re:\.\*no_proj\$' matches no linear layer of model"),
    "mapping that leaves out a layer": (awq(mappings=[WRONG]), r"\(user\) is not valid in model\.layers\.0: .* moves"),
    "mapping through an activation": (awq(mappings=[ACROSS]), r"\(user\) is not valid in model\.layers\.0: .* moves"),
    "sequential targets": (awq(), "sequential_targets .* match no module"),
    "pipeline": (awq(), "pipeline 'sequental' is not known; did you mean 'sequential'"),
    "pipeline without data": (awq(), "the datafree pipeline has none"),
}
OPTIONS = {
    "sequential targets": {"sequential_targets": ["NoSuchLayer"]},
    "pipeline": {"pipeline": "sequental"},
    "pipeline without data": {"pipeline": "datafree"},
}


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.usefixtures("nothing_runs")
def test_recipes_that_do_not_fit_the_model(case, tmp_path):
    recipe, message = RECIPES[case]
    options = OPTIONS.get(case, {})
    refused(message, tiny.llama().train(), token_ids(), recipe, tmp_path, num_calibration_samples=6, **options)


@pytest.mark.parametrize(
    "recipe", [None, 3, [], {}, [3], "no-such-recipe", "- NoModifier: {}", "- AWQModifier: {bit: 4}"]
)
@pytest.mark.usefixtures("nothing_runs")
def test_what_is_no_recipe(recipe, tmp_path):
    refused("recipe", tiny.llama(), token_ids(), recipe, tmp_path)


def test_an_ignore_pattern_that_matches_nothing_is_a_warning(caplog):
    model = oneshot(tiny.llama(), None, rtn(ignore=["lm_head", "re:.*no_such_layer"]))
    assert "ignore pattern 're:.*no_such_layer' matches nothing" in caplog.text
    assert "'lm_head'" not in caplog.text
    assert hasattr(model.get_submodule(Q_PROJ), "quantization_scheme")


# The data.


def _text(text):
    def write(folder):
        (folder / "data.txt").write_text(text)
        return folder / "data.txt"

    return write


DATA = {
    "none": (lambda _: None, {}, "AWQModifier needs calibration data, but no dataset was given"),
    "empty list": (lambda _: [], {}, "is empty"),
    "empty texts": (lambda _: ["", " "], {}, "nothing to calibrate with: 2 empty samples"),
    "empty file": (_text("\n\n"), {}, "nothing to calibrate with|is empty"),
    "empty dataset": (lambda _: datasets.Dataset.from_dict({"text": []}), {}, "empty|nothing"),
    "empty generator": (lambda _: iter(()), {}, "is empty"),
    "too short": (
        lambda _: sentences(length=10),
        {"max_seq_length": 50},
        r"max_seq_length=50, but the longest .* has 10 tokens; pass concatenate_data=True",
    ),
    "too short in all": (
        lambda _: sentences(2, length=10),
        {"max_seq_length": 50, "concatenate_data": True},
        r"has 21 tokens in all, fewer than one piece of max_seq_length=50",
    ),
    "no usable column": (
        lambda _: datasets.Dataset.from_dict({"prose": sentences(), "author": sentences()}),
        {},
        r"no column of texts \('text'\).* it has prose, author; name the column of texts with text_column=",
    ),
    "no such column": (
        lambda _: datasets.Dataset.from_dict({"text": sentences()}),
        {"text_column": "prose"},
        "no column 'prose'",
    ),
    "no such file": (lambda folder: folder / "no.txt", {}, r"no\.txt"),
    "no tokenizer": (lambda _: sentences(), {"tokenizer": None}, "need a tokenizer"),
    "tokenizer that is not there": (lambda _: sentences(), {"tokenizer": "./no/such"}, "AutoTokenizer finds nothing"),
    "number of samples": (lambda _: sentences(), {"num_calibration_samples": 0}, "num_calibration_samples=0"),
    "token ids of another model": (lambda _: [[3, 4, 5000]], {}, "token id 5000 is outside"),
    "no data at all": (lambda _: 3, {}, "cannot be used for calibration"),
    "batches of another model": (lambda _: [torch.randn(2, 3), "x"], {}, "."),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.usefixtures("nothing_runs")
def test_data_that_cannot_be_used(case, tmp_path):
    make, options, message = DATA[case]
    dataset = make(tmp_path)
    refused(message, tiny.llama(), dataset, awq(), tmp_path, **{"tokenizer": tokenizer(), **options})


# NaN and infinities.


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [0, 3])
def test_activations_that_are_not_finite(batch, value, pipeline, tmp_path):
    """The module and the batch are named, and it is not a mapping that gets the blame."""
    model = tiny.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 7] = value
    data = [[9] * 20 for _ in range(5)]
    data[batch] = [5] * 20
    refused(
        rf"the input of {Q_PROJ} holds NaN or infinite values in calibration batch {batch}\.",
        model,
        data,
        awq(),
        tmp_path,
        pipeline=pipeline,
        shuffle_calibration_samples=False,
    )


def test_a_block_that_overflows(tmp_path):
    model = tiny.llama(num_hidden_layers=3).half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(60000)
    refused(
        r"the input of model\.layers\.1\.mlp\.down_proj holds NaN or infinite values in calibration batch 0",
        model,
        token_ids(),
        awq(mappings=[AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"])]),
        tmp_path,
    )


@pytest.mark.parametrize("make", [rtn, awq])
@pytest.mark.parametrize("where", [Q_PROJ, "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.usefixtures("nothing_runs")
def test_weights_that_are_not_finite(value, where, make, tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.get_submodule(where).weight[2, 3] = value
    refused(rf"{where}\.weight holds 1 NaN or infinite value", model, token_ids(), make(), tmp_path)


def test_padding_may_hold_anything():
    model = tiny.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1e20
    rows = token_ids(4)
    rows[1] = rows[1][:5]
    oneshot(model, rows, awq(), num_calibration_samples=4, batch_size=4)
    assert hasattr(model.get_submodule(Q_PROJ), "quantization_scheme")


# The model.


@pytest.fixture(scope="module")
def quantized():
    return oneshot(tiny.llama(), None, rtn())


@pytest.mark.parametrize("make", [rtn, awq])
def test_a_model_that_is_quantized_already(make, quantized, nothing_runs, tmp_path):
    model = copy.deepcopy(quantized)
    refused(f"quantized already .*{Q_PROJ}", model, token_ids(), make(), tmp_path)
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(BitpressError, match="quantized already"):
        oneshot(tmp_path / "checkpoint", token_ids(), make(), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", [3, None, [tiny.MLP(32, 32)]])
def test_what_is_no_model(model):
    with pytest.raises(BitpressError, match="is no model"):
        oneshot(model, None, rtn())


def test_a_path_without_a_model(tmp_path):
    for source in (tmp_path, tmp_path / "no", str(tmp_path / "no")):
        with pytest.raises(BitpressError, match=r"cannot be loaded|holds no checkpoint"):
            oneshot(source, None, rtn(), output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_without_room_for_scales(tmp_path):
    refused("is torch.float64: load the model in", tiny.llama().double(), None, rtn(), tmp_path)


def test_a_model_without_linear_layers(tmp_path):
    refused("matches no linear layer", nn.Sequential(nn.LayerNorm(4)), None, rtn(), tmp_path)


@pytest.mark.usefixtures("nothing_runs")
def test_awq_where_nothing_can_absorb_a_scale(tmp_path):
    data = [torch.randn(4, 32)]
    refused("AWQMapping|mappings=", tiny.MLP(32, 32), data, awq(ignore=()), tmp_path)


# The destination.


@pytest.mark.usefixtures("nothing_runs")
def test_an_output_directory_that_holds_a_model(tmp_path):
    tiny.opt().save_pretrained(tmp_path / "out")
    refused(r"out holds a model already \(.*\): .*overwrite=True", tiny.llama(), token_ids(), awq(), tmp_path)


@pytest.mark.parametrize("where", ["file", "file/out"])
@pytest.mark.usefixtures("nothing_runs")
def test_an_output_directory_that_is_a_file(where, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("is a file", tiny.llama(), None, rtn(), tmp_path, output_dir=tmp_path / where)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.usefixtures("nothing_runs")
def test_no_room_on_the_disk(from_path, tmp_path, monkeypatch):
    """Room for nothing, or for less than the model is: both are known before anything is computed."""
    model = tiny.llama()
    dense = sum(p.nbytes for p in model.parameters())
    for free in (0, directory.SPARE_BYTES - 1, directory.SPARE_BYTES + dense // 2):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(2**40, 2**40 - free, free))
        refused("no room on the disk: .* GB are free", model, token_ids(), awq(), tmp_path)
    if from_path:
        model.save_pretrained(tmp_path / "model")
        # What a model that stays on the disk will take is known to the byte.
        free = directory.SPARE_BYTES + 1000
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - free, free))
        with pytest.raises(BitpressError, match="no room on the disk"):
            oneshot(tmp_path / "model", token_ids(), awq(), output_dir=tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_little_room_is_enough(tmp_path, monkeypatch):
    model = tiny.llama()
    dense = sum(p.nbytes for p in model.parameters())
    free = directory.SPARE_BYTES + 2 * dense
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - free, free))
    oneshot(model, None, rtn(), output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


# Half-way.


class Interrupting(Modifier):
    """Lets the first block pass, and then does not."""

    error: type[BaseException] = KeyboardInterrupt

    def on_block(self, state, block):
        if block is state.blocks[-1]:
            raise self.error


@pytest.fixture
def _forget_interrupting():
    yield
    Modifier.known.pop("Interrupting", None)


@pytest.mark.usefixtures("_forget_interrupting")
@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_stops_in_the_middle_leaves_the_model_as_it_was(error, pipeline, tmp_path):
    model = tiny.llama().train()
    before, carried = tiny.snapshot(model), attributes(model)
    with pytest.raises(error):
        oneshot(
            model,
            token_ids(),
            [*awq(), Interrupting(error=error)],
            num_calibration_samples=6,
            pipeline=pipeline,
            output_dir=tmp_path / "out",
        )
    tiny.assert_unchanged(model, before)
    assert attributes(model) == carried
    assert all(m.training for m in model.modules())
    assert not [m for m in model.modules() if m._forward_pre_hooks]
    assert list(tmp_path.iterdir()) == []
    oneshot(model, token_ids(), awq(), num_calibration_samples=6)
    assert hasattr(model.get_submodule(Q_PROJ), "quantization_scheme")


@pytest.mark.parametrize("phase", ["calibrate", "solve", "propagate"])
def test_an_interrupt_in_any_phase(phase):
    """As if Ctrl-C were pressed when the second block is in this phase."""
    model = tiny.llama(num_hidden_layers=3)
    before, carried = tiny.snapshot(model), attributes(model)
    session = Session(model, awq())
    session.check()
    session.initialize(tiny.token_data())

    def interrupt(step: Progress):
        if (step.done, step.phase) == (1, phase):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run(interrupt)
    tiny.assert_unchanged(model, before)
    assert attributes(model) == carried
