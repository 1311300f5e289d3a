"""nn.MultiheadAttention: its out-projection is called, and nothing else about it changes."""

import copy

import pytest
import tiny
import torch
from compressing import awq, rtn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitpress import AWQMapping, oneshot
from bitpress.models.attention import called_out_projections

WIDTH, HEADS, ROWS, LENGTH = 32, 4, 3, 7


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen_by_out_proj(model):
    """A list that fills with what each out-projection receives, and what it gives."""
    seen = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.out_proj.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out)))
    return seen


def carried(model):
    """All that a model's modules carry besides parameters and buffers."""
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6, equal_nan=True)


@torch.no_grad()
def run_both_ways(model, *args, **kwargs):
    """The plain output, that inside the ``with``, and what out-projections saw there."""
    model.eval()
    plain = model(*args, **kwargs)
    before, attributes = tiny.snapshot(model), carried(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    seen = seen_by_out_proj(model)
    with called_out_projections(model):
        called = model(*args, **kwargs)
    for module in model.modules():
        module._forward_hooks.clear()
    assert carried(model) == attributes
    assert torch.backends.mha.get_fastpath_enabled() == fast
    tiny.assert_unchanged(model, before)
    again = model(*args, **kwargs)
    for a, b in zip(_tensors(again), _tensors(plain), strict=True):
        assert torch.equal(a, b) or (a.isnan() == b.isnan()).all()
    return plain, called, seen


def _tensors(output):
    return [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]


MASKS = {
    "none": lambda rows: {},
    "causal": lambda rows: {"attn_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH)},
    "bool": lambda rows: {"attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool()},
    "of each head": lambda rows: {"attn_mask": noise(rows * HEADS, LENGTH, LENGTH, seed=5)},
    "padding": lambda rows: {"key_padding_mask": torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4], [2]])},
    "both": lambda rows: {**MASKS["bool"](rows), **MASKS["padding"](rows)},
    "is causal": lambda rows: {**MASKS["causal"](rows), "is_causal": True},
}


WEIGHTS = [{}, {"need_weights": False}, {"average_attn_weights": False}]


@pytest.mark.parametrize(
    ("mask", "weights"),
    # torch has no weights for what is stated to be causal.
    [(mask, weights) for mask in MASKS for weights in (WEIGHTS if mask != "is causal" else WEIGHTS[1:2])],
    ids=str,
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(batch_first, mask, weights):
    model = tiny.seeded(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first))
    x = noise(ROWS, LENGTH, WIDTH)
    x = x if batch_first else x.transpose(0, 1)
    plain, called, seen = run_both_ways(model, x, x, x, **MASKS[mask](ROWS), **weights)
    assert_close(called[0], plain[0])
    assert (called[1] is None) == (plain[1] is None)
    if plain[1] is not None:
        assert_close(called[1], plain[1])
    ((layer, heads, made),) = seen
    assert layer is model.out_proj
    assert heads.shape[-1] == WIDTH
    assert heads.numel() == x.numel()
    rows = plain[0] if not batch_first else plain[0].transpose(0, 1)
    assert_close(made.reshape(rows.shape), rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (24, None), (24, 40)])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_keys_and_values_of_other_widths(kdim, vdim, bias, extra):
    model = tiny.seeded(
        lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=vdim, bias=bias, batch_first=True, **extra)
    )
    keys, values = noise(ROWS, 9, kdim or WIDTH, seed=1), noise(ROWS, 9, vdim or WIDTH, seed=2)
    plain, called, seen = run_both_ways(model, noise(ROWS, LENGTH, WIDTH), keys, values)
    assert_close(called[0], plain[0])
    assert_close(called[1], plain[1])
    assert len(seen) == 1


