"""The collector: each distinct input once, nothing left behind."""

import logging

import pytest
import torch
from torch import nn

from bitpress.errors import BitpressError
from bitpress.pipelines.solving import is_held_out
from bitpress.statistics import InputCollector, Statistic

BOTH = Statistic.GRAM | Statistic.MEAN_MAGNITUDE
WIDTH = 6


class Layers(nn.Module):
    """Named linear layers, run by a function that each test gives."""

    def __init__(self, *names, run=None):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, 3, bias=False))
        self.run = run or (lambda model, x: [layer(x) for layer in model.children()])

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def collector_of(model, wanted=BOTH):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    asked = wanted if isinstance(wanted, dict) else dict.fromkeys(layers, wanted)
    return InputCollector(layers, dict.fromkeys(layers, WIDTH), asked)


def inputs(*shape, seed=0):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def collect(model, *runs, collector=None):
    collector = collector or collector_of(model)
    with collector.watching():
        for index, run in enumerate(runs):
            with collector.batch(index):
                model(*run) if isinstance(run, tuple) else model(run)
    return collector.statistics


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def assert_collected(statistics, *tensors):
    x = torch.cat([t.reshape(-1, WIDTH) for t in tensors]).float()
    assert statistics.rows == len(x)
    torch.testing.assert_close(statistics.gram, x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.mean_magnitude, x.abs().mean(0), rtol=1e-5, atol=1e-6)


class TestSharing:
    def test_layers_that_get_one_tensor_share_one_object_and_count_it_once(self):
        x = [inputs(2, 5, seed=seed) for seed in range(3)]
        found = collect(Layers("q", "k", "v"), *x)
        assert found["q"] is found["k"] is found["v"]
        assert_collected(found["q"], *x)

    def test_layers_that_get_different_tensors_do_not(self):
        x, y = inputs(2, 5), inputs(2, 5, seed=1)
        found = collect(Layers("a", "b", run=lambda m, x, y: (m.a(x), m.b(y))), (x, y), (y, x))
        assert found["a"] is not found["b"]
        assert_collected(found["a"], x, y)
        assert_collected(found["b"], y, x)

    def test_equal_values_in_another_tensor_are_another_input(self):
        x = inputs(4)
        found = collect(Layers("a", "b", run=lambda m, x: (m.a(x), m.b(x.clone()))), x)
        assert found["a"] is not found["b"]

    def test_tensors_that_die_in_between_are_not_mistaken_for_one(self):
        """The second would be given the address of the first."""

        def run(model, x):
            for index, layer in enumerate(model.children()):
                layer(x + index)

        x = inputs(64)
        model = Layers("a", "b", "c", run=run)
        with torch.no_grad():
            found = collect(model, x, x)
        for index, name in enumerate("abc"):
            assert_collected(found[name], x + index, x + index)

    def test_a_change_in_place_is_another_input(self):
        def run(model, x):
            x = x.clone()
            model.a(x)
            x.mul_(3)
            model.b(x)

        x = inputs(4)
        found = collect(Layers("a", "b", run=run), x, x)
        assert_collected(found["a"], x, x)
        assert_collected(found["b"], 3 * x, 3 * x)

    def test_different_wishes_are_kept_apart(self):
        model = Layers("a", "b")
        found = collect(model, inputs(4), collector=collector_of(model, {"a": Statistic.GRAM, "b": BOTH}))
        assert found["a"] is not found["b"]
        assert found["a"].wanted == Statistic.GRAM
        assert found["b"].mean_magnitude.shape == (WIDTH,)

    @pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
    def test_any_of_the_layers_may_run_first(self, order):
        orders = iter([("a", "b"), order, ("a", "b")])
        x = [inputs(4, seed=seed) for seed in range(3)]
        found = collect(Layers("a", "b", run=lambda m, x: [getattr(m, n)(x) for n in next(orders)]), *x)
        assert found["a"] is found["b"]
        assert_collected(found["a"], *x)

    def test_a_layer_that_stops_sharing_gets_its_own_with_a_warning(self, caplog):
        apart = iter([False, True, True])

        def run(model, x, y):
            model.a(x)
            model.b(y if next(apart) else x)

        x, y = [inputs(4, seed=seed) for seed in range(3)], [inputs(4, seed=seed) for seed in range(3, 6)]
        model = Layers("a", "b", run=run)
        collector = collector_of(model)
        with caplog.at_level(logging.WARNING), collector.watching():
            for index in range(2):
                with collector.batch(index):
                    model(x[index], y[index])
            found = collector.statistics
            assert found["a"] is not found["b"]
            assert_collected(found["a"], x[0], x[1])
            before = found["b"].clone()
            with collector.batch(2):
                model(x[2], y[2])
        assert [record.getMessage() for record in caplog.records] == [
            "b no longer shares its input with the layers it shared it with before: it has statistics of its own "
            "from here on, and nothing needs to be done."
        ]
        assert_collected(found["a"], *x)
        torch.testing.assert_close(found["b"].gram - before.gram, y[2].T @ y[2], rtol=1e-4, atol=1e-4)

    def test_a_layer_that_runs_later_is_not_credited_with_what_it_did_not_see(self):
        """An expert that the first batches did not reach."""
        present = iter([("a",), ("a", "b"), ("a", "b")])
        x = [inputs(4, seed=seed) for seed in range(3)]
        found = collect(Layers("a", "b", run=lambda m, x: [getattr(m, n)(x) for n in next(present)]), *x)
        assert_collected(found["a"], *x)
        assert_collected(found["b"], *x[1:])

    def test_shared_layers_called_twice_in_a_run_share_both_calls(self):
        x = [inputs(4, seed=seed) for seed in range(4)]
        found = collect(
            Layers("a", "b", run=lambda m, *xs: [layer(x) for x in xs for layer in m.children()]),
            tuple(x[:2]),
            (x[2], x[3]),
        )
        assert found["a"] is found["b"]
        assert_collected(found["a"], *x)


