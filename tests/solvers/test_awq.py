"""AWQ's search: its errors are those of the outputs, and its winner is as good as an exhaustive search's."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.solvers import BalanceWeight, awq, round_to_nearest, search_scales
from bitpress.solvers.awq import candidate_scales

STRATEGIES = ("tensor", "channel", "group")


def int_args(bits=4, symmetric=False, strategy="group", group_size=16):
    size = group_size if strategy == "group" else None
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=size)


def activations(rows, columns, seed=0):
    """Correlated, with channels of different magnitudes and a few outliers, as models have."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, columns // 4)
    x = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) / rank**0.5
    x = x + torch.randn(rows, columns, generator=generator) / 2
    magnitude = torch.exp(torch.randn(columns, generator=generator) / 2)
    outliers = torch.randperm(columns, generator=generator)[: max(1, columns // 50)]
    magnitude[outliers] *= 20
    return x * magnitude


def weight_of(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    of_column = torch.exp(torch.randn(columns, generator=generator) / 3)
    return torch.randn(rows, columns, generator=generator) * of_column * 0.05


def statistics_of(x):
    return x.T @ x, x.abs().mean(0)


def search(layers, x, **options):
    return search_scales(layers, *statistics_of(x), **options)


def output_error(layers, x, scales):
    """``||X (Q(W s) / s - W)^T||^2`` in float64, from the activations themselves."""
    total = 0.0
    for layer in layers:
        quantized = round_to_nearest(layer.weight.float() * scales, layer.args, layer.dtype)
        # The grid as it is stored, its points not rounded to the weight's dtype.
        points = replace(quantized, scale=quantized.scale.float()).dequantize().double()
        delta = points / scales.double() - layer.weight.double()
        total += float((x.double() @ delta.T).square().sum())
    return total


def pooled(per_input, channel_map):
    return torch.stack([per_input[channel_map == channel].mean() for channel in range(int(channel_map.max()) + 1)])


def candidates(layers, x, channel_map=None, n_grid=20, duo_scaling=True):
    """All scales that the search may choose from, computed from the paper's quantities one by one."""
    columns = x.shape[1]
    channel_map = torch.arange(columns) if channel_map is None else channel_map
    magnitude = pooled(x.abs().mean(0), channel_map)
    magnitude = magnitude.clamp(min=awq.LEAST_MAGNITUDE * float(magnitude.mean()))
    relative = []
    for layer in layers:
        size = layer.args.group_size if layer.args.strategy == "group" else columns
        view = layer.weight.float().abs().unflatten(1, (-1, size))
        relative.append((view / view.amax(-1, keepdim=True)).flatten(1))
    weight_magnitude = pooled(torch.cat(relative).mean(0), channel_map)
    return candidate_scales(magnitude, weight_magnitude, n_grid, duo_scaling)[2][:, channel_map]


def least_error(layers, x, **options):
    return min(output_error(layers, x, scales) for scales in candidates(layers, x, **options))


def assert_usable(scales):
    assert scales.dtype == torch.float32
    assert bool((scales.isfinite() & (scales > 0)).all())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [24, 160])
def test_errors_are_those_of_the_outputs(strategy, symmetric, rows):
    layers = [BalanceWeight(weight_of(rows, 64), int_args(4, symmetric, strategy), torch.bfloat16)]
    x = activations(200, 64)
    found = search(layers, x)
    assert found.error == pytest.approx(output_error(layers, x, found.scales), rel=1e-3)
    assert found.error_before == pytest.approx(output_error(layers, x, torch.ones(64)), rel=1e-3)
    assert found.error <= found.error_before
    assert_usable(found.scales)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_few_rows_have_the_best_candidate(strategy, duo_scaling):
    """All rows are in one round, so that nothing is left to chance."""
    layers = [BalanceWeight(weight_of(40, 64, seed=1), int_args(3, strategy=strategy), torch.float32)]
    x = activations(200, 64, seed=1)
    found = search(layers, x, duo_scaling=duo_scaling)
    best = least_error(layers, x, duo_scaling=duo_scaling)
    assert output_error(layers, x, found.scales) <= best * (1 + 1e-4)
    assert best < found.error_before * 0.9, "the problem is one where scales help"


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (512, 64), (256, 256), (1024, 128)])
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_many_rows_have_a_candidate_almost_as_good_as_the_best(rows, columns, strategy):
    """The race sees most candidates on some rows only: it may lose a little of what the best one gains."""
    for seed in range(2):
        layers = [BalanceWeight(weight_of(rows, columns, seed), int_args(4, strategy=strategy), torch.float32)]
        x = activations(columns * 2, columns, seed)
        found = search(layers, x)
        best = least_error(layers, x)
        assert found.error - best <= 0.25 * (found.error_before - best)


