"""Statistics of fused experts, from the calibration data to the solver."""

import architectures
import pytest
import tiny
import torch
from compressing import rtn, scheme, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import PrivateAttr
from torch.nn import functional as F

from bitpress import AWQModifier, oneshot
from bitpress.models.experts import fused_experts, named_layers
from bitpress.modifiers import State, smoothing
from bitpress.modifiers.resolving import resolve_mappings
from bitpress.pipelines.calibrating import calibrating
from bitpress.session import Session

EXPERTS = 4
LENGTH = 24


def moe(family="qwen2_moe", **own):
    """Two layers, experts in the second at least."""
    if not own:
        return architectures.ARCHITECTURES[family].build()
    kinds = {"qwen2_moe": "Qwen2MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
    return architectures._built(kinds[family], own)()


def padded(seed):
    """Two rows, one of them with padding at its end, the other with some at its start."""
    batch = tiny.tokens(2, LENGTH, seed)
    batch["attention_mask"][0, 17:] = 0
    batch["attention_mask"][1, :5] = 0
    return batch


def data(batches=3, make=padded):
    return tiny.data_of([make(seed) for seed in range(batches)])


class Watching(AWQModifier):
    """Keeps a copy of the statistics that the solver is given."""

    _seen: dict = PrivateAttr(default_factory=dict)

    def on_block(self, state, block):
        for name, statistics in state.statistics.items():
            self._seen[name] = (id(statistics), statistics.gram.double().clone(), statistics.rows)
        self._seen["", block.name] = list(state.statistics.values())  # alive, so that ids stay apart
        super().on_block(state, block)

    def seen(self, owner):
        return {n.removeprefix(f"{owner}."): s for n, s in self._seen.items() if n[0] and n.startswith(f"{owner}.")}


def watched(model, calibration, ignore=("lm_head",), **options):
    modifier = Watching(scheme=scheme(), ignore=list(ignore), n_grid=3)
    session = tiny.compress(model, [modifier], calibration, **options)
    return modifier, session


def owners(model):
    return [name for name, module in model.named_modules() if fused_experts(module) is not None]


@torch.no_grad()
def calls(model, owner, calibration):
    """(x, index, real tokens) of the experts in each batch, in the model as it is."""
    found = []
    module = model.get_submodule(owner)

    def hook(_, args, kwargs):
        x, index, _ = [*args, *kwargs.values()]
        found.append((x.reshape(len(index), -1).double(), index))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with calibrating(model, all_experts=False):
        for batch in calibration.batches:
            model(**batch.kwargs, use_cache=False)
    handle.remove()
    masks = [b.kwargs["attention_mask"].bool().flatten() for b in calibration.batches]
    return [(x, index, mask) for (x, index), mask in zip(found, masks, strict=True)]


def middle(model, owner, expert, x):
    layers = fused_experts(model.get_submodule(owner)).layers
    gate, up = (x @ layers[f"{expert}.{part}"].weight.detach().double().T for part in ("gate_proj", "up_proj"))
    return F.silu(gate) * up


def gram(parts):
    x = torch.cat(parts)
    return x.T @ x


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


# All experts see all tokens.


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize(
    ("family", "shared"), [("qwen2_moe", "shared_expert"), ("deepseek_v3", "shared_experts"), ("qwen3_moe", None)]
)
def test_all_experts_share_the_statistics_of_all_tokens(family, shared, pipeline):
    model, calibration = moe(family), data()
    owner = "model.layers.1.mlp.experts"
    # The layer before is left as it is where this one is shown what it makes.
    ignore = ["lm_head", *(["re:.*layers.0.*"] if pipeline == "sequential" else [])]
    seen = calls(model, owner, calibration)
    x = [x[mask] for x, _, mask in seen]
    downs = {e: gram([middle(model, owner, e, each) for each in x]) for e in range(EXPERTS)}
    modifier, session = watched(model, calibration, ignore, pipeline=pipeline)
    assert session.pipeline == pipeline
    found = modifier.seen(owner)
    first = {n: s for n, s in found.items() if not n.endswith("down_proj")}
    if shared is not None:
        beside = modifier.seen(f"model.layers.1.mlp.{shared}")
        first |= {f"{shared}.{n}": s for n, s in beside.items() if n != "down_proj"}
    assert len(first) == 2 * EXPERTS + (2 if shared else 0)
    assert len({identity for identity, _, _ in first.values()}) == 1
    _, total, rows = next(iter(first.values()))
    assert rows == sum(map(len, x)) == 3 * (17 + 19)
    close(total, gram(x))
    assert len({found[f"{e}.down_proj"][0] for e in range(EXPERTS)}) == EXPERTS
    for expert in range(EXPERTS):
        _, total, rows = found[f"{expert}.down_proj"]
        assert rows == 3 * (17 + 19)
        close(total, downs[expert])
    assert session.state.few_tokens == {}


def test_memory_does_not_grow_with_the_number_of_experts():
    distinct = []
    for count in (4, 12):
        modifier, _ = watched(moe("qwen2_moe", num_experts=count, mlp_only_layers=[0]), data(1))
        found = modifier.seen("model.layers.1.mlp.experts")
        assert len(found) == 3 * count
        distinct.append(len({s[0] for n, s in found.items() if not n.endswith("down_proj")}))
    assert distinct == [1, 1]


# Each sees its own.


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("qwen2_moe", padded),
        ("mixtral", padded),
        ("deepseek_v3", padded),
        ("mixtral", lambda seed: tiny.tokens(2, LENGTH, seed)),
    ],
    ids=["qwen2_moe", "mixtral", "deepseek_v3", "mixtral without padding"],
)
def test_each_expert_sees_the_tokens_that_it_is_sent(family, make):
    model, calibration = moe(family), data(make=make)
    owner = owners(model)[0]
    seen = calls(model, owner, calibration)
    expected = {}
    for expert in range(EXPERTS):
        x = [x[mask & (index == expert).any(-1)] for x, index, mask in seen]
        expected[expert] = sum(map(len, x)), gram(x), gram([middle(model, owner, expert, each) for each in x])
    modifier, _ = watched(model, calibration, pipeline="basic", moe_calibrate_all_experts=False, moe_min_tokens=0)
    found = modifier.seen(owner)
    for expert, (count, first, last) in expected.items():
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{expert}.{part}"
            assert (name in found) == bool(count) or found[name][2] == 0
            if count:
                assert found[name][2] == count
                close(found[name][1], last if part == "down_proj" else first)
    assert sum(count for count, _, _ in expected.values()) == 2 * sum(int(mask.sum()) for _, _, mask in seen)
    reached = [e for e, (count, _, _) in expected.items() if count]
    assert len({found[f"{e}.gate_proj"][0] for e in reached}) == len(reached)
    assert all(found[f"{e}.gate_proj"][0] == found[f"{e}.up_proj"][0] for e in reached)