class TestHeldOut:
    def test_batches_count_apart_with_padding_and_sharing(self):
        x, mask = inputs(2, 3), torch.tensor([[True, True, False], [True, False, False]])
        model = Layers("a", "b")
        collector = collector_of(model, Statistic.HELD_OUT | BOTH)
        with collector.watching():
            for index, held_out in enumerate([False, True, False]):
                with collector.batch(index, mask, held_out=held_out):
                    model(x * (index + 1))
        found = collector.statistics["a"]
        assert found is collector.statistics["b"]
        assert_collected(found, x[mask], 2 * x[mask], 3 * x[mask])
        assert found.held_out_rows == 3
        torch.testing.assert_close(found.held_out_gram, 4 * x[mask].T @ x[mask])

    @pytest.mark.parametrize("batches", range(1, 40))
    def test_about_one_batch_in_eight_judges_and_never_all(self, batches):
        held_out = sum(is_held_out(index, batches) for index in range(batches))
        assert held_out == (max(1, batches // 8) if batches > 1 else 0)


class TestPadding:
    MASK = torch.tensor([[True, True, False], [True, False, False]])

    @pytest.mark.parametrize("flat", [False, True])
    def test_padded_positions_do_not_count(self, flat):
        x = inputs(2, 3)
        x[~self.MASK] = float("nan")
        model = Layers("a", "b")
        collector = collector_of(model)
        with collector.watching(), collector.batch(0, self.MASK):
            model(x.flatten(0, 1) if flat else x)
        assert collector.statistics["a"] is collector.statistics["b"]
        assert_collected(collector.statistics["a"], x[self.MASK])

    def test_heads_behind_the_positions_are_kept_whole(self):
        x = inputs(2, 3, 4)
        model = Layers("a")
        collector = collector_of(model)
        with collector.watching(), collector.batch(0, self.MASK):
            model(x)
        assert_collected(collector.statistics["a"], x[self.MASK])

    def test_inputs_of_another_shape_count_in_full(self):
        x = inputs(5)
        model = Layers("a")
        collector = collector_of(model)
        with collector.watching(), collector.batch(0, self.MASK):
            model(x)
        assert_collected(collector.statistics["a"], x)

    def test_a_mask_is_of_its_batch_only(self):
        x = inputs(2, 3)
        model = Layers("a")
        collector = collector_of(model)
        with collector.watching():
            with collector.batch(0, self.MASK):
                model(x)
            with collector.batch(1):
                model(x)
        assert_collected(collector.statistics["a"], x[self.MASK], x)


class TestHooks:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("wanted", [Statistic.GRAM, Statistic.MEAN_MAGNITUDE, BOTH])
    def test_bad_input_names_the_layer_and_the_batch_and_leaves_no_hook(self, bad, wanted):
        model = nn.ModuleDict({"mlp": Layers("up", "down", run=lambda m, x, y: (m.up(x), m.down(y)))})
        y = inputs(4)
        y[2, 3] = bad
        collector = collector_of(model, wanted)
        with (
            pytest.raises(BitpressError, match=r"mlp\.down .*batch 7"),
            collector.watching(),
            collector.batch(7),
        ):
            model["mlp"](inputs(4), y)
        assert hooks_of(model) == 0

    def test_are_gone_after_any_exception(self):
        model = Layers("a", "b")
        with pytest.raises(ZeroDivisionError), collector_of(model).watching():
            _ = 1 / 0
        assert hooks_of(model) == 0

    def test_are_gone_after_collecting_and_what_was_collected_stays(self):
        model = Layers("a")
        x = inputs(4)
        found = collect(model, x)
        assert hooks_of(model) == 0
        model(x)
        assert_collected(found["a"], x)

    def test_layers_of_which_nothing_is_wanted_are_not_hooked(self):
        model = Layers("a", "b")
        collector = collector_of(model, {"a": Statistic.NONE, "b": BOTH})
        assert collector.wants_any
        with collector.watching(), collector.batch(0):
            assert not model.a._forward_pre_hooks
            model(inputs(4))
        assert set(collector.statistics) == {"b"}
        assert not collector_of(model, Statistic.NONE).wants_any

    def test_layers_that_never_run_have_no_statistics(self):
        assert set(collect(Layers("a", "b", run=lambda m, x: m.a(x)), inputs(4))) == {"a"}

    def test_the_output_of_the_model_is_untouched(self):
        model = Layers("a", "b")
        x = inputs(4)
        expected = model(x)
        collector = collector_of(model)
        with collector.watching(), collector.batch(0):
            assert all(torch.equal(*pair) for pair in zip(model(x), expected, strict=True))

    def test_input_by_keyword(self):
        x = inputs(4)
        found = collect(Layers("a", "b", run=lambda m, x: (m.a(input=x), m.b(x))), x)
        assert found["a"] is found["b"]
        assert_collected(found["a"], x)

    def test_a_layer_called_twice_in_a_run_counts_both_inputs(self):
        x, y = inputs(4), inputs(3, seed=1)
        found = collect(Layers("a", run=lambda m, x, y: (m.a(x), m.a(y))), (x, y), (x, y))
        assert_collected(found["a"], x, y, x, y)

    def test_collecting_goes_on_when_watched_again(self):
        model = Layers("a", "b")
        collector = collector_of(model)
        x, y = inputs(4), inputs(4, seed=1)
        collect(model, x, collector=collector)
        collect(model, y, collector=collector)
        assert_collected(collector.statistics["a"], x, y)
        assert collector.statistics["a"] is collector.statistics["b"]