def test_no_grid_only_measures():
    layers = [BalanceWeight(weight_of(96, 64), int_args(4), torch.float32)]
    x = activations(100, 64)
    found = search(layers, x, n_grid=0)
    assert found.ratio is None
    assert torch.equal(found.scales, torch.ones(64))
    assert found.error == found.error_before == pytest.approx(output_error(layers, x, torch.ones(64)), rel=1e-3)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(2, 8), st.booleans(), st.sampled_from(STRATEGIES), st.data())
def test_no_problem_is_made_worse(rows, columns, bits, symmetric, strategy, data):
    args = int_args(bits, symmetric, strategy, columns)
    seed = data.draw(st.integers(0, 99))
    layers = [BalanceWeight(weight_of(rows, columns, seed), args, torch.float32)]
    x = activations(data.draw(st.integers(1, 60)), columns, seed)
    found = search(layers, x, n_grid=data.draw(st.integers(1, 8)))
    assert found.error <= found.error_before
    assert output_error(layers, x, found.scales) <= output_error(layers, x, torch.ones(columns)) * (1 + 1e-3)
    assert_usable(found.scales)


class TestChannelMap:
    """Two channels of v feed each pair of query heads of o: inputs 0..3 of each head share producers."""

    MAP = torch.arange(64).reshape(4, 16).repeat_interleave(2, dim=0).flatten()

    def test_inputs_of_one_producer_share_a_scale(self):
        layers = [BalanceWeight(weight_of(48, 128), int_args(3), torch.float32)]
        x = activations(300, 128)
        found = search(layers, x, channel_map=self.MAP)
        assert found.scales.shape == (64,)
        assert found.ratio is not None
        per_input = found.scales[self.MAP]
        assert output_error(layers, x, per_input) == pytest.approx(found.error, rel=1e-3)
        assert output_error(layers, x, per_input) <= least_error(layers, x, channel_map=self.MAP) * (1 + 1e-4)

    def test_the_identity_changes_nothing(self):
        layers = [BalanceWeight(weight_of(48, 64), int_args(3), torch.float32)]
        x = activations(300, 64)
        plain, mapped = search(layers, x), search(layers, x, channel_map=torch.arange(64))
        assert torch.equal(plain.scales, mapped.scales)
        assert plain.error == mapped.error

    def test_a_producer_s_channel_that_feeds_nothing_has_a_usable_scale(self):
        layers = [BalanceWeight(weight_of(48, 32), int_args(3), torch.float32)]
        found = search(layers, activations(300, 32), channel_map=torch.arange(32) * 2)
        assert found.scales.shape == (63,)
        assert_usable(found.scales)


class TestDuoScaling:
    def test_both_is_at_least_as_good_as_either(self):
        layers = [BalanceWeight(weight_of(48, 64, seed=3), int_args(3), torch.float32)]
        x = activations(200, 64, seed=3)
        with_duo, without, both = (search(layers, x, duo_scaling=d) for d in (True, False, "both"))
        assert both.error <= min(with_duo.error, without.error) * (1 + 1e-5)
        assert with_duo.duo or with_duo.ratio is None
        assert not without.duo

    def test_plain_scales_are_powers_of_the_magnitude(self):
        """Equation 5 of the paper, normalized to a geometric middle of 1."""
        magnitude = torch.tensor([0.5, 1.0, 2.0, 8.0])
        ratios, duos, scales = candidate_scales(magnitude, torch.ones(4), 4, False)
        assert ratios == [None, 0.0, 0.25, 0.5, 0.75]
        assert not any(duos)
        assert torch.equal(scales[0], torch.ones(4))
        for ratio, found in zip(ratios[1:], scales[1:], strict=True):
            powers = magnitude.double() ** ratio
            expected = powers / (powers.max() * powers.min()).sqrt()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)

    def test_duo_scales_divide_by_the_weight_s_share(self):
        magnitude, of_weight = torch.tensor([0.5, 1.0, 2.0, 8.0]), torch.tensor([0.9, 0.2, 0.4, 0.1])
        ratios, duos, scales = candidate_scales(magnitude, of_weight, 4, "both")
        assert duos == [False] * 5 + [True] * 4
        for ratio, found in zip(ratios[5:], scales[5:], strict=True):
            powers = magnitude.double() ** ratio / of_weight.double() ** (1 - ratio)
            expected = powers / (powers.max() * powers.min()).sqrt()
            torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)