@pytest.mark.parametrize("all_experts", [True, False])
def test_padding_is_left_out_where_the_experts_take_a_batch_of_their_own(all_experts):
    """Llama 4 hands all tokens to every expert, as zeros where they are not sent."""
    model, calibration = architectures.ARCHITECTURES["llama4"].build(), data()
    owner = "model.layers.1.feed_forward.experts"
    parts = []
    handle = model.get_submodule(owner).register_forward_pre_hook(
        lambda _, args: parts.append(args[0].view(EXPERTS, -1, args[0].shape[-1]).double())
    )
    with torch.no_grad(), calibrating(model):
        for batch in calibration.batches:
            model(**batch.kwargs, use_cache=False)
    handle.remove()
    masks = [b.kwargs["attention_mask"].bool().flatten() for b in calibration.batches]
    modifier, _ = watched(model, calibration, pipeline="basic", moe_calibrate_all_experts=all_experts, moe_min_tokens=0)
    found = modifier.seen(owner)
    for expert in range(EXPERTS):
        x = [part[expert][mask] for part, mask in zip(parts, masks, strict=True)]
        x = [each[each.any(-1)] for each in x]
        assert found[f"{expert}.up_proj"][2] == sum(map(len, x))
        close(found[f"{expert}.up_proj"][1], gram(x))


# Experts that saw too few.


def test_experts_below_the_minimum_are_solved_from_all_and_listed():
    model, calibration = moe(), data()
    owner = "model.layers.1.mlp.experts"
    seen = calls(model, owner, calibration)
    counts = [sum(int((mask & (index == e).any(-1)).sum()) for _, index, mask in seen) for e in range(EXPERTS)]
    assert len(set(counts)) > 1, "the test needs experts of unequal load"
    minimum = sorted(counts)[1] + 1
    x = {e: [x[mask & (index == e).any(-1)] for x, index, mask in seen] for e in range(EXPERTS)}
    whole = sum(gram(parts) for parts in x.values())
    own = {e: gram(parts) for e, parts in x.items()}
    options = {"pipeline": "basic", "moe_calibrate_all_experts": False, "moe_min_tokens": minimum}
    modifier, session = watched(model, calibration, **options)
    found = modifier.seen(owner)
    few = [e for e in range(EXPERTS) if counts[e] < minimum]
    assert 0 < len(few) < EXPERTS
    listed = {n: c for n, c in session.state.few_tokens.items() if n.startswith(owner)}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert listed == {f"{owner}.{e}.{part}": counts[e] for e in few for part in parts}
    for expert in range(EXPERTS):
        _, total, rows = found[f"{expert}.gate_proj"]
        assert rows == (sum(counts) if expert in few else counts[expert])
        close(total, whole if expert in few else own[expert])


