"""Paused forwards: the same bits as a plain forward, and nothing of one leaks into another."""

import gc
from contextlib import contextmanager
from contextvars import ContextVar

import pytest
import tiny
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitpress.models.blocks import Block, find_blocks
from bitpress.modifiers import State
from bitpress.pipelines import dry_run
from bitpress.pipelines.data import Batch
from bitpress.pipelines.paused import PausedForward, PausePoints


@pytest.fixture(autouse=True)
def _state_of_torch():
    """Whatever a test does, torch is afterwards as it was."""
    before = torch_state()
    yield
    assert torch_state() == before


def torch_state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_device(),
    )


def blocks_of(model):
    return find_blocks(model, tiny.linears(model))


def start(model, points, batches):
    forwards = [PausedForward(model, (), b) if isinstance(b, dict) else PausedForward(model, (b,), {}) for b in batches]
    for forward in forwards:
        forward.resume()
    return forwards


def interleave(model, batches):
    """Results of the paused forwards of all batches, with each block run for all of them in turn."""
    points = PausePoints(blocks_of(model))
    with points.installed():
        forwards = start(model, points, batches)
        while any(forward.at is not None for forward in forwards):
            for forward in forwards:
                if forward.at is not None:
                    forward.resume(points.run(forward.at, forward.waiting_for))
        for forward in forwards:
            forward.stop()
    return [forward.result for forward in forwards]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_a_plain_forward(family):
    model = tiny.FAMILIES[family]()
    batches = [
        tiny.without_cache(model, tiny.tokens(rows, length, rows))
        for rows, length in ((1, 7), (2, 24), (3, 12), (1, 1))
    ]
    batches[2]["attention_mask"][1, 8:] = 0
    plain = [model(**batch).logits for batch in batches]
    paused = interleave(model, batches)
    assert all(torch.equal(a, b.logits) for a, b in zip(plain, paused, strict=True))
    # And once more: nothing was left behind.
    assert all(torch.equal(a, model(**b).logits) for a, b in zip(plain, batches, strict=True))


def test_gradients_flow_as_they_do():
    model = tiny.llama()
    batch = tiny.without_cache(model, tiny.tokens())
    model(**batch).logits.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    interleave(model, [batch])[0].logits.sum().backward()
    assert all(torch.equal(expected[n], p.grad) for n, p in model.named_parameters())


