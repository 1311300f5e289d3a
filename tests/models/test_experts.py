"""Fused experts seen as linear layers: views of the parameters, and hooks on what a forward multiplies by them."""

import copy

import architectures
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bitpress import find_mappings
from bitpress.models import experts as experts_module
from bitpress.models.experts import (
    ExpertLinear,
    every_token,
    find_layer,
    fused_experts,
    named_layers,
    routers,
)
from bitpress.pipelines.calibrating import calibrating
from bitpress.statistics import InputCollector, Statistic

ZOO = architectures.ARCHITECTURES
EXPERTS = 4
ROUTED = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "inkling", "nemotron_h", "aria_text"]
"""Their experts' modules are called with hidden states, the chosen experts and their weights."""
ROUTED = [name for name in ROUTED if name in ZOO]
GATED = ["gate_proj", "up_proj", "down_proj"]
PARTS = {"nemotron_h": ["up_proj", "down_proj"]}


def built(family):
    if family not in ZOO:
        pytest.skip("transformers lacks it")
    return ZOO[family].build()


def experts_of(model):
    found = {name: fused_experts(module) for name, module in model.named_modules()}
    return {name: experts for name, experts in found.items() if experts is not None}


def first_experts(model):
    return next(iter(experts_of(model).items()))


@torch.no_grad()
def run(model, family, *, all_experts=False, seed=3):
    with calibrating(model, all_experts=all_experts):
        return architectures.output(model, ZOO[family].inputs(2, 12, seed))


def calls_of(model, module, family):
    """The arguments of a module's calls in one forward."""
    calls = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run(model, family)
    handle.remove()
    return calls


def routed_call(model, module, family):
    ((args, kwargs),) = calls_of(model, module, family)
    given = [*args, *kwargs.values()]
    index = next(t for t in given if not t.is_floating_point())
    x = next(t for t in given if t.is_floating_point() and t.shape != index.shape)
    weights = next(t for t in given if t.is_floating_point() and t.shape == index.shape)
    return x.reshape(len(index), -1), index, weights


def rows_sent(index, expert):
    """The tokens of an expert, the first choices before the second ones."""
    return [t for choice in range(index.shape[1]) for t in range(len(index)) if index[t, choice] == expert]


def product(layer, x):
    out = x.double() @ layer.weight.detach().double().T
    return out if layer.bias is None else out + layer.bias.detach().double()


def middle_of(module, layers, expert, x):
    """What the down-projection of an expert receives, in float64."""
    up = product(layers[f"{expert}.up_proj"], x)
    if f"{expert}.gate_proj" not in layers:
        return module.act_fn(up)
    gate = product(layers[f"{expert}.gate_proj"], x)
    if hasattr(module, "limit"):  # GPT-OSS
        gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    act = module.act_fn if hasattr(module, "act_fn") else F.silu
    return act(gate) * up


def watch(layers):
    """What each layer's hooks get: a list of inputs by name."""
    seen = {name: [] for name in layers}

    def hook(name):
        return lambda layer, args: seen[name].append(args[0].clone())

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    return seen, handles


def release(handles):
    for handle in handles:
        handle.remove()


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


# Which layers there are.


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "llama4", "inkling", "nemotron_h"])
def test_every_projection_of_every_expert_is_a_linear_layer(family):
    model = built(family)
    owner, experts = first_experts(model)
    parts = PARTS.get(family, GATED)
    assert list(experts.layers) == [f"{e}.{part}" for e in range(EXPERTS) for part in parts]
    assert experts.count == EXPERTS
    named = dict(named_layers(model))
    names = list(named)
    assert len(names) == len(set(names))
    at = names.index(owner)
    assert names[at + 1 : at + 1 + len(experts.layers)] == [f"{owner}.{local}" for local in experts.layers]
    plain = [name for name in names if not isinstance(named[name], ExpertLinear)]
    assert plain == [name for name, _ in model.named_modules()]
    for name, layer in named.items():
        assert find_layer(model, name) is layer
    for local, layer in experts.layers.items():
        assert isinstance(layer, nn.Linear)
        assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
        assert (layer.bias is not None) == (family == "gpt_oss")
        assert layer.projection.first == (not local.endswith("down_proj"))
    assert not [n for n, _ in model.named_parameters() if ".0.gate_proj" in n and "experts" in n]


