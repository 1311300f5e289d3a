"""The original model beside the compressed one: what is compared, and what is not."""

import copy
import logging

import architectures
import pytest
import tiny
import torch
from compressing import scheme
from pydantic import PrivateAttr
from torch import nn

from bitpress import GPTQModifier
from bitpress.models.experts import fused_experts
from bitpress.modifiers import QuantizationModifier
from bitpress.pipelines.calibrating import calibrating
from bitpress.statistics import Statistic

WIDTH = 16


class Watching(QuantizationModifier):
    """Round-to-nearest that asks for the drift and keeps it."""

    _drifts: dict = PrivateAttr(default_factory=dict)
    _blocks: list = PrivateAttr(default_factory=list)

    def required_statistics(self, state, name):
        return Statistic.GRAM | Statistic.DRIFT

    def on_block(self, state, block):
        self._blocks.append(block)
        self._drifts.update({name: s.drift.clone() for name, s in state.statistics.items()})
        super().on_block(state, block)


def watching(bits=2, group=16, kind="Linear"):
    return Watching(config_groups={"g": scheme(bits=bits, group_size=group, targets=[kind])}, ignore=["lm_head"])


def padded(seed):
    batch = tiny.tokens(2, 24, seed)
    batch["attention_mask"][0, 17:] = 0
    return batch


@torch.no_grad()
def inputs(model, names, calibration):
    """What each layer receives, without padding, all batches after one another, in float64."""
    found = {name: [] for name in names}
    masks = []

    def keep(name, x):
        found[name].append(x.reshape(-1, x.shape[-1])[masks[-1]])

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        for name in names
    ]
    with calibrating(model):
        for batch in calibration.batches:
            masks.append(batch.kwargs["attention_mask"].bool().flatten())
            model(**batch.kwargs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def close(a, b):
    torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt_post_norm", "gpt2"])
def test_drift_is_that_between_the_original_and_the_model_whose_earlier_blocks_are_solved(family):
    original = tiny.FAMILIES[family]()
    model, modifier = copy.deepcopy(original), watching(kind="Conv1D" if family == "gpt2" else "Linear")
    calibration = tiny.data_of([padded(seed) for seed in range(3)])
    tiny.compress(model, [modifier], calibration)
    blocks = modifier._blocks
    mixed = copy.deepcopy(original)
    compared = 0
    for block in blocks:
        before, now = (inputs(each, block.layers, calibration) for each in (original, mixed))
        for name in block.layers:
            close(modifier._drifts[name], (before[name] - now[name]).T @ now[name])
            compared += bool(modifier._drifts[name].any())
        mixed.get_submodule(block.name).load_state_dict(model.get_submodule(block.name).state_dict())
    assert not any(modifier._drifts[name].any() for name in blocks[0].layers)
    assert compared >= len(blocks[1].layers)


def gptq(strength, bits=2):
    return GPTQModifier(
        config_groups={"g": scheme(bits=bits)}, ignore=["lm_head"], error_correction=strength, dampening_frac=0.1
    )


class Asking(GPTQModifier):
    """GPTQ that asks for the drift and makes no use of it."""

    def required_statistics(self, state, name):
        return super().required_statistics(state, name) | Statistic.DRIFT


def compressed(modifier, calibration=None, **options):
    """The model, and how often its embedding ran."""
    model = tiny.llama()
    runs = []
    model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(1))
    tiny.compress(model, [modifier], calibration or tiny.token_data(), **options)
    return model, len(runs)


def test_off_is_one_forward_and_the_second_does_not_disturb_the_first():
    fields = {"config_groups": {"g": scheme(bits=2)}, "ignore": ["lm_head"]}
    plain, once = compressed(GPTQModifier(**fields))
    off, still_once = compressed(GPTQModifier(**fields, error_correction=0.0))
    asked, twice = compressed(Asking(**fields))
    assert once == still_once
    # The report's witness, one batch, goes through the original model in any case.
    assert twice == once + len(tiny.token_data().batches) - 1
    tiny.assert_unchanged(off, tiny.snapshot(plain))
    tiny.assert_unchanged(asked, tiny.snapshot(plain))