def reported(model, **options):
    oneshot(
        model,
        token_ids(6, LENGTH),
        [AWQModifier(scheme=scheme(), ignore=["lm_head"], n_grid=2)],
        num_calibration_samples=6,
        **options,
    )
    return model.bitpress.report["experts_with_few_tokens"]


def test_the_report_lists_experts_with_few_tokens():
    listed = reported(moe("mixtral"), moe_calibrate_all_experts=False, moe_min_tokens=10_000)
    # None has so many: all but the one that saw most are solved from all.
    by_part = [n for n in listed if n.startswith("model.layers.0.") and n.endswith("up_proj")]
    assert EXPERTS - 1 >= len(by_part) >= 1
    assert all(0 <= count < 6 * LENGTH for count in listed.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"moe_min_tokens": 10_000}, {"moe_calibrate_all_experts": False, "moe_min_tokens": 1}],
    ids=["by default", "all see all", "a low minimum"],
)
def test_the_report_lists_none_where_all_saw_enough(options):
    assert reported(moe("mixtral"), **options) == {}


def test_an_expert_that_no_token_reaches_is_solved_from_the_others():
    model = moe("qwen3_moe")
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        gate.weight[3] = 0  # its logit is 0, and others are above
        gate.weight[:3] *= 50
        gate.weight[1] = -gate.weight[0]
        gate.weight[2] = gate.weight[0] * 0.5
    owner = "model.layers.1.mlp.experts"
    calibration = data()
    unreached = set(range(EXPERTS)) - {
        int(e) for _, index, mask in calls(model, owner, calibration) for e in index[mask].unique()
    }
    modifier, session = watched(model, calibration, moe_calibrate_all_experts=False, moe_min_tokens=1)
    found = modifier.seen(owner)
    assert len(found) == 3 * EXPERTS
    assert {n for n in session.state.few_tokens if n.startswith(owner)} == {
        f"{owner}.{e}.{part}" for e in unreached for part in ("gate_proj", "up_proj", "down_proj")
    }
    assert all(found[f"{e}.gate_proj"][2] > 0 for e in range(EXPERTS))


# Whatever happens, the model is as it was.


class Stop(BaseException):
    pass


class Failing(AWQModifier):
    _error: type = PrivateAttr(default=ValueError)
    _at: str = PrivateAttr(default="")

    def on_block(self, state, block):
        super().on_block(state, block)
        if block.name.endswith(self._at):
            raise self._error


def settings_of(model):
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    names = ("_experts_implementation", "use_cache", "_attn_implementation")
    return [[getattr(config, name, None) for name in names] for config in configs.values()]


@pytest.mark.parametrize(
    ("error", "all_experts", "pipeline"),
    [
        (ValueError, True, "sequential"),
        (KeyboardInterrupt, False, "sequential"),
        (Stop, True, "sequential"),
        (KeyboardInterrupt, True, "basic"),
        (Stop, False, "basic"),
    ],
)
def test_an_error_in_the_middle_leaves_the_model_as_it_was(error, all_experts, pipeline):
    model = moe("qwen2_moe").train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    before, configured = tiny.snapshot(model), settings_of(model)
    modes = [m.training for m in model.modules()]
    attributes = {n: sorted(set(m.__dict__) - {"_bitpress_experts"}) for n, m in model.named_modules()}
    modifier = Failing(scheme=scheme(), ignore=["lm_head"], n_grid=1)
    modifier._error, modifier._at = error, "layers.1"
    session = Session(model, [modifier], pipeline=pipeline, moe_calibrate_all_experts=all_experts)
    session.check()
    session.initialize(data())
    with pytest.raises(error):
        session.run()
    tiny.assert_unchanged(model, before)
    assert settings_of(model) == configured
    assert [m.training for m in model.modules()] == modes
    assert {n: sorted(set(m.__dict__) - {"_bitpress_experts"}) for n, m in model.named_modules()} == attributes
    assert not [n for n, m in named_layers(model) if m._forward_pre_hooks or m._forward_hooks]
    assert not any(fused_experts(model.get_submodule(owner)).every_token for owner in owners(model))
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("family", ["qwen2_moe", "jetmoe", "aria", "llama4_vl", "qwen3_vl_moe", "mistral_large4"])
def test_settings_of_all_configs_are_restored(family):
    if family not in architectures.ARCHITECTURES:
        pytest.skip("transformers lacks it")
    model = moe(family)

    def everything(config, seen):
        if config is not None and id(config) not in seen:
            seen[id(config)] = config
            for name in getattr(config, "sub_configs", {}):
                everything(getattr(config, name, None), seen)
        return seen

    configs = list(everything(model.config, {}).values())
    before = [(c._experts_implementation, getattr(c, "use_cache", None)) for c in configs]
    with calibrating(model):
        assert {m.config._experts_implementation for m in model.modules() if hasattr(m, "config") and owners(m)} <= {
            "eager",
            None,
        }
    assert [(c._experts_implementation, getattr(c, "use_cache", None)) for c in configs] == before