def test_one_sequence_without_a_batch():
    model = tiny.seeded(lambda: nn.MultiheadAttention(WIDTH, HEADS))
    x = noise(LENGTH, WIDTH)
    plain, called, seen = run_both_ways(model, x, x, x)
    assert called[0].shape == plain[0].shape
    assert_close(called[0], plain[0])
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_the_out_projection_sees_are_the_heads(dtype):
    """By hand, in float64."""
    model = tiny.seeded(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).to(dtype)
    x = noise(ROWS, LENGTH, WIDTH).to(dtype)
    plain, called, seen = run_both_ways(model, x, x, x, need_weights=False)
    assert called[0].dtype == dtype
    projected = x.double() @ model.in_proj_weight.detach().double().T + model.in_proj_bias.detach().double()
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projected.chunk(3, -1))
    shares = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    expected = (shares @ v).transpose(1, 2).flatten(-2)
    ((_, heads, _),) = seen
    heads = heads.reshape(LENGTH, ROWS, WIDTH).transpose(0, 1)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.05)
    torch.testing.assert_close(heads.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(called[0], plain[0], rtol=0, atol=1e-6 if dtype.itemsize >= 4 else 0.02)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("depth", [0, 3])
def test_transformer_encoders(depth, batch_first, norm_first):
    """By themselves they run in one fused kernel, which calls nothing."""

    def build():
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=batch_first, norm_first=norm_first)
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False) if depth else layer

    model = tiny.seeded(build)
    x = noise(ROWS, LENGTH, WIDTH)
    plain, called, seen = run_both_ways(model, x)
    torch.testing.assert_close(called, plain, rtol=1e-5, atol=2e-6)
    assert len(seen) == max(1, depth)
    assert len({id(layer) for layer, _, _ in seen}) == len(seen)


def test_nested_tensors_of_padded_rows():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    model = tiny.seeded(lambda: nn.TransformerEncoder(layer, 2))
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4], [2]])
    plain, called, seen = run_both_ways(model, noise(ROWS, LENGTH, WIDTH), src_key_padding_mask=padding)
    torch.testing.assert_close(called[~padding], plain[~padding], rtol=1e-5, atol=2e-6)
    assert len(seen) == 2


def test_a_decoder_attends_twice_a_layer():
    model = tiny.seeded(lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 64, batch_first=True))
    memory = noise(ROWS, 9, WIDTH, seed=1)
    plain, called, seen = run_both_ways(model, noise(ROWS, LENGTH, WIDTH), memory)
    torch.testing.assert_close(called, plain, rtol=1e-5, atol=2e-6)
    assert [layer for layer, _, _ in seen] == [model.self_attn.out_proj, model.multihead_attn.out_proj]


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([(8, 1), (8, 2), (12, 3)]),
    st.booleans(),
    st.booleans(),
)
def test_any_shape(rows, queries, keys, widths, bias, batch_first):
    width, heads = widths
    model = tiny.seeded(lambda: nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first))
    q, k = noise(rows, queries, width), noise(rows, keys, width, seed=1)
    q, k = (q, k) if batch_first else (q.transpose(0, 1), k.transpose(0, 1))
    plain, called, seen = run_both_ways(model, q, k, k)
    assert_close(called[0], plain[0])
    assert_close(called[1], plain[1])
    assert len(seen) == 1


class Broken(BaseException):
    pass


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("error", [ValueError, Broken])
def test_everything_is_restored_after_an_error(error, fast):
    model = tiny.seeded(lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 64))
    attributes = carried(model)

    def stop(*_):
        raise error

    handle = model.self_attn.out_proj.register_forward_pre_hook(stop)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with pytest.raises(error), called_out_projections(model):
            model(noise(LENGTH, ROWS, WIDTH))
        assert torch.backends.mha.get_fastpath_enabled() == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    handle.remove()
    assert carried(model) == attributes
    assert torch.overrides._get_current_function_mode() is None
    assert torch.isfinite(model(noise(LENGTH, ROWS, WIDTH))).all()