def test_what_is_behind_the_last_block_does_not_run_for_the_original():
    model, runs = tiny.llama(), []
    model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    tiny.compress(model, [watching()], tiny.token_data())
    assert len(runs) <= 1  # the dry run


def output_error(model, calibration):
    original = tiny.llama()
    pairs = [(tiny.logits(model, b.kwargs), tiny.logits(original, b.kwargs)) for b in calibration.batches]
    return sum(float((a - b).square().sum()) for a, b in pairs)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_output_is_nearer_to_the_original_one(bits):
    calibration = tiny.token_data(16, rows=4)
    errors = [output_error(compressed(gptq(s, bits), calibration)[0], calibration) for s in (0.0, 0.5, 1.0)]
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]


def test_the_basic_pipeline_has_nothing_to_correct():
    plain, corrected = (compressed(gptq(s), pipeline="basic")[0] for s in (0.0, 1.0))
    tiny.assert_unchanged(corrected, tiny.snapshot(plain))


class Step(nn.Module):
    def __init__(self, out=WIDTH):
        super().__init__()
        self.linear = nn.Linear(WIDTH, out)

    def forward(self, x):
        return self.linear(x)


class InPlace(Step):
    """Writes to what it is given, and to what its layer was given."""

    def forward(self, x):
        y = self.linear(x)
        x.mul_(0).add_(y)
        return x


class Steps(nn.Module):
    def __init__(self, *steps, order=None):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.order = order or (lambda x: range(len(steps)))

    def forward(self, x):
        x = x.clone()
        for index in self.order(x):
            x = self.steps[index](x)
        return x


def rows(count=64, batches=3):
    generator = torch.Generator().manual_seed(0)
    return tiny.data_of([torch.randn(count, WIDTH, generator=generator) for _ in range(batches)])


def run(model, calibration):
    with torch.no_grad():
        return torch.cat([model(batch.args[0].clone()) for batch in calibration.batches]).double()


def coarse_then_fine(strength):
    groups = {
        "coarse": scheme(bits=2, targets=["re:.*steps.0.*"], group_size=16),
        "fine": scheme(bits=8, targets=["re:.*steps.1.*"], group_size=16),
    }
    return GPTQModifier(config_groups=groups, error_correction=strength, dampening_frac=1e-4)


@pytest.mark.parametrize("kind", [Step, InPlace])
def test_a_fine_layer_makes_up_for_a_coarse_one_as_far_as_least_squares_can(kind):
    """Without bias, for what no linear layer can make up for is a constant."""
    original = tiny.seeded(lambda: Steps(kind(), kind()))
    with torch.no_grad():
        original.steps[1].linear.bias.zero_()
    calibration = rows()
    expected = run(original, calibration)
    errors = []
    for strength in (0.0, 1.0):
        model = copy.deepcopy(original)
        session = tiny.compress(model, [coarse_then_fine(strength)], calibration)
        errors.append(float((run(model, calibration) - expected).square().sum()))
    between = torch.cat([model.steps[0](b.args[0].clone()) for b in calibration.batches]).detach().double()
    best = torch.linalg.lstsq(between, expected).solution
    least = float((between @ best - expected).square().sum())
    assert least * 0.999 <= errors[1] <= least * 1.02
    assert errors[1] < errors[0] * 0.98
    assert session.state.layer_records["steps.1.linear"]["correction"] > 0


