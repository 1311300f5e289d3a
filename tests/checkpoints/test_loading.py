"""Loading: bitpress.load gives back what bitpress.save was given, for any module."""

import json

import pytest
import tiny
import torch
from compressing import awq, rtn, scheme, token_ids
from safetensors.torch import load_file, save_file
from stored import packed_slowly
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import bitpress
from bitpress import AWQMapping, BitpressError, checkpoints, oneshot
from bitpress.modifiers import QuantizationModifier
from bitpress.quantization import QuantizationStrategy, packing

WIDTH = 32


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 64)
        self.down = nn.Linear(64, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    """Blocks that no library wrote; the head uses the projection's weight when tied."""

    def __init__(self, tied=False, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inside = nn.Linear(WIDTH, WIDTH, bias=False)
            self.blocks = nn.ModuleList(Residual() for _ in range(3))
            self.head = nn.Linear(WIDTH, WIDTH, bias=False)
            self.register_buffer("offset", torch.randn(WIDTH))
            for norm in (b.norm for b in self.blocks):
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias)
        if tied:
            self.head.weight = self.inside.weight

    def forward(self, x, *, double=None):
        x = self.inside(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.offset + (0 if double is None else double * 2)


MAPPINGS = [AWQMapping("re:.*norm$", ["re:.*up$"]), AWQMapping("re:.*up$", ["re:.*down$"])]


def rows(count=12, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, WIDTH)


@torch.no_grad()
def outputs(model, dtype=torch.float32):
    return model(rows(seed=9).to(dtype))


def round_trip(model, fresh, folder):
    bitpress.save(model, folder)
    assert outputs(fresh).ne(outputs(model)).any()
    assert checkpoints.load(folder, fresh) is fresh
    return fresh


DATASETS = {
    "tensors": lambda: [rows(4, seed) for seed in range(3)],
    "a tensor": lambda: rows(12),
    "a loader": lambda: DataLoader(rows(12), batch_size=4),
    "dicts": lambda: [{"x": rows(4, seed), "double": rows(4, seed + 5)} for seed in range(3)],
    "a generator": lambda: (rows(4, seed) for seed in range(3)),
}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_on_a_plain_module(dataset, symmetric, tmp_path):
    model = Stack()
    before = outputs(model)
    recipe = awq(ignore=["head"], mappings=MAPPINGS, symmetric=symmetric)
    assert oneshot(model, DATASETS[dataset](), recipe, num_calibration_samples=12) is model
    assert not torch.equal(outputs(model), before)
    assert torch.equal(outputs(round_trip(model, Stack(seed=1), tmp_path / "out")), outputs(model))


@pytest.mark.parametrize("strategy", list(QuantizationStrategy)[:3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_grid_without_data(bits, symmetric, strategy, tmp_path):
    model = oneshot(Stack(), None, rtn(ignore=(), bits=bits, symmetric=symmetric, strategy=strategy))
    assert torch.equal(outputs(round_trip(model, Stack(seed=1), tmp_path / "out")), outputs(model))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_what_another_version_of_compressed_tensors_packed(bits, tmp_path):
    """Up to 0.17 it packs with gaps, later without: read alike, whichever is installed."""
    model = oneshot(tiny.MLP(64, 32, 64), None, rtn(ignore=(), bits=bits))
    bitpress.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in [name for name in stored if name.endswith(("weight_packed", "weight_zero_point"))]:
        rows, columns = stored[f"{name.rpartition('.')[0]}.weight_shape"].tolist()
        along, count = (stored[name], columns) if name.endswith("packed") else (stored[name].T, rows)
        values = packing.unpack_integers(along, bits, count, gaps=packing.LEAVES_GAPS)
        words = packed_slowly(values, bits, gaps=not packing.LEAVES_GAPS)
        assert words.shape != along.shape
        stored[name] = (words if name.endswith("packed") else words.T).contiguous()
    save_file(stored, tmp_path / "out" / "model.safetensors")
    loaded = bitpress.load(tmp_path / "out", tiny.MLP(64, 32, 64), packed=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision(bits, dtype, tmp_path):
    model = oneshot(Stack().to(dtype), None, rtn(ignore=(), bits=bits))
    bitpress.save(model, tmp_path / "out")
    back = checkpoints.load(tmp_path / "out", Stack(seed=1).to(dtype))
    assert torch.equal(outputs(back, dtype), outputs(model, dtype))


def test_two_schemes(tmp_path):
    groups = {"a": scheme(bits=3, targets=["re:.*up"]), "b": scheme(bits=8, symmetric=True, targets=["re:.*down"])}
    model = oneshot(Stack(), None, QuantizationModifier(config_groups=groups))
    back = round_trip(model, Stack(seed=1), tmp_path / "out")
    assert torch.equal(outputs(back), outputs(model))
    assert back.blocks[0].up.quantization_scheme.weights.num_bits == 3


def test_an_mlp_is_one_block(tmp_path):
    model = tiny.MLP(WIDTH, 64, WIDTH)
    recipe = awq(ignore=(), mappings=[AWQMapping("net.0", ["net.2"])])
    oneshot(model, rows(), recipe, num_calibration_samples=12)
    assert torch.equal(outputs(round_trip(model, tiny.MLP(WIDTH, 64, WIDTH), tmp_path / "out")), outputs(model))


def test_few_rows_of_zero_points(tmp_path):
    model = oneshot(tiny.MLP(64, 3), None, rtn(ignore=()))
    bitpress.save(model, tmp_path / "out")
    back = checkpoints.load(tmp_path / "out", tiny.MLP(64, 3))
    assert torch.equal(back.net[0].weight, model.net[0].weight)


@pytest.mark.parametrize("tied_too", [True, False], ids=["into a tied one", "into an untied one"])
def test_tied_weights(tied_too, tmp_path):
    model = Stack(tied=True)
    oneshot(model, None, rtn(ignore=()))
    assert not hasattr(model.head, "quantization_scheme")
    back = round_trip(model, Stack(tied=tied_too, seed=1), tmp_path / "out")
    assert torch.equal(outputs(back), outputs(model))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len({"inside.weight", "head.weight"} & stored.keys()) == 1


class Views(nn.Module):
    """Weights that share memory without being equal."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("rows", torch.zeros(4, WIDTH))

    def forward(self, x):
        return self.second(self.first(x)) + F.linear(x, self.rows).sum()


def test_views_of_one_memory(tmp_path):
    model = Views()
    model.second.weight = nn.Parameter(model.first.weight.data.T)
    model.rows = model.first.weight.data[4:8]
    assert torch.equal(outputs(round_trip(model, Views(), tmp_path / "out")), outputs(model))


def test_dense(tmp_path):
    model = oneshot(Stack(), None, rtn(ignore=()))
    bitpress.save(model, tmp_path / "out", save_compressed=False)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
    back = checkpoints.load(tmp_path / "out", Stack(seed=1))
    assert torch.equal(outputs(back), outputs(model))


def test_what_was_loaded_is_saved_again(tmp_path):
    model = oneshot(Stack(), None, rtn(ignore=()))
    back = round_trip(model, Stack(seed=1), tmp_path / "out")
    bitpress.save(back, tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_was_loaded_is_quantized_already(tmp_path):
    back = round_trip(oneshot(Stack(), None, rtn(ignore=())), Stack(seed=1), tmp_path / "out")
    with pytest.raises(BitpressError, match="quantized already"):
        oneshot(back, None, rtn(ignore=()))


# Models of transformers.


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "falcon_new"])
def test_into_a_model_of_transformers(family, tmp_path):
    recipe = awq(ignore=(), targets=["Conv1D" if family == "gpt2" else "Linear"])
    model = oneshot(getattr(tiny, family)(), token_ids(), recipe, num_calibration_samples=6)
    model.save_pretrained(tmp_path / "out")
    fresh = getattr(tiny, family)()
    back = checkpoints.load(tmp_path / "out", fresh)
    assert torch.equal(tiny.logits(back), tiny.logits(model))


@pytest.mark.parametrize("options", [{"max_shard_size": "40KB"}, {"save_compressed": False}])
def test_shards_and_dense_ones(options, tmp_path):
    model = oneshot(tiny.llama(tie_word_embeddings=True), None, rtn())
    model.save_pretrained(tmp_path / "out", **options)
    back = checkpoints.load(tmp_path / "out", tiny.llama(tie_word_embeddings=True))
    assert torch.equal(tiny.logits(back), tiny.logits(model))


def test_without_a_model(tmp_path):
    model = oneshot(tiny.llama(), None, rtn())
    bitpress.save(model, tmp_path / "out")
    assert torch.equal(tiny.logits(checkpoints.load(tmp_path / "out")), tiny.logits(model))
    cast = checkpoints.load(tmp_path / "out", dtype=torch.bfloat16)
    assert tiny.logits(cast).dtype == torch.bfloat16


# What cannot be loaded leaves the model as it was.


@pytest.fixture
def saved(tmp_path):
    bitpress.save(oneshot(Stack(), None, rtn(ignore=())), tmp_path / "out")
    return tmp_path / "out"


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_config(folder):
    (folder / "config.json").unlink()


def _cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _pickle(folder):
    torch.save({}, folder / "model.safetensors")


def _no_json(folder):
    (folder / "config.json").write_text("{")


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _less(folder):
    _edit(folder, lambda tensors: tensors.pop("offset"))


def _more(folder):
    _edit(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))


def _other_shape(folder):
    _edit(folder, lambda tensors: tensors.update(offset=torch.zeros(7)))


def _no_scheme(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:nothing"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_weights, r"model\.safetensors is missing"),
        (_no_config, r"config\.json is missing"),
        (_cut_short, "cannot be read as safetensors"),
        (_pickle, "cannot be read as safetensors"),
        (_no_json, "is not JSON"),
        (_less, "lacks offset"),
        (_more, "more than the model: extra"),
        (_other_shape, r"offset is \(7,\), the model's \(32,\)"),
        (_no_scheme, "is quantized, but no config group"),
    ],
)
def test_checkpoints_that_do_not_fit(harm, message, saved):
    harm(saved)
    model = Stack(seed=1)
    before = tiny.snapshot(model)
    with pytest.raises(BitpressError, match=message):
        checkpoints.load(saved, model)
    tiny.assert_unchanged(model, before)
    assert not hasattr(model.inside, "quantization_scheme")


def test_a_model_of_another_architecture(saved):
    with pytest.raises(BitpressError, match="does not fit MLP"):
        checkpoints.load(saved, tiny.MLP(WIDTH, WIDTH))


def test_a_model_of_another_dtype(saved):
    # Cast, its weights would no longer be those that were saved.
    with pytest.raises(BitpressError, match=r"is torch.float32, the model's torch.bfloat16.*model\.to"):
        checkpoints.load(saved, Stack().to(torch.bfloat16))


@pytest.mark.parametrize("model", [None, Stack()], ids=["without a model", "with one"])
def test_nothing_is_there(model, tmp_path):
    with pytest.raises(BitpressError, match="holds no checkpoint"):
        checkpoints.load(tmp_path / "nowhere", model)


def test_a_plain_module_needs_its_architecture(saved):
    with pytest.raises(BitpressError, match=r"give bitpress\.load a model"):
        checkpoints.load(saved)


def test_a_broken_checkpoint_of_transformers(tmp_path):
    bitpress.save(oneshot(tiny.llama(), None, rtn()), tmp_path / "out")
    _cut_short(tmp_path / "out")
    with pytest.raises(BitpressError, match="transformers cannot load"):
        checkpoints.load(tmp_path / "out")
