"""SmoothQuant: equation 4, and the estimate of the error against quantizing for real."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.solvers import BalanceWeight, output_error, round_to_nearest, search_strength, smoothing_scales
from bitpress.solvers.smoothquant import STRENGTHS, activation_noise, expected_peaks

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
COLUMNS = 64

PER_TOKEN = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
PER_TENSOR = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor")
PER_GROUP = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="group", group_size=16, dynamic=True)
FLOAT = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
INT8 = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")

seeds = st.integers(0, 2**20)
outliers = st.sampled_from([1.0, 5.0, 50.0])


def problem(seed, outlier=20.0, rows=400, tails=False):
    """Inputs of which a few columns stand out, and two weights; with ``tails``, a few tokens stand out, too."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    x = torch.randn(rows, COLUMNS, generator=generator) @ mixing
    x[:, ::17] *= outlier
    if tails:
        x *= torch.empty(rows, 1).log_normal_(0, 0.5, generator=generator)
    weights = [torch.randn(out, COLUMNS, generator=generator) * 0.05 for out in (48, 96)]
    return x, weights


def layers_of(weights, args=INT8):
    return [BalanceWeight(w, args, torch.float32) for w in weights]


def rounded(x, args):
    """The inputs as a server rounds them."""
    size = args.group_size or x.shape[1]
    groups = x.unflatten(1, (-1, size))
    peak = x.abs().max() if args.strategy == "tensor" else groups.abs().amax(-1, keepdim=True)
    half = 2 ** (args.num_bits - 1)
    step = 2 * peak / (2 * half - 1)
    return ((groups / step).round().clamp(-half, half - 1) * step).flatten(1)


def true_error(x, weights, scales, weight_args, args):
    """What quantizing weights and inputs does to the outputs."""
    total = 0.0
    for weight in weights:
        scaled = round_to_nearest(weight * scales, weight_args, torch.float32).dequantize()
        inputs = x / scales if args is None else rounded(x / scales, args)
        total += float((inputs @ scaled.T - x @ weight.T).double().square().sum())
    return total