def test_a_batch_of_nan_names_an_expert_or_what_is_before_it_and_leaves_nothing():
    model = moe("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    before = tiny.snapshot(model)
    with pytest.raises(Exception, match="NaN or infinite"):
        watched(model, data(1))
    tiny.assert_unchanged(model, before)
    assert not [n for n, m in named_layers(model) if m._forward_pre_hooks]
    assert not any("forward" in m.__dict__ for m in model.modules())


# What AWQ makes of it.


@pytest.mark.parametrize(
    ("family", "all_experts"),
    [*((family, True) for family in ("qwen2_moe", "gpt_oss", "llama4", "jetmoe", "deepseek_v3")), ("mixtral", False)],
)
def test_awq_is_never_worse_than_rounding(family, all_experts):
    model = moe(family)
    before = tiny.snapshot(model)
    calibration = data(2)
    session = tiny.compress(
        model,
        [AWQModifier(scheme=scheme(), ignore=["lm_head"], n_grid=4)],
        calibration,
        moe_calibrate_all_experts=all_experts,
        moe_min_tokens=8,
    )
    records = session.state.mapping_records
    assert records
    assert all(r["error"] <= r["error_before"] for r in records)
    experts = {f"{owner}." for owner in owners(model)}
    assert any(n.startswith(tuple(experts)) for r in records for n in r["balance_layers"])
    after = model.state_dict()
    for owner in owners(model):
        for name in fused_experts(model.get_submodule(owner)).layers:
            layer = session.state.layer_records[f"{owner}.{name}"]
            assert layer["weight_error"] > 0
    changed = {n for n, value in before.items() if not torch.equal(after[n], value)}
    assert {f"{o}.{p.parameter}" for o in owners(model) for p in fused_experts(model.get_submodule(o)).projections} <= (
        changed
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "llama4", "jetmoe", "deepseek_v3"])
@settings(deadline=None, max_examples=2)
@given(st.integers(0, 1000))
def test_random_scales_through_the_mappings_leave_the_logits(family, seed):
    model = moe(family)
    plain = tiny.logits(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), calibrating(model):
        blocks = tiny.probed_blocks(model)
        found = [m for mappings in resolve_mappings(model, blocks).mappings.values() for m in mappings]
        state = State(model, {}, {}, blocks)
        through = 0
        for mapping in found:
            channels = int(mapping.channel_map.max()) + 1
            scales = torch.empty(channels).log_normal_(0, 0.7, generator=generator)
            smoothing.apply(state, mapping, scales)
            through += any(".experts." in name or "_linear." in name for name in mapping.balance)
    assert through
    after = tiny.logits(model)
    assert not torch.equal(after, plain)
    torch.testing.assert_close(after, plain, rtol=0, atol=2e-4 * float(plain.abs().max()))


def test_round_to_nearest_needs_no_calibration():
    model = moe("qwen2_moe")
    tiny.compress(model, rtn())
    quantized = {n for n, m in named_layers(model) if hasattr(m, "quantization_scheme")}
    assert sum(".experts." in n for n in quantized) == 3 * EXPERTS
    assert not any(n.endswith("shared_expert_gate") for n in quantized)


def test_experts_with_few_tokens_are_scaled_each_by_itself():
    """What smoothing does to the statistics of one expert's down projection must not reach another's."""
    model = moe(num_experts_per_tok=1)
    modifier, session = watched(model, data(batches=1), moe_min_tokens=10_000, moe_calibrate_all_experts=False)
    assert session.state.few_tokens
    owner = owners(model)[-1]
    ids = [modifier.seen(owner)[f"{e}.down_proj"][0] for e in range(EXPERTS)]
    assert len(set(ids)) == EXPERTS