def test_a_block_that_is_called_twice_pools_both_calls():
    original = tiny.seeded(lambda: Steps(Step(), Step(), Step(), order=lambda x: (0, 1, 1, 2)))
    model, modifier, calibration = copy.deepcopy(original), watching(), rows()
    tiny.compress(model, [modifier], calibration)
    x = torch.cat([b.args[0] for b in calibration.batches])
    with torch.no_grad():
        before, now = original.steps[0](x), model.steps[0](x)
        pairs = [(before, now), (original.steps[1](before), original.steps[1](now))]
        close(modifier._drifts["steps.1.linear"], sum((a.double() - b).T @ b.double() for a, b in pairs))
        # The last call's output is that of the solved block, the first one's that of the block as it was.
        last = (original.steps[1](pairs[1][0]), model.steps[1](pairs[1][1]))
        close(modifier._drifts["steps.2.linear"], (last[0].double() - last[1]).T @ last[1].double())


def test_a_batch_that_takes_another_way_through_the_original_is_left_alone(caplog):
    original = tiny.seeded(lambda: Steps(Step(), Step(), Step()))
    ways = iter([True, *[True] * 3, *[False] * 3])  # dry run, compressed, original

    class Alternating(Steps):
        def forward(self, x):
            both = next(ways)
            x = self.steps[0](x)
            return self.steps[2](self.steps[1](x) if both else x)

    model, modifier = Alternating(*original.steps), watching()
    with caplog.at_level(logging.WARNING):
        tiny.compress(model, [modifier], rows())
    assert not any(drift.any() for drift in modifier._drifts.values())
    assert sum("another way" in r.getMessage() for r in caplog.records) == 1


class Experts(Step):
    """Each a module of its own, that gets only some rows: nothing says which."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        first = x[:, 0] > x[:, 1]
        out = torch.zeros_like(x)
        out[first], out[~first] = self.linear(x[first]), self.other(x[~first])
        return out


def test_rows_that_nothing_tells_apart_are_not_compared(caplog):
    model, modifier = tiny.seeded(lambda: Steps(Step(), Experts(), Step())), watching()
    with caplog.at_level(logging.WARNING):
        tiny.compress(model, [modifier], rows())
    drifted = {name for name, drift in modifier._drifts.items() if drift.any()}
    assert drifted == {"steps.2.linear"}
    assert sum("2 layers" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("all_experts", [True, False])
def test_experts_are_compared_on_the_tokens_that_both_models_send_them(family, all_experts, caplog):
    original = architectures.ARCHITECTURES[family].build()
    model, modifier = copy.deepcopy(original), watching(bits=3)
    calibration = tiny.data_of([padded(seed) for seed in range(3)])
    with caplog.at_level(logging.WARNING):
        tiny.compress(model, [modifier], calibration, moe_calibrate_all_experts=all_experts, moe_min_tokens=0)
    warned = sum("router" in r.getMessage() and "corrected" in r.getMessage() for r in caplog.records)
    assert warned == (not all_experts)
    mixed = copy.deepcopy(original)
    mixed.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    owner = "model.layers.1.mlp.experts"
    streams = [calls(each, owner, calibration) for each in (original, mixed)]
    for expert in range(fused_experts(original.get_submodule(owner)).count):
        expected = torch.zeros(())
        for (before, sent), (now, sent_now) in zip(*streams, strict=True):
            both = (sent == expert).any(1) & (sent_now == expert).any(1)
            both |= all_experts
            expected = expected + (before - now)[both].T @ now[both]
        close(modifier._drifts[f"{owner}.{expert}.gate_proj"], expected)


@torch.no_grad()
def calls(model, owner, calibration):
    """The real tokens that the experts of a module get in each batch, and to which experts they are sent."""
    found, masks = [], []

    def hook(_, args, kwargs):
        x, index, _ = [*args, *kwargs.values()]
        found.append((x.reshape(len(index), -1)[masks[-1]].double(), index[masks[-1]]))

    handle = model.get_submodule(owner).register_forward_pre_hook(hook, with_kwargs=True)
    with calibrating(model, all_experts=False):
        for batch in calibration.batches:
            masks.append(batch.kwargs["attention_mask"].bool().flatten())
            model(**batch.kwargs, use_cache=False)
    handle.remove()
    return found