class Layer(nn.Module):
    def __init__(self, log=None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.log = log

    def forward(self, x):
        if self.log is not None:
            self.log.append(torch_state())
        return self.linear(x).tanh()


class Stack(nn.Module):
    """Blocks that are called inside of a context, as a model's forward may do."""

    def __init__(self, within=None, depth=3, log=None):
        super().__init__()
        self.layers = nn.ModuleList(Layer(log) for _ in range(depth))
        self.within = within
        self.seen = []
        self.ended = 0

    def forward(self, x):
        try:
            if self.within is None:
                return self.run(x)
            with self.within():
                return self.run(x)
        finally:
            self.ended += 1

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            self.seen.append(torch_state())
        return x


def stack(**options):
    return tiny.seeded(lambda: Stack(**options))


def inputs(count=3):
    return [torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


class Marking(TorchFunctionMode):
    """Doubles every tanh."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 2 if function in (torch.tanh, torch.Tensor.tanh) else out


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Counting.calls += 1
        return function(*args, **(kwargs or {}))


CONTEXTS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "function mode": Marking,
    "dispatch mode": Counting,
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", CONTEXTS)
def test_state_stays_in_the_forward_that_set_it(name, outside):
    """Every other forward holds the context; the scheduler and the forwards between do not see it."""
    context = CONTEXTS[name]
    holding, bare = stack(within=context), stack()
    x = inputs(1)[0]
    with outside():
        before = torch_state()
        with context():
            held = torch_state()
        plain = [model(x) for model in (holding, bare)]
        expected = [list(model.seen) for model in (holding, bare)]
        assert expected == [[held] * 3, [before] * 3]
        holding.seen.clear()
        bare.seen.clear()
        models = [holding, bare, holding, bare]
        points = [PausePoints(blocks_of(model)) for model in (holding, bare)]
        with points[0].installed(), points[1].installed():
            forwards = [PausedForward(model, (x,), {}) for model in models]
            for forward in forwards:
                forward.resume()
                assert torch_state() == before
            for _ in range(3):
                for at, forward in enumerate(forwards):
                    output = points[at % 2].run(forward.at, forward.waiting_for)
                    assert torch_state() == before
                    forward.resume(output)
                    assert torch_state() == before
        assert all(forward.at is None for forward in forwards)
        assert holding.seen == [held] * 6
        assert bare.seen == [before] * 6
        for at, forward in enumerate(forwards):
            assert torch.equal(forward.result, plain[at % 2])


@pytest.mark.parametrize("name", ["autocast", "function mode", "device"])
def test_blocks_run_in_the_state_of_their_call(name):
    """What the model's forward wraps around its blocks is a part of the model."""
    log = []
    model = stack(within=CONTEXTS[name], log=log)
    x = inputs(1)[0]
    with torch.no_grad():
        plain = model(x)
        expected = list(log)
        log.clear()
        assert torch.equal(interleave(model, [x])[0], plain)
    assert log == expected


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("name", CONTEXTS)
def test_forwards_that_end_or_stop_in_any_order(name, order):
    model = stack(within=CONTEXTS[name])
    points = PausePoints(blocks_of(model))
    before = torch_state()
    with points.installed():
        forwards = start(model, points, inputs())
        for at in order:
            while at != 2 and forwards[at].at is not None:
                forwards[at].resume(points.run(forwards[at].at, forwards[at].waiting_for))
            forwards[at].stop()
            assert torch_state() == before
    assert model.ended == 3


def test_stop_runs_the_finally_clauses():
    model = stack(within=torch.no_grad)
    points = PausePoints(blocks_of(model))
    with points.installed():
        forward, other = start(model, points, inputs(2))
        assert model.ended == 0
        forward.stop()
        assert model.ended == 1
        assert forward.at is None
        forward.stop()
        assert model.ended == 1
        with pytest.raises(RuntimeError, match="not paused"):
            _ = forward.waiting_for
        # A forward that was never started has nothing to clean up.
        PausedForward(model, (inputs(1)[0],), {}).stop()
        assert model.ended == 1
        other.stop()
    assert model.ended == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_errors_of_the_model_come_through(error, call):
    class Failing(Stack):
        def run(self, x):
            for index, layer in enumerate(self.layers):
                if index == call and bool(x.sum() > 100):
                    raise error("from the model")
                x = layer(x) + 100 * bool(x.sum() > 100)
            return x

    model = tiny.seeded(lambda: Failing(torch.no_grad))
    forwards = [layer.forward for layer in model.layers]
    before = torch_state()
    points = PausePoints(blocks_of(model))
    good, bad = inputs(2)[0], inputs(2)[1] + 1000
    plain = model(good)

    def drive():
        with points.installed():
            started = [PausedForward(model, (x,), {}) for x in (good, bad)]
            try:
                for forward in started:
                    forward.resume()
                for _ in range(3):
                    for forward in started:
                        forward.resume(points.run(forward.at, forward.waiting_for))
            finally:
                for forward in started:
                    forward.stop()

    with pytest.raises(error, match="from the model"):
        drive()
    assert torch_state() == before
    assert [layer.forward for layer in model.layers] == forwards
    assert all("forward" not in vars(layer) for layer in model.layers)
    assert model.ended == 3
    assert torch.equal(model(good), plain)


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_block_that_fails_in_the_dry_run(name):
    model = stack(within=CONTEXTS[name])
    state = State(model, {}, {}, blocks_of(model))
    before = torch_state()

    def fail(_):
        raise ValueError("from the block")

    model.layers[1].linear.forward = fail
    with pytest.raises(ValueError, match="from the block") as caught:
        dry_run(state, Batch((inputs(1)[0],), {}))
    assert torch_state() == before
    # The finally clauses have run, though the traceback is still held.
    assert model.ended == 1
    assert all("forward" not in vars(layer) for layer in model.layers)
    del caught
    gc.collect()
    assert torch_state() == before


def test_forwards_are_exactly_as_before():
    model = stack()
    first = model.layers[0]
    special = first.forward

    def own(x):
        return special(x) + 1

    first.forward = own
    points = PausePoints(blocks_of(model))
    with points.installed():
        assert model.layers[0].forward is not own
        # Outside of a paused forward the model runs through.
        inside = model(inputs(1)[0])
    assert vars(first)["forward"] is own
    assert all("forward" not in vars(layer) for layer in model.layers[1:])
    assert model.layers[1].forward.__func__ is Layer.forward
    assert torch.equal(model(inputs(1)[0]), inside)


def test_hooks_of_a_block_run_once_per_forward():
    model = stack()
    calls = []
    layer = model.layers[1]
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("post"))
    interleave(model, inputs(2))
    assert sorted(calls) == ["post"] * 2 + ["pre"] * 2


def test_the_whole_model_may_be_the_block():
    model = tiny.MLP(4, 4, 4)
    x = inputs(1)[0]
    assert [b.name for b in blocks_of(model)] == [""]
    assert torch.equal(interleave(model, [x])[0], model(x))
    assert "forward" not in vars(model)


def test_dry_run_records_calls_in_their_order():
    class Twice(Stack):
        def run(self, x):
            for _ in range(2):
                for layer in self.layers[:2]:
                    x = layer(x)
            return x

    model = tiny.seeded(Twice)
    blocks = blocks_of(model)
    order = dry_run(State(model, {}, {}, blocks), Batch((inputs(1)[0],), {}))
    assert order == ["layers.0", "layers.1"] * 2
    assert [len(block.calls) for block in blocks] == [2, 2, 0]
    first, second = blocks[0].calls
    x = inputs(1)[0]
    assert torch.equal(first.args[0], x)
    assert torch.equal(second.args[0], model.layers[1](model.layers[0](x)))
    assert first.kwargs == {}


def test_arguments_are_handed_over_as_they_were_given():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(OddLayer() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x, state = layer(x, state={"n": 1}, flag=None)
                assert state == {"n": 2}
            return x

    class OddLayer(Layer):
        def forward(self, x, *, state, flag):
            return super().forward(x), {"n": state["n"] + 1}

    model = tiny.seeded(Odd)
    x = inputs(1)[0]
    points = PausePoints(blocks_of(model))
    with points.installed():
        (forward,) = start(model, points, [x])
        assert forward.waiting_for.args[0] is x
        assert forward.waiting_for.kwargs == {"state": {"n": 1}, "flag": None}
        forward.stop()
    assert torch.equal(interleave(model, [x])[0], model(x))


def test_context_variables_are_those_of_the_caller():
    variable = ContextVar("variable", default=0)

    class Reading(Stack):
        def run(self, x):
            x = x + variable.get()
            variable.set(variable.get() + 1)
            return super().run(x) + variable.get()

    model = tiny.seeded(Reading)
    token = variable.set(5)
    x = inputs(1)[0]
    try:
        paused = interleave(model, [x, x])
        assert variable.get() == 5
        assert all(torch.equal(p, model.layers[2](model.layers[1](model.layers[0](x + 5))) + 6) for p in paused)
    finally:
        variable.reset(token)


def test_a_forward_within_a_forward():
    """A model that is calibrated by a model: the inner pauses are handed to the inner scheduler."""
    inner = stack()

    class Outer(Stack):
        def run(self, x):
            return super().run(interleave(inner, [x])[0])

    outer = tiny.seeded(Outer)
    x = inputs(1)[0]
    with_pauses = interleave(outer, [x])[0]
    assert torch.equal(with_pauses, outer(x))


def test_generators_and_contexts_of_the_model_survive():
    @contextmanager
    def doubled():
        yield 2

    class Lazy(Stack):
        def run(self, x):
            for layer in (each for each in self.layers):
                with doubled() as factor:
                    x = layer(x) * factor
            return x

    model = tiny.seeded(Lazy)
    for paused, x in zip(interleave(model, inputs()), inputs(), strict=True):
        assert torch.equal(paused, model(x))


def test_block_labels():
    assert Block("", nn.ReLU(), {}).label == "the model"
    assert Block("a.b", nn.ReLU(), {}).label == "a.b"
