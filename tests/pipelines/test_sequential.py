"""The pipelines: what each block sees, what it becomes, and that a failure changes nothing."""

import logging

import pytest
import tiny
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.linears import as_parameter, weight_matrix
from bitpress.modifiers import AWQMapping, AWQModifier, Modifier, QuantizationModifier, smoothing
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.session import Session
from bitpress.solvers import round_to_nearest
from bitpress.statistics import Statistic

ARGS = QuantizationArgs(num_bits=3, symmetric=False, group_size=32)


def scheme(*targets):
    return QuantizationScheme(targets=list(targets) or ["Linear"], weights=ARGS)


class Watching(QuantizationModifier):
    """Round-to-nearest that asks for everything and keeps what it is shown."""

    _grams: dict[str, tuple[int, Tensor]] = PrivateAttr(default_factory=dict)
    _order: list[str] = PrivateAttr(default_factory=list)

    def required_statistics(self, state, name):
        return Statistic.GRAM | Statistic.MEAN_MAGNITUDE

    def on_block(self, state, block):
        self._order.append(block.name)
        self._grams.update({n: (s.rows, s.gram.clone()) for n, s in state.statistics.items() if n in block.layers})
        super().on_block(state, block)


class WithGram(Watching):
    """A solver whose result depends on every bit of the statistics."""

    def solve(self, weight, args, statistics, ranges, global_scale=None):
        if statistics is None:
            return super().solve(weight, args, statistics, ranges, global_scale)
        return super().solve(by_gram(weight, statistics.gram), args, statistics, ranges, global_scale)


def by_gram(weight, gram):
    share = gram.diagonal() / gram.diagonal().sum()
    return weight * (1 + share)


def by_hand(model, batches):
    """Block by block, and within one from what the blocks before it, already quantized, give."""
    model = tiny.copy.deepcopy(model)
    grams = {}
    with torch.no_grad():
        states = [model.model.embed_tokens(b["input_ids"]) for b in batches]
        positions = [torch.arange(x.shape[1]).unsqueeze(0) for x in states]
        rotations = [model.model.rotary_emb(x, position_ids=p) for x, p in zip(states, positions, strict=True)]
        for index, layer in enumerate(model.model.layers):
            sums = {}
            handles = []
            for name, linear in tiny.linears(layer).items():

                def add(_, args, name=name, sums=sums):
                    x = args[0].reshape(-1, args[0].shape[-1])
                    sums[name] = sums.get(name, 0) + x.T @ x

                handles.append(linear.register_forward_pre_hook(add))
            run = [
                lambda layer=layer, x=x, r=r, p=p: layer(x, position_embeddings=r, position_ids=p, attention_mask=None)
                for x, r, p in zip(states, rotations, positions, strict=True)
            ]
            for each in run:
                each()
            for handle in handles:
                handle.remove()
            for name, linear in tiny.linears(layer).items():
                weight = by_gram(linear.weight, sums[name])
                linear.weight.copy_(round_to_nearest(weight, ARGS, weight.dtype).dequantize())
                grams[f"model.layers.{index}.{name}"] = sums[name]
            states = [each() for each in run]
    return model, grams


@pytest.fixture(scope="module")
def data():
    return tiny.token_data(4, rows=2)


def test_each_block_sees_what_the_quantized_ones_before_it_give(data):
    model = tiny.llama(num_hidden_layers=3)
    expected, grams = by_hand(model, [b.kwargs for b in data.batches])
    modifier = WithGram(scheme=scheme(), ignore=["lm_head"])
    session = tiny.compress(model, [modifier], data)
    assert session.pipeline == "sequential"
    assert modifier._order == [f"model.layers.{i}" for i in range(3)]
    for name, (rows, gram) in modifier._grams.items():
        assert rows == 4 * 2 * 24
        torch.testing.assert_close(gram, grams[name], rtol=1e-5, atol=1e-4)
    assert set(modifier._grams) == set(grams)
    assert {n: tiny.same_bits(v, model.state_dict()[n]) for n, v in expected.state_dict().items()} == dict.fromkeys(
        expected.state_dict(), True
    )