def test_modules_of_one_projection():
    model = built("jetmoe")
    owners = experts_of(model)
    assert len(owners) == 8  # of queries and of values' way out, and of the MLP's two
    for owner, experts in owners.items():
        assert list(experts.layers) == [str(e) for e in range(EXPERTS)]
        module = model.get_submodule(owner)
        for layer in experts.layers.values():
            assert tuple(layer.weight.shape) == (module.output_size, module.input_size)
        assert find_layer(model, f"{owner}.2") is experts.layers["2"]


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.experts.4.up_proj", "model.layers.1.mlp.experts.0", "model.nothing", "model.layers.1.x.y"],
)
def test_there_is_no_such_layer(name):
    with pytest.raises(AttributeError, match=name.replace(".", r"\.")):
        find_layer(built("qwen3_moe"), name)


def test_a_prefix_and_a_module_that_is_the_experts_itself():
    module = Gated()
    assert find_layer(module, "") is module
    assert [name for name, _ in named_layers(module)][:3] == ["", "0.gate_proj", "0.up_proj"]
    assert find_layer(module, "1.down_proj") is fused_experts(module).layers["1.down_proj"]
    assert [name for name, _ in named_layers(module, prefix="a.b")][:2] == ["a.b", "a.b.0.gate_proj"]


NO_EXPERTS = [
    "mamba", "zamba", "xlnet", "funnel", "reformer", "rwkv", "recurrent_gemma", "olmo_hybrid", "squeezebert", "vit",
    "dinov2_with_registers", "deit", "siglip", "swinv2", "timesformer", "blip2", "hubert", "whisper", "llama", "gpt2",
    "phi4_multimodal",
]  # fmt: skip


@pytest.mark.parametrize("family", NO_EXPERTS)
def test_other_parameters_of_three_dimensions_are_no_experts(family):
    model = built(family)
    assert experts_of(model) == {}
    assert [name for name, _ in named_layers(model)] == [name for name, _ in model.named_modules()]
    assert list(routers(model)) == []


class Parameters(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    "shapes",
    [
        {"class_token": (1, 1, 16), "position_embedding": (1, 9, 16)},
        {"weight": (4, 16, 8)},
        {"q": (16, 4, 4), "k": (16, 4, 4), "bias": (4,)},
        {"kernel": (8, 1, 3), "weight": (8, 8)},
        {"gate_up_proj": (1, 32, 8), "down_proj": (1, 8, 16)},
        {"up": (4, 16, 8), "down": (4, 8, 12)},
    ],
    ids=str,
)
def test_hand_written_parameters_of_three_dimensions_are_no_experts(shapes):
    module = Parameters(**shapes)
    assert fused_experts(module) is None
    assert [name for name, _ in named_layers(module)] == [""]


def test_block_diagonal_gates_are_no_experts():
    """As in Griffin: all blocks see their own share of every token."""

    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_gate = nn.Parameter(torch.randn(4, 8, 8))
            self.recurrent_gate = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            x = x.unflatten(-1, (4, 8)).transpose(0, 1)
            return (x @ self.input_gate).sigmoid() * (x @ self.recurrent_gate)

    assert fused_experts(Gates()) is None


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.ConvTranspose1d])
def test_convolutions_are_no_experts(convolution):
    assert fused_experts(convolution(8, 8, 3)) is None


# Views.