def test_a_forward_of_the_users_own_is_kept():
    model = tiny.seeded(lambda: nn.MultiheadAttention(WIDTH, HEADS))
    own = model.forward
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counting
    seen = seen_by_out_proj(model)
    with called_out_projections(model):
        model(*[noise(LENGTH, ROWS, WIDTH)] * 3)
    assert model.forward is counting
    assert (len(calls), len(seen)) == (1, 1)


def test_one_module_in_two_places():
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    model = nn.ModuleList([attention, attention])
    with called_out_projections(model):
        pass
    assert "forward" not in attention.__dict__
    seen = seen_by_out_proj(nn.ModuleList([attention]))
    with called_out_projections(model):
        attention(*[noise(LENGTH, ROWS, WIDTH)] * 3)
    assert len(seen) == 1


def test_models_without_such_attention_keep_the_fast_path():
    with called_out_projections(tiny.MLP(8, 8)):
        assert torch.backends.mha.get_fastpath_enabled()


# End to end.


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **options) for _ in range(2)
        )

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x)


MODELS = {
    "post-norm": (Encoder, 16),
    "pre-norm": (lambda: Encoder(norm_first=True), 16),
    "nn.TransformerEncoder": (Whole, WIDTH),
}
VALUES = AWQMapping("re:.*linear1$", ["re:.*linear2$"])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recipe", ["rtn", "awq"])
def test_the_out_projection_is_quantized_with_what_it_sees(recipe, kind):
    build, width = MODELS[kind]
    model = tiny.seeded(build)
    before = tiny.snapshot(model)
    attributes = carried(model)
    data = [noise(4, LENGTH, width, seed=seed) for seed in range(3)]
    steps = rtn(["embed"], group_size=8) if recipe == "rtn" else awq(["embed"], group_size=8)
    oneshot(model, data, steps, pipeline="sequential" if recipe == "rtn" else None)
    after = model.state_dict()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    report = model.bitpress.report["layers"]
    assert len(names) == 2
    for name in names:
        assert not torch.equal(after[f"{name}.out_proj.weight"], before[f"{name}.out_proj.weight"])
        assert torch.equal(after[f"{name}.in_proj_bias"], before[f"{name}.in_proj_bias"])
        if recipe == "rtn":
            assert torch.equal(after[f"{name}.in_proj_weight"], before[f"{name}.in_proj_weight"])
        else:
            assert 0 < report[f"{name}.out_proj"]["relative_error"] < 0.05
            assert f"{name}.in_proj" not in report
    left = {n: [a for a in module.__dict__ if a not in attributes[n]] for n, module in model.named_modules()}
    assert "forward" not in {a for found in left.values() for a in found}


def test_awq_searches_the_out_projections_range_from_what_it_sees():
    """Its error is no greater than that of a model that no data has been shown to."""
    data = [noise(8, LENGTH, 16, seed=seed) * torch.logspace(-1, 1, 16) for seed in range(4)]
    plain = tiny.seeded(Encoder)
    searched, nearest = copy.deepcopy(plain), copy.deepcopy(plain)
    seen = seen_by_out_proj(plain)
    with torch.no_grad(), called_out_projections(plain.eval()):
        for x in data:
            plain(x)
    oneshot(searched, data, awq(["embed"], group_size=8, bits=3, symmetric=True, mappings=[VALUES]))
    oneshot(nearest, None, rtn(["embed"], group_size=8, bits=3, symmetric=True))
    layer = plain.layers[0].self_attn.out_proj
    x = torch.cat([heads.reshape(-1, WIDTH) for which, heads, _ in seen if which is layer]).double()
    errors = [
        (x @ (m.layers[0].self_attn.out_proj.weight - layer.weight).detach().double().T).square().sum()
        for m in (searched, nearest)
    ]
    assert errors[0] < errors[1]
    report = searched.bitpress.report["layers"]["layers.0.self_attn.out_proj"]
    relative = errors[0] / (x @ layer.weight.detach().double().T).square().sum()
    assert report["relative_error"] == pytest.approx(float(relative), rel=0.5)