def test_head_is_solved_last_on_what_the_quantized_model_gives(data):
    model = tiny.llama()
    modifier = Watching(scheme=scheme())
    tiny.compress(model, [modifier], data)
    assert modifier._order[-1] == "lm_head"
    with torch.no_grad():
        states = [model.model(**b.kwargs).last_hidden_state.reshape(-1, tiny.WIDTH) for b in data.batches]
    expected = sum(x.T @ x for x in states)
    torch.testing.assert_close(modifier._grams["lm_head"][1], expected, rtol=1e-5, atol=1e-3)


def test_basic_sees_what_the_unquantized_model_gives(data):
    grams, weights = {}, {}
    for pipeline in ("sequential", "basic"):
        model = tiny.llama()
        modifier = WithGram(scheme=scheme(), ignore=["lm_head"])
        session = tiny.compress(model, [modifier], data, pipeline=pipeline)
        assert session.pipeline == pipeline
        grams[pipeline], weights[pipeline] = modifier._grams, tiny.snapshot(model)
    first = [n for n in weights["basic"] if n.startswith("model.layers.0")]
    assert all(torch.equal(weights["basic"][n], weights["sequential"][n]) for n in first)
    assert all(torch.equal(grams["basic"][n][1], g) for n, (_, g) in grams["sequential"].items() if ".0." in n)
    assert not torch.equal(grams["basic"]["model.layers.1.mlp.up_proj"][1],
                           grams["sequential"]["model.layers.1.mlp.up_proj"][1])  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_without_data_it_is_round_to_nearest_of_each_layer(family):
    model = tiny.FAMILIES[family]()
    expected = tiny.snapshot(model)
    targets = ["re:.*(layers?|h)\\.\\d+\\..*"]
    session = tiny.compress(model, [QuantizationModifier(scheme=scheme(*targets))])
    assert session.pipeline == "datafree"
    assert len(session.state.schemes) >= 8
    for name in session.state.schemes:
        layer = model.get_submodule(name)
        matrix = expected[f"{name}.weight"].T if family == "gpt2" else expected[f"{name}.weight"]
        expected[f"{name}.weight"] = as_parameter(layer, round_to_nearest(matrix, ARGS, matrix.dtype).dequantize())
    tiny.assert_unchanged(model, expected)


def test_data_makes_no_difference_to_what_needs_none(data):
    weights = []
    for options in ({}, {"data": data}, {"data": data, "pipeline": "sequential"}, {"data": data, "pipeline": "basic"}):
        model = tiny.llama()
        tiny.compress(model, [QuantizationModifier(scheme=scheme())], **options)
        weights.append(tiny.snapshot(model))
    for other in weights[1:]:
        assert all(torch.equal(weights[0][n], v) for n, v in other.items())