class Gated(nn.Module):
    """Hand-written experts of any layout."""

    def __init__(self, count=3, width=8, middle=6, *, turned=False, by_turns=False, biases=False, gated=True):
        super().__init__()
        self.is_transposed, self.is_concatenated = turned, not by_turns
        self.gated, self.num_experts = gated, count
        both = 2 * middle if gated else middle
        self.up_name = "gate_up_proj" if gated else "up_proj"
        generator = torch.Generator().manual_seed(count * width + middle)
        for name, out, inputs in ((self.up_name, both, width), ("down_proj", width, middle)):
            shape = (count, inputs, out) if turned else (count, out, inputs)
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) / inputs**0.5))
            if biases:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(count, out, generator=generator)))

    def times(self, x, name, expert):
        weight, bias = getattr(self, name)[expert], getattr(self, f"{name}_bias", None)
        out = x @ weight if self.is_transposed else F.linear(x, weight)
        return out if bias is None else out + bias[expert]

    def middle(self, x, expert):
        both = self.times(x, self.up_name, expert)
        if not self.gated:
            return both.relu()
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return F.silu(gate) * up

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            choice, rows = torch.where((index == expert).T)
            if len(rows):
                made = self.times(self.middle(x[rows], expert), "down_proj", expert)
                out.index_add_(0, rows, made * weights[rows, choice, None])
        return out


def sent(count, width, tokens=10, choices=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    index = torch.rand(tokens, count, generator=generator).topk(min(choices, count)).indices
    return x, index, torch.rand(index.shape, generator=generator)


LAYOUTS = st.fixed_dictionaries(
    {
        "count": st.integers(2, 5),
        "width": st.integers(4, 9),
        "middle": st.integers(2, 9),
        "turned": st.booleans(),
        "by_turns": st.booleans(),
        "biases": st.booleans(),
        "gated": st.booleans(),
    }
)


def by_hand(module, x, index, weights):
    layers = fused_experts(module).layers
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for choice, expert in enumerate(index[token].tolist()):
            row = x[token : token + 1]
            up = product(layers[f"{expert}.up_proj"], row)
            up = F.silu(product(layers[f"{expert}.gate_proj"], row)) * up if module.gated else up.relu()
            out[token] += weights[token, choice].double() * product(layers[f"{expert}.down_proj"], up)[0]
    return out


@settings(deadline=None, max_examples=60)
@given(LAYOUTS)
def test_the_layers_compute_what_the_module_computes(layout):
    module = Gated(**layout)
    call = sent(layout["count"], layout["width"])
    close(module(*call).detach(), by_hand(module, *call))


@settings(deadline=None, max_examples=40)
@given(LAYOUTS, st.integers(0, 4), st.sampled_from(GATED), st.floats(-2, 2))
def test_what_is_written_to_a_layer_is_written_to_the_module_and_back(layout, expert, part, value):
    module = Gated(**layout)
    layers = fused_experts(module).layers
    name = f"{expert % layout['count']}.{part}"
    if name not in layers:
        return
    call = sent(layout["count"], layout["width"])
    layers[name].weight.data.mul_(value).add_(0.1)
    close(module(*call).detach(), by_hand(module, *call))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.25)
    close(module(*call).detach(), by_hand(module, *call))
    assert fused_experts(module).layers[name] is layers[name]
    total = sum(layer.weight.numel() for layer in layers.values())
    assert total == sum(p.numel() for p in module.parameters() if p.dim() == 3)


@pytest.mark.parametrize("family", ROUTED)
def test_a_models_experts_computed_from_their_layers(family):
    model = built(family)
    _, experts = first_experts(model)
    x, index, weights = routed_call(model, experts.module, family)
    with calibrating(model, all_experts=False):
        out = experts.module(x, index, weights)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(EXPERTS):
        rows = rows_sent(index, expert)
        middle = middle_of(experts.module, experts.layers, expert, x[rows])
        made = product(experts.layers[f"{expert}.down_proj"], middle)
        for row, each in zip(rows, made, strict=True):
            expected[row] += each * weights[row][index[row] == expert].sum().double()
    close(out, expected)