class TestHardCases:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("duo_scaling", [True, False])
    def test_dead_inputs(self, strategy, duo_scaling):
        x = activations(200, 64)
        x[:, 5:20] = 0
        layers = [BalanceWeight(weight_of(80, 64), int_args(4, strategy=strategy), torch.float32)]
        found = search(layers, x, duo_scaling=duo_scaling)
        assert_usable(found.scales)
        assert found.error <= found.error_before

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_no_input_at_all(self, strategy):
        layers = [BalanceWeight(weight_of(80, 64), int_args(4, strategy=strategy), torch.float32)]
        found = search(layers, torch.zeros(10, 64))
        assert_usable(found.scales)
        assert found.error == found.error_before == 0

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_weights_of_zeros(self, strategy):
        layers = [BalanceWeight(torch.zeros(80, 64), int_args(4, strategy=strategy), torch.float32)]
        found = search(layers, activations(100, 64))
        assert_usable(found.scales)
        assert found.error == found.error_before == 0

    def test_columns_of_zeros(self):
        weight = weight_of(80, 64)
        weight[:, :16], weight[:, 40] = 0, 0
        layers = [BalanceWeight(weight, int_args(4), torch.float32)]
        x = activations(100, 64)
        found = search(layers, x)
        assert_usable(found.scales)
        assert found.error == pytest.approx(output_error(layers, x, found.scales), rel=1e-3)

    @pytest.mark.parametrize("magnitude", [1e-12, 1e12])
    def test_inputs_of_extreme_magnitude(self, magnitude):
        layers = [BalanceWeight(weight_of(80, 64), int_args(4), torch.float32)]
        found = search(layers, activations(100, 64) * magnitude)
        assert_usable(found.scales)
        assert found.error <= found.error_before

    def test_where_nothing_helps_the_layers_are_left_alone(self):
        """Integers that are on their grid already have no error."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-8, 8, (80, 64), generator=generator).float()
        weight[:, ::16], weight[:, 1::16] = -8, 7
        layers = [BalanceWeight(weight, int_args(4), torch.float32)]
        found = search(layers, activations(100, 64))
        assert found.ratio is None
        assert torch.equal(found.scales, torch.ones(64))
        assert found.error == found.error_before == 0


class TestSeveralLayers:
    def layers(self):
        return [
            BalanceWeight(weight_of(40, 64, seed=1), int_args(4), torch.float32),
            BalanceWeight(weight_of(10, 64, seed=2), int_args(3, symmetric=True, strategy="channel"), torch.bfloat16),
            BalanceWeight(weight_of(7, 64, seed=3), int_args(8, strategy="tensor"), torch.float16),
        ]

    def test_with_schemes_of_their_own_share_one_best_scale(self):
        layers, x = self.layers(), activations(200, 64)
        found = search(layers, x)
        assert found.error == pytest.approx(output_error(layers, x, found.scales), rel=1e-3)
        assert found.error_before == pytest.approx(output_error(layers, x, torch.ones(64)), rel=1e-3)
        assert output_error(layers, x, found.scales) <= least_error(layers, x) * (1 + 1e-4)

    def test_of_very_different_heights(self):
        layers = [
            BalanceWeight(weight_of(512, 64, seed=1), int_args(4), torch.float32),
            BalanceWeight(weight_of(3, 64, seed=2), int_args(4), torch.float32),
            BalanceWeight(weight_of(1, 64, seed=3), int_args(4), torch.float32),
        ]
        x = activations(200, 64)
        found = search(layers, x)
        assert found.error == pytest.approx(output_error(layers, x, found.scales), rel=1e-3)
        assert found.error_before == pytest.approx(output_error(layers, x, torch.ones(64)), rel=1e-3)
        best = least_error(layers, x)
        assert found.error - best <= 0.1 * (found.error_before - best)


@pytest.mark.parametrize("chunk", [1, 4096])
def test_does_not_depend_on_how_candidates_are_chunked(monkeypatch, chunk):
    layers = [BalanceWeight(weight_of(160, 64), int_args(4), torch.float32)]
    x = activations(200, 64)
    whole = search(layers, x)
    monkeypatch.setattr(awq, "SEARCH_CHUNK", chunk)
    monkeypatch.setattr(awq, "CANDIDATES", 3)
    chunked = search(layers, x)
    assert chunked.error == pytest.approx(whole.error, rel=1e-5)
    assert torch.equal(chunked.scales, whole.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(dtype):
    weight = weight_of(160, 64).to(dtype)
    layers = [BalanceWeight(weight, int_args(4), dtype)]
    x = activations(200, 64)
    before = weight.clone()
    found = search(layers, x)
    assert torch.equal(weight, before)
    assert_usable(found.scales)
    assert found.error == pytest.approx(output_error(layers, x, found.scales), rel=1e-3)
    assert found.error < found.error_before * 0.9


def test_is_deterministic_and_leaves_its_arguments_alone():
    layers = [BalanceWeight(weight_of(160, 64), int_args(4), torch.float32)]
    gram, magnitude = statistics_of(activations(200, 64))
    arguments = [layers[0].weight, gram, magnitude]
    before = [t.clone() for t in arguments]
    first, second = (search_scales(layers, gram, magnitude) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))
    assert torch.equal(first.scales, second.scales)
    assert (first.error, first.error_before, first.ratio, first.duo) == (
        second.error,
        second.error_before,
        second.ratio,
        second.duo,
    )