def test_padding_is_left_out():
    padded = tiny.tokens(2, 24, 7)
    padded["attention_mask"][0, 10:] = 0
    short = {key: value[:1, :10] for key, value in padded.items()}
    full = {key: value[1:] for key, value in padded.items()}
    found = []
    for batches in ([padded], [short, full]):
        modifier = Watching(scheme=scheme(), ignore=["lm_head"])
        tiny.compress(tiny.llama(), [modifier], tiny.data_of(batches))
        found.append(modifier._grams)
    for name, (rows, gram) in found[0].items():
        assert rows == found[1][name][0] == 34
        torch.testing.assert_close(gram, found[1][name][1], rtol=1e-4, atol=1e-3)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Looped(nn.Module):
    """Runs its layers as often as ``ways`` says for an input, in that order."""

    def __init__(self, ways, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.ways = ways

    def forward(self, x):
        for index in self.ways(x):
            x = self.layers[index](x)
        return x


def rows(*seeds):
    return [torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def looped_by_hand(model, batches, solve_at):
    """Follow ``solve_at``: (layer, is its last call) pairs, all batches running all of them."""
    model = tiny.copy.deepcopy(model)
    grams = {}
    with torch.no_grad():
        for index, last in solve_at:
            layer = model.layers[index]
            grams[index] = grams.get(index, 0) + sum(x.T @ x for x in batches)
            if last:
                weight = by_gram(layer.linear.weight, grams[index])
                layer.linear.weight.copy_(round_to_nearest(weight, ARGS, weight.dtype).dequantize())
            batches = [layer(x) for x in batches]
    return model, grams


def test_a_block_that_is_called_twice_pools_its_calls_and_is_solved_at_the_last():
    model = tiny.seeded(lambda: Looped(lambda _: [0, 1, 0, 1, 2, 0]))
    batches = rows(1, 2, 3)
    steps = [(0, False), (1, False), (0, False), (1, True), (2, True), (0, True)]
    expected, grams = looped_by_hand(model, batches, steps)
    modifier = WithGram(scheme=scheme())
    tiny.compress(model, [modifier], tiny.data_of(batches))
    assert modifier._order == ["layers.1", "layers.2", "layers.0"]
    for index, calls in ((0, 3), (1, 2), (2, 1)):
        count, gram = modifier._grams[f"layers.{index}.linear"]
        assert count == calls * 3 * 8
        torch.testing.assert_close(gram, grams[index], rtol=1e-5, atol=1e-4)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def short(x):
    """A batch that is marked takes the short way."""
    return bool(x[0, 0] > 50)


def marked(*seeds):
    made = rows(*seeds)
    for x in made:
        x[0, 0] = 100.0
    return made


@pytest.mark.parametrize("first", ["long", "short"])
def test_batches_that_take_different_ways(first, caplog):
    """The dry run sees the way of the first batch only."""
    model = tiny.seeded(lambda: Looped(lambda x: [0, 2] if short(x) else [0, 1, 2]))
    batches = [*rows(1), *marked(2), *rows(3)] if first == "long" else [*marked(2), *rows(1, 3)]
    modifier = WithGram(scheme=scheme())
    tiny.compress(model, [modifier], tiny.data_of(batches))
    assert modifier._order == ["layers.0", "layers.1", "layers.2"]
    assert {name: count for name, (count, _) in modifier._grams.items()} == {
        "layers.0.linear": 24,
        "layers.1.linear": 16,
        "layers.2.linear": 24,
    }
    # The last layer saw what the quantized ones before it give.
    with torch.no_grad():
        last = [model.layers[0](x) for x in batches]
        last = [x if short(b) else model.layers[1](x) for x, b in zip(last, batches, strict=True)]
    torch.testing.assert_close(modifier._grams["layers.2.linear"][1], sum(x.T @ x for x in last), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("first", ["often", "once"])
def test_batches_that_loop_more_or_less_often(first):
    model = tiny.seeded(lambda: Looped(lambda x: [0, 1, 2] if short(x) else [0, 1, 0, 1, 2]))
    batches = [*rows(1), *marked(2)] if first == "often" else [*marked(2), *rows(1)]
    modifier = Watching(scheme=scheme())
    tiny.compress(model, [modifier], tiny.data_of(batches))
    counts = {name: count for name, (count, _) in modifier._grams.items()}
    # No batch is lost on its way to the last layer.
    assert counts["layers.2.linear"] == 16
    assert set(modifier._order) == {"layers.0", "layers.1", "layers.2"}
    assert len(modifier._order) == 3


def test_a_block_that_never_runs_is_quantized_without_data(caplog):
    model = tiny.seeded(lambda: Looped(lambda _: [0, 2]))
    before = model.layers[1].linear.weight.clone()
    modifier = WithGram(scheme=scheme())
    with caplog.at_level(logging.WARNING):
        tiny.compress(model, [modifier], tiny.data_of(rows(1, 2)))
    assert "layers.1 did not run in the dry run" in caplog.text
    assert "layers.1.linear" not in modifier._grams
    assert torch.equal(model.layers[1].linear.weight, round_to_nearest(before, ARGS, before.dtype).dequantize())


def failing(model, data, match, error, modifiers=None, **options):
    """The message; the model is bit for bit as it was, its forwards and modes too."""
    before = tiny.snapshot(model)
    forwards = {n: vars(m).get("forward") for n, m in model.named_modules()}
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    with pytest.raises(error, match=match) as caught:
        tiny.compress(model, modifiers or [Watching(scheme=scheme(), ignore=["lm_head"])], data, **options)
    tiny.assert_unchanged(model, before)
    assert {n: vars(m).get("forward") for n, m in model.named_modules()} == forwards
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: len(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks
    assert torch.is_grad_enabled()
    assert not any(hasattr(m, "quantization_scheme") for m in model.modules())
    return str(caught.value)


class Stopping(Watching):
    """Is interrupted after it has written to the second block."""

    error: type[BaseException] = ValueError

    def on_block(self, state, block):
        super().on_block(state, block)
        if len(self._order) == 2:
            raise self.error("in the second block")


@pytest.mark.parametrize("pipeline", ["sequential", "basic", "datafree"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, BitpressError])
def test_an_interrupt_in_the_second_block_changes_nothing(pipeline, error, data):
    class Unasking(Stopping):
        def required_statistics(self, state, name):
            return Statistic.NONE if pipeline == "datafree" else Statistic.GRAM

    modifier = Unasking(scheme=scheme(), error=error)
    model = tiny.llama()
    model.model.layers[1].train()
    failing(model, data, "in the second block", error, [modifier], pipeline=pipeline)
    # And nothing keeps the model from being compressed now.
    tiny.compress(model, [Watching(scheme=scheme())], data)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_while_smoothing_changes_nothing(error, data, monkeypatch):
    calls = iter(range(100))

    def apply(state, mapping, scales):
        smoothing.apply(state, mapping, scales)
        if next(calls) == 5:
            raise error("half-way")

    monkeypatch.setattr("bitpress.modifiers.awq.apply", apply)
    failing(tiny.llama(), data, "half-way", error, [AWQModifier(scheme=scheme(), ignore=["lm_head"])])


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_nan_in_a_batch_names_layer_and_batch(pipeline):
    model = tiny.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[99] = float("nan")
    batches = [tiny.tokens(1, 8, seed) for seed in range(3)]
    for index, batch in enumerate(batches):
        batch["input_ids"].clamp_(max=98)
        batch["input_ids"][0, 3] = 99 if index == 1 else 5
    message = failing(model, tiny.data_of(batches), "NaN or infinite", BitpressError, pipeline=pipeline)
    assert "model.layers.0.self_attn.q_proj" in message
    assert "calibration batch 1." in message


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_modes_of_modules_are_restored(pipeline, data):
    model = tiny.llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    seen = []

    class Looking(Watching):
        def on_block(self, state, block):
            seen.append((any(m.training for m in state.model.modules()), torch.is_grad_enabled()))
            super().on_block(state, block)

    tiny.compress(model, [Looking(scheme=scheme())], data, pipeline=pipeline)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert seen == [(False, False)] * 3
    quantized = {f"{n}.weight" for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == quantized
    other = tiny.llama(attention_dropout=0.5)
    tiny.compress(other, [Watching(scheme=scheme())], data, pipeline=pipeline)
    tiny.assert_unchanged(other, tiny.snapshot(model))


class Doubling(Modifier):
    """A modifier of a user: it doubles the first linear layer of each block, and counts its events."""

    factor: float = 2.0
    _events: list[str] = PrivateAttr(default_factory=list)

    def on_initialize(self, state):
        self._events.append("initialize")

    def required_statistics(self, state, name):
        return Statistic.MAX_MAGNITUDE

    def on_block(self, state, block):
        assert all(s.max_magnitude.max() > 0 for s in state.statistics.values())
        assert set(state.statistics) == set(block.layers)
        layer = next(iter(block.layers.values()))
        weight_matrix(layer).mul_(self.factor)
        self._events.append(block.name)

    def on_finalize(self, state):
        self._events.append("finalize")


def test_a_modifier_of_the_user(data):
    assert Modifier.known["Doubling"] is Doubling
    with pytest.raises(BitpressError, match="did you mean 'factor'"):
        Doubling(facter=3)
    model, plain = tiny.llama(), tiny.llama()
    modifier = Doubling(factor=4.0)
    session = Session(model, [modifier, QuantizationModifier(scheme=scheme(), ignore=["lm_head"])])
    session.check()
    before = tiny.snapshot(model)
    session.initialize(data)
    session.run()
    tiny.assert_unchanged(model, before)
    session.finalize()
    assert modifier._events == ["initialize", "model.layers.0", "model.layers.1", "finalize"]
    tiny.compress(plain, [QuantizationModifier(scheme=scheme(), ignore=["lm_head"])], data)
    after, expected = model.state_dict(), plain.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value * (4 if "q_proj" in name else 1), rtol=1e-6, atol=0)


def test_progress_counts_blocks(data):
    session = Session(tiny.llama(), [Watching(scheme=scheme())])
    session.check()
    session.initialize(data)
    told = []
    session.run(told.append)
    assert [(p.block, p.phase) for p in told] == [
        (block, phase)
        for block in ("model.layers.0", "model.layers.1", "lm_head")
        for phase in ("calibrate", "solve", "Watching", *(["propagate"] if block != "lm_head" else []), "write")
    ]
    assert [p.done for p in told] == [0] * 5 + [1] * 5 + [2] * 4
    assert {p.total for p in told} == {3}


def test_awq_in_a_block_that_the_dry_run_did_not_see(caplog):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Linear(32, 32)
            self.down_proj = nn.Linear(32, 32)

        def forward(self, x):
            return x + self.down_proj(self.up_proj(x).relu())

    def build():
        model = Looped(lambda x: [0, 2] if short(x) else [0, 1, 2])
        model.layers = nn.ModuleList(Pair() for _ in range(3))
        return model

    model = tiny.seeded(build)
    modifier = AWQModifier(scheme=scheme(), mappings=[AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])])
    with caplog.at_level(logging.WARNING):
        session = tiny.compress(model, [modifier], tiny.data_of([*marked(1), *rows(2, 3)]))
    assert [r["smooth_layer"] for r in session.state.mapping_records] == ["layers.0.up_proj", "layers.2.up_proj"]
    assert "layers.1.down_proj did not run in the dry run" in caplog.text


def test_forwards_of_any_signature():
    class Signature(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x, scale, *, offset):
            for layer in self.layers:
                x = layer(x * scale) + offset
            return {"out": [x]}

    model = tiny.seeded(Signature)
    batches = [Batch((x, 0.5), {"offset": torch.ones(32)}) for x in rows(1, 2)]
    modifier = Watching(scheme=scheme())
    tiny.compress(model, [modifier], CalibrationData(batches, 2, 2, sliceable=False))
    with torch.no_grad():
        second = [model.layers[0](b.args[0] * 0.5) * 0.5 + 0.5 for b in batches]
    torch.testing.assert_close(modifier._grams["layers.1.linear"][1], sum(x.T @ x for x in second))


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("within", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradient_modes_of_the_model_do_not_reach_the_solvers(within, pipeline):
    class Held(Looped):
        def forward(self, x):
            with within():
                return super().forward(x)

    weights = []
    for kind in (Looped, Held):
        model = tiny.seeded(lambda kind=kind: kind(lambda _: [0, 1, 2]))
        tiny.compress(model, [WithGram(scheme=scheme())], tiny.data_of(rows(1, 2)), pipeline=pipeline)
        weights.append(tiny.snapshot(model))
    assert all(torch.equal(weights[1][n], v) for n, v in weights[0].items())