def test_llama4s_experts_computed_from_their_layers():
    model = built("llama4")
    _, experts = first_experts(model)
    (((x,), _),) = calls_of(model, experts.module, "llama4")
    made = [
        product(
            experts.layers[f"{e}.down_proj"],
            middle_of(experts.module, experts.layers, e, x.view(EXPERTS, -1, x.shape[-1])[e]),
        )
        for e in range(EXPERTS)
    ]
    close(experts.module(x).detach(), torch.cat(made))


def test_jetmoes_experts_computed_from_their_layers():
    model = built("jetmoe")
    for experts in experts_of(model).values():
        for args, _ in calls_of(model, experts.module, "jetmoe"):
            x, sizes = args
            parts = x.split(sizes)
            made = [product(experts.layers[str(e)], part) for e, part in enumerate(parts)]
            close(experts.module(x, sizes).detach(), torch.cat(made))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4", "jetmoe"])
def test_writing_to_one_layer_changes_the_model(family):
    model = built(family)
    before, state = run(model, family), tiny.snapshot(model)
    owner, experts = first_experts(model)
    for layer in experts.layers.values():
        layer.weight.data.mul_(1.5)
    assert not torch.equal(run(model, family), before)
    after = model.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(after[name], value)}
    assert changed == {f"{owner}.{p.parameter}" for p in experts.projections}
    model.load_state_dict(state)
    assert torch.equal(run(model, family), before)
    assert fused_experts(model.get_submodule(owner)) is experts


# Hooks.


@pytest.mark.parametrize("family", ROUTED)
def test_hooks_see_what_the_router_sends(family):
    model = built(family)
    plain = run(model, family)
    _, experts = first_experts(model)
    x, index, _ = routed_call(model, experts.module, family)
    seen, handles = watch(experts.layers)
    assert torch.equal(run(model, family), plain)
    release(handles)
    assert torch.equal(run(model, family), plain)
    for expert in range(EXPERTS):
        rows = rows_sent(index, expert)
        for name, inputs in seen.items():
            if not name.startswith(f"{expert}.") or not rows:
                continue
            (got,) = inputs
            if name.endswith("down_proj"):
                close(got, middle_of(experts.module, experts.layers, expert, x[rows]))
            else:
                assert torch.equal(got, x[rows])
    reached = {name for name, inputs in seen.items() if inputs}
    assert reached == {n for n in experts.layers if rows_sent(index, int(n.split(".")[0]))}


@pytest.mark.parametrize("family", ROUTED)
def test_hooks_see_every_token_on_request(family):
    model = built(family)
    plain = run(model, family)
    _, experts = first_experts(model)
    x, _, _ = routed_call(model, experts.module, family)
    seen, handles = watch(experts.layers)
    assert torch.equal(run(model, family, all_experts=True), plain)
    release(handles)
    for name, inputs in seen.items():
        (got,) = inputs
        if name.endswith("down_proj"):
            close(got, middle_of(experts.module, experts.layers, int(name.split(".")[0]), x))
        else:
            assert torch.equal(got.reshape(x.shape), x)


@pytest.mark.parametrize("all_experts", [True, False])
@pytest.mark.parametrize("part", GATED)
def test_hooks_on_some_layers_only(part, all_experts):
    model = built("qwen3_moe")
    plain = run(model, "qwen3_moe")
    _, experts = first_experts(model)
    x, index, _ = routed_call(model, experts.module, "qwen3_moe")
    expert = int(index[0, 0])
    seen, handles = watch({part: experts.layers[f"{expert}.{part}"]})
    assert torch.equal(run(model, "qwen3_moe", all_experts=all_experts), plain)
    release(handles)
    (got,) = seen[part]
    assert len(got) == (len(x) if all_experts else len(rows_sent(index, expert)))