class TestScales:
    @PROPERTY
    @given(seeds, outliers, st.floats(0, 1))
    def test_are_equation_4_but_for_a_common_factor(self, seed, outlier, strength):
        x, weights = problem(seed, outlier)
        greatest = x.abs().amax(0)
        found = smoothing_scales(weights, greatest, strength).double()
        of_weights = torch.cat(weights).abs().amax(0).double()
        expected = greatest.double() ** strength / of_weights ** (1 - strength)
        ratio = found / expected
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
        assert float(found.log().mean()) == pytest.approx(0, abs=1e-4)

    @PROPERTY
    @given(seeds, outliers)
    def test_one_half_balances_inputs_and_weights(self, seed, outlier):
        x, weights = problem(seed, outlier)
        scales = smoothing_scales(weights, x.abs().amax(0), 0.5)
        ratio = (x / scales).abs().amax(0) / (torch.cat(weights) * scales).abs().amax(0)
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)

    def test_columns_that_share_a_channel_share_its_scale(self):
        x, weights = problem(0)
        channel_map = torch.arange(COLUMNS) // 2 + 3
        found = smoothing_scales(weights, x.abs().amax(0), 0.5, channel_map)
        assert found.shape == (COLUMNS // 2 + 3,)
        assert bool((found[:3] == 1).all())
        greatest = x.abs().amax(0).view(-1, 2).amax(1)
        of_weights = torch.cat(weights).abs().amax(0).view(-1, 2).amax(1)
        ratio = found[3:] / (greatest / of_weights).sqrt()
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
    def test_dead_channels_and_zero_columns(self, strength):
        x, weights = problem(0)
        x[:, 3] = 0
        for weight in weights:
            weight[:, 5] = 0
        found = smoothing_scales(weights, x.abs().amax(0), strength)
        assert bool((found.isfinite() & (found > 1e-4) & (found < 1e4)).all())
        nothing = smoothing_scales([torch.zeros(2, 4)], torch.zeros(4), strength)
        assert torch.equal(nothing, torch.ones(4))


class TestNoise:
    @PROPERTY
    @given(seeds, st.integers(1, 200), outliers)
    def test_the_expected_peak_is_that_of_many_draws(self, seed, columns, outlier):
        generator = torch.Generator().manual_seed(seed)
        deviation = torch.rand(columns, generator=generator) + 0.1
        deviation[0] *= outlier
        draws = torch.randn(20000, columns, generator=generator) * deviation
        (found,) = expected_peaks(deviation.square().unsqueeze(0), draws.abs().max().unsqueeze(0))
        peaks, columns_of_peaks = draws.abs().max(1)
        assert float(found.sum()) == pytest.approx(float(peaks.square().mean()), rel=0.06)
        of_first = (peaks.square() * (columns_of_peaks == 0)).mean()
        assert float(found[0]) == pytest.approx(float(of_first), rel=0.1, abs=0.02 * float(found.sum()))

    def test_what_cannot_be_exceeded_is_not(self):
        """Columns that are bounded, and one that was all but zero but for a single token."""
        generator = torch.Generator().manual_seed(0)
        uniform = torch.rand(5000, 300, generator=generator) * 2 - 1
        (found,) = expected_peaks(uniform.square().mean(0, keepdim=True), uniform.abs().max().unsqueeze(0))
        assert float(found.sum()) == pytest.approx(float(uniform.abs().amax(1).square().mean()), rel=0.05)
        for columns in (torch.zeros(1, 3), torch.tensor([[1e-12, 0.0, 1.0]])):
            assert bool(expected_peaks(columns, torch.tensor([1e4])).isfinite().all())

    @PROPERTY
    @given(seeds, outliers, st.sampled_from([PER_TOKEN, PER_TENSOR, PER_GROUP]), st.sampled_from([0.0, 0.5, 0.8]))
    def test_is_that_of_rounded_inputs(self, seed, outlier, args, strength):
        x, weights = problem(seed, outlier, rows=2000)
        greatest = x.abs().amax(0)
        scales = smoothing_scales(weights, greatest, strength)
        expected = ((rounded(x / scales, args) - x / scales) @ (weights[0] * scales).T).square().sum(1).mean()
        found = activation_noise(weights[0].square().sum(0), x.square().mean(0), greatest, scales, args)
        assert found == pytest.approx(float(expected), rel=0.2)

    def test_of_a_float_grid_no_scale_matters(self):
        x, weights = problem(0)
        squares, variance, greatest = weights[0].square().sum(0), x.square().mean(0), x.abs().amax(0)
        for args in (FLOAT, None):
            assert activation_noise(squares, variance, greatest, torch.rand(COLUMNS) + 0.1, args) == 0


class TestSearch:
    @PROPERTY
    @given(seeds, outliers, st.sampled_from([4, 8]), st.sampled_from([None, PER_TOKEN, PER_TENSOR, PER_GROUP]))
    def test_the_estimate_is_near_the_error_of_quantizing(self, seed, outlier, bits, args):
        x, weights = problem(seed, outlier)
        weight_args = INT8.model_copy(update={"num_bits": bits})
        kinds = [args] * 2
        found = search_strength(layers_of(weights, weight_args), x.T @ x, x.abs().amax(0), len(x), activations=kinds)
        ones = torch.ones(COLUMNS)
        assert found.error == pytest.approx(true_error(x, weights, found.scales, weight_args, args), rel=0.2)
        assert found.error_before == pytest.approx(true_error(x, weights, ones, weight_args, args), rel=0.2)

    @PROPERTY
    @given(seeds, outliers, st.booleans(), st.sampled_from([PER_TOKEN, PER_TENSOR]))
    def test_the_choice_is_about_as_good_as_the_best(self, seed, outlier, tails, args):
        x, weights = problem(seed, outlier, tails=tails)
        greatest = x.abs().amax(0)
        found = search_strength(layers_of(weights), x.T @ x, greatest, len(x), activations=[args] * 2)
        tried = [smoothing_scales(weights, greatest, s) for s in STRENGTHS]
        errors = [true_error(x, weights, s, INT8, args) for s in [torch.ones(COLUMNS), *tried]]
        assert true_error(x, weights, found.scales, INT8, args) <= 1.1 * min(errors)

    @PROPERTY
    @given(seeds, outliers, st.sampled_from([3, 4, 8]))
    def test_for_weights_alone_it_is_exact(self, seed, outlier, bits):
        x, weights = problem(seed, outlier)
        gram, greatest = x.T @ x, x.abs().amax(0)
        args = QuantizationArgs(num_bits=bits, symmetric=False, group_size=16)
        found = search_strength(layers_of(weights, args), gram, greatest, len(x))
        tried = [torch.ones(COLUMNS), *(smoothing_scales(weights, greatest, s) for s in STRENGTHS)]
        errors = [
            sum(output_error(round_to_nearest(w * s, args, torch.float32).dequantize() / s - w, gram) for w in weights)
            for s in tried
        ]
        assert found.error == pytest.approx(min(errors), rel=1e-3)
        assert found.error_before == pytest.approx(errors[0], rel=1e-3)

    def test_outliers_are_smoothed_and_where_there_are_none_it_hardly_matters(self):
        for outlier in (100.0, 1.0):
            x, weights = problem(0, outlier)
            found = search_strength(layers_of(weights), x.T @ x, x.abs().amax(0), len(x), activations=[PER_TOKEN] * 2)
            gain = found.error_before / found.error
            assert (gain > 5) == (outlier > 1)
            assert gain >= 1
        assert found.strength is None or 0 <= found.strength <= 1

    def test_it_does_not_depend_much_on_the_rows_that_are_sampled(self):
        x, _ = problem(0)
        weight = torch.randn(1024, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.05
        found = search_strength(layers_of([weight]), x.T @ x, x.abs().amax(0), len(x), activations=[PER_TENSOR])
        assert found.error == pytest.approx(true_error(x, [weight], found.scales, INT8, PER_TENSOR), rel=0.2)

    def test_nothing_is_smoothed_where_nothing_helps(self):
        args = QuantizationArgs(num_bits=8, symmetric=False, strategy="channel")
        x = torch.tensor([[1.0, 9.0], [2.0, 1.0]])
        found = search_strength(layers_of([torch.zeros(3, 2)], args), x.T @ x, x.abs().amax(0), 2)
        assert found.strength is None
        assert torch.equal(found.scales, torch.ones(2))
        assert found.error == found.error_before == 0