@pytest.mark.parametrize("all_experts", [True, False])
def test_hooks_of_experts_that_take_a_batch_of_their_own(all_experts):
    """Llama 4 multiplies the tokens of all experts at once, with zeros for those that are not sent."""
    model = built("llama4")
    plain = run(model, "llama4")
    _, experts = first_experts(model)
    (((x,), _),) = calls_of(model, experts.module, "llama4")
    each = x.view(EXPERTS, -1, x.shape[-1])
    seen, handles = watch(experts.layers)
    assert torch.equal(run(model, "llama4", all_experts=all_experts), plain)
    release(handles)
    sizes = []
    for expert in range(EXPERTS):
        sent_here = each[expert][each[expert].any(-1)]
        sizes.append(len(sent_here))
        for part in ("gate_proj", "up_proj"):
            assert torch.equal(torch.cat(seen[f"{expert}.{part}"]), sent_here)
        got = torch.cat(seen[f"{expert}.down_proj"])
        close(got, middle_of(experts.module, experts.layers, expert, sent_here))
    assert sum(sizes) == each.shape[1] * model.config.num_experts_per_tok


@pytest.mark.parametrize("all_experts", [True, False])
def test_hooks_of_modules_of_one_projection(all_experts):
    model = built("jetmoe")
    plain = run(model, "jetmoe")
    expected = {}
    for owner, experts in experts_of(model).items():
        for (x, sizes), _ in calls_of(model, experts.module, "jetmoe"):
            for expert, part in enumerate(x.split(sizes)):
                expected.setdefault(f"{owner}.{expert}", []).append(part)
    layers = {f"{owner}.{local}": layer for owner, e in experts_of(model).items() for local, layer in e.layers.items()}
    seen, handles = watch(layers)
    assert torch.equal(run(model, "jetmoe", all_experts=all_experts), plain)
    release(handles)
    for name, inputs in seen.items():
        assert torch.equal(torch.cat(inputs), torch.cat(expected[name]))


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.integers(0, 9), st.integers(1, 3), st.booleans(), st.integers(0, 5))
def test_hooks_of_hand_written_experts(layout, tokens, choices, everything, seed):
    module = Gated(**layout)
    x, index, weights = sent(layout["count"], layout["width"], tokens, choices, seed)
    plain = module(x, index, weights)
    experts = fused_experts(module)
    seen, handles = watch(experts.layers)
    with every_token(module, enabled=everything):
        assert torch.equal(module(x, index, weights), plain)
        assert torch.equal(module(x, weights=weights, index=index), plain)
    release(handles)
    for name, inputs in seen.items():
        expert = int(name.split(".")[0])
        rows = list(range(tokens)) if everything else rows_sent(index, expert)
        got = torch.cat(inputs) if inputs else x[:0]
        wanted = torch.cat([x[rows]] * 2)
        if name.endswith("down_proj"):
            wanted = module.middle(wanted, expert).detach()
            got = got.reshape(-1, wanted.shape[-1])
        close(got.detach(), wanted)


@pytest.mark.parametrize("all_experts", [True, False])
def test_hooks_know_which_tokens_they_see(all_experts):
    model = built("qwen3_moe")
    _, experts = first_experts(model)
    x, index, _ = routed_call(model, experts.module, "qwen3_moe")
    found = {}

    def hook(name):
        return lambda _, args, kwargs: found.update({name: (args[0], kwargs.get("rows"))})

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in experts.layers.items()]
    run(model, "qwen3_moe", all_experts=all_experts)
    release(handles)
    for name, (given_to, rows) in found.items():
        if all_experts:
            assert rows is None
            assert len(given_to) == len(x)
        else:
            assert rows().tolist() == rows_sent(index, int(name.split(".")[0]))


def test_the_forward_is_the_classs_own_without_hooks():
    module = Gated()
    layers = fused_experts(module).layers
    _, handles = watch(layers)
    assert "forward" in module.__dict__
    handles[0].remove()
    assert "forward" in module.__dict__
    for handle in handles:
        handle.remove()
        handle.remove()
    assert "forward" not in module.__dict__
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_forward_that_someone_has_set_is_back():
    module = Gated()
    call, calls = sent(3, 8), []
    own = module.forward

    def counting(*args):
        calls.append(1)
        return own(*args)

    module.forward = counting
    seen, handles = watch(fused_experts(module).layers)
    with every_token(module, enabled=False):
        module(*call)
    release(handles)
    assert module.forward is counting
    assert calls
    assert any(seen.values())


class Stop(BaseException):
    pass


@pytest.mark.parametrize("all_experts", [True, False])
@pytest.mark.parametrize("part", GATED)
@pytest.mark.parametrize("error", [ValueError, Stop, KeyboardInterrupt])
def test_a_hook_that_fails_leaves_nothing_behind(error, part, all_experts):
    model = built("qwen3_moe")
    plain, before = run(model, "qwen3_moe"), tiny.snapshot(model)
    owner, experts = first_experts(model)
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}

    def stop(*_):
        raise error

    _, index, _ = routed_call(model, experts.module, "qwen3_moe")
    layer = experts.layers[f"{int(index[0, 0])}.{part}"]
    widths = {name: each.in_features for name, each in experts.layers.items()}
    collector = InputCollector(experts.layers, widths, dict.fromkeys(experts.layers, Statistic.GRAM))
    handle = layer.register_forward_pre_hook(stop)
    with pytest.raises(error), collector.watching(), collector.batch(0):
        run(model, "qwen3_moe", all_experts=all_experts)
    handle.remove()
    assert "forward" not in model.get_submodule(owner).__dict__
    assert torch.overrides._get_current_function_mode() is None
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == attributes
    assert experts.every_token is False
    tiny.assert_unchanged(model, before)
    assert torch.equal(run(model, "qwen3_moe"), plain)


def test_every_token_is_what_it_was_after_any_exit():
    model = built("mixtral")
    found = list(experts_of(model).values())
    found[0].every_token = True

    def within():
        with every_token(model):
            assert all(e.every_token for e in found)
            with every_token(model, enabled=False):
                assert not any(e.every_token for e in found)
            assert all(e.every_token for e in found)
            raise Stop

    with pytest.raises(Stop):
        within()
    assert [e.every_token for e in found] == [True, False]


# When the parameters move.


def marked(model):
    """Marks on the first layer of the first experts, as on one that is quantized."""
    owner, experts = first_experts(model)
    layer = experts.layers["1.down_proj"]
    layer.quantization_scheme = scheme = object()
    layer.quantization_status = "frozen"
    layer.register_buffer("weight_scale", torch.rand(3), persistent=False)
    return owner, layer, scheme


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_layers_follow_a_model_to_another_dtype(family):
    model = built(family)
    owner, old, scheme = marked(model)
    model.to(torch.bfloat16)
    new = find_layer(model, f"{owner}.1.down_proj")
    assert new.weight.dtype == torch.bfloat16
    assert new.quantization_scheme is scheme
    assert new.quantization_status == "frozen"
    assert torch.equal(new.weight_scale, old.weight_scale)
    layers = fused_experts(model.get_submodule(owner)).layers
    assert [name for name, layer in layers.items() if hasattr(layer, "quantization_scheme")] == ["1.down_proj"]
    with torch.no_grad():
        model.get_parameter(f"{owner}.down_proj").zero_()
    assert not new.weight.any()
    assert find_layer(model, f"{owner}.1.down_proj") is new


def test_layers_follow_a_model_to_another_device():
    model = built("qwen3_moe")
    owner, _, scheme = marked(model)
    model.to("meta")
    new = find_layer(model, f"{owner}.1.down_proj")
    assert new.quantization_scheme is scheme
    assert new.weight.device.type == "meta"
    assert new.weight_scale.device == new.weight.device


def test_a_copy_has_layers_of_its_own():
    model = built("qwen3_moe")
    owner, old, _ = marked(model)
    copied = copy.deepcopy(model)
    before, plain = tiny.snapshot(model), run(model, "qwen3_moe")
    new = find_layer(copied, f"{owner}.1.down_proj")
    assert new is not old
    assert new.experts.module is copied.get_submodule(owner)
    assert hasattr(new, "quantization_scheme")
    assert torch.equal(new.weight_scale, old.weight_scale)
    for layer in fused_experts(copied.get_submodule(owner)).layers.values():
        layer.weight.data.zero_()
    assert not copied.get_parameter(f"{owner}.down_proj").any()
    tiny.assert_unchanged(model, before)
    assert torch.equal(run(model, "qwen3_moe"), plain)
    assert not torch.equal(run(copied, "qwen3_moe"), plain)
    seen, handles = watch(fused_experts(copied.get_submodule(owner)).layers)
    run(model, "qwen3_moe")
    assert not any(seen.values())
    run(copied, "qwen3_moe")
    assert any(seen.values())
    release(handles)
    assert find_layer(model, f"{owner}.1.down_proj") is old


def test_a_parameter_that_is_replaced():
    module = Gated()
    old = fused_experts(module)
    module.down_proj = nn.Parameter(torch.ones_like(module.down_proj))
    new = fused_experts(module)
    assert new is not old
    assert new.layers["2.down_proj"].weight.eq(1).all()


# Routers.

ROUTERS = {
    "qwen3_moe": [],
    "mixtral": [],
    "deepseek_v3": [],
    "gpt_oss": [],
    "llama": [],
    "llama4": ["model.layers.1.feed_forward.router"],
    "phimoe": [f"model.layers.{i}.mlp.router" for i in range(2)],
    "hunyuan_v1_moe": [f"model.layers.{i}.mlp.gate.wg" for i in range(2)],
    "gemma4": [f"model.layers.{i}.router.proj" for i in range(2)],
    "qwen2_moe": ["model.layers.1.mlp.shared_expert_gate"],
    "qwen3_next": ["model.layers.1.mlp.shared_expert_gate"],
    "qwen3_5_moe": [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)],
    "longcat_flash": [f"model.layers.{i}.mlp.router.classifier" for i in range(2)],
    "jetmoe": [
        f"model.layers.{i}.{where}.router.layer" for i in range(2) for where in ("self_attention.experts", "mlp")
    ],
}


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_and_gates_of_shared_experts(family):
    model = built(family)
    found = list(routers(model))
    assert set(found) == set(ROUTERS[family])
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in found)


def test_a_router_of_several_layers():
    """It may have an output more than there are experts, for tokens that none takes."""
    model = built("zaya")
    found = set(routers(model))
    assert {f"model.layers.{i}.mlp.gate.router_mlp.out_proj" for i in range(2)} <= found
    assert all(".mlp.gate." in name for name in found)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # As Qwen3-Next-80B: 512 experts beside a shared one of width 512.
        ("Qwen3NextForCausalLM", [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)]),
        ("Qwen2MoeForCausalLM", [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)]),
        ("Gemma4ForCausalLM", [f"model.layers.{i}.router.proj" for i in range(2)]),
    ],
)
@pytest.mark.parametrize("count", [32, 96])
def test_layers_that_are_as_wide_as_there_are_experts_are_no_routers(kind, expected, count):
    if not hasattr(architectures.transformers, kind):
        pytest.skip("transformers lacks it")
    own = {"num_experts": count, "shared_expert_intermediate_size": count}
    if kind == "Gemma4ForCausalLM":
        own |= {"enable_moe_block": True, "top_k_experts": 2, "layer_types": ["sliding_attention", "full_attention"]}
        own |= {"hidden_size_per_layer_input": 48, "vocab_size_per_layer_input": 128, "global_head_dim": 32}
    model = architectures._built(kind, own)()
    assert next(iter(experts_of(model).values())).count == count
    assert set(routers(model)) == set(expected)


def test_experts_that_are_called_in_another_form_say_once_that_they_are_routed(caplog):
    experts_module._say_routed.cache_clear()
    architecture = architectures.ARCHITECTURES["llama4"]
    find_mappings(architecture.build(), [architecture.inputs(1, 16, 0)])
    assert [r.getMessage() for r in caplog.records if "sends it" in r.getMessage()] == [
        "Llama4TextExperts are called without an index of experts: each sees the tokens that the router sends it. Give "
        "more samples if the report lists experts with few tokens."
    ]
