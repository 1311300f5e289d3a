"""Ranges, round-to-nearest on them, and the search for better ones."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.errors import BitpressError
from bitpress.quantization import dequantize
from bitpress.solvers import check_finite, output_error, round_to_nearest, search_parameters
from bitpress.solvers.ranges import SHRINKS, minmax_parameters

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STRATEGIES = ("tensor", "channel", "group")


def int_args(bits, symmetric, strategy, group_size=None):
    size = group_size if strategy == "group" else None
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=size)


def per_value(parameter, columns):
    """A scale or zero point, once for each value of the weight."""
    parameter = parameter.double().reshape(-1, parameter.shape[-1])
    return parameter.repeat_interleave(columns // parameter.shape[-1], dim=1)


@st.composite
def problems(draw):
    rows, groups, size = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 16))
    args = int_args(draw(st.integers(2, 8)), draw(st.booleans()), draw(st.sampled_from(STRATEGIES)), size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(rows, groups * size, generator=generator) * 10.0 ** draw(st.integers(-3, 2))
    weight += draw(st.sampled_from([-1.0, 0.0, 1.0])) * weight.abs().mean() * 2
    if draw(st.booleans()):
        weight[:, :size] = 0
    return weight.to(draw(st.sampled_from(FLOATS))), args, draw(st.sampled_from(FLOATS))


class TestRoundToNearest:
    @PROPERTY
    @given(problems())
    def test_is_half_a_step_away_at_most(self, problem):
        """And at the ends of a range by what rounding the scale to its stored dtype costs all its steps."""
        weight, args, stored = problem
        quantized = round_to_nearest(weight, args, stored)
        columns = weight.shape[1]
        step, offset = per_value(quantized.scale, columns), per_value(quantized.zero_point, columns)
        points = (quantized.values.double() - offset) * step
        stored_scale_costs = (2**args.num_bits - 1) * torch.finfo(stored).eps / 2
        # In float16, ranges of under 2^-14 have denormal scales, which are off by more.
        fits = step >= torch.finfo(stored).smallest_normal
        error = (points - weight.double()).abs()
        assert bool((error <= step * (0.5 + 1.01 * stored_scale_costs + 1e-4))[fits.expand_as(error)].all())

    @PROPERTY
    @given(problems())
    def test_no_point_of_the_grid_is_nearer(self, problem):
        weight, args, stored = problem
        quantized = round_to_nearest(weight, args, stored)
        columns = weight.shape[1]
        step, offset = per_value(quantized.scale, columns), per_value(quantized.zero_point, columns)
        half = 1 << (args.num_bits - 1)
        points = (torch.arange(-half, half, dtype=torch.float64) - offset.unsqueeze(-1)) * step.unsqueeze(-1)
        distances = (points - weight.double().unsqueeze(-1)).abs()
        chosen = distances.gather(-1, (quantized.values.long() + half).unsqueeze(-1)).squeeze(-1)
        assert bool((chosen <= distances.amin(-1) + step * 1e-4).all())

    @pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("channel", (6, 1)), ("group", (6, 4))])
    @pytest.mark.parametrize("stored", FLOATS)
    def test_shapes_and_dtypes(self, strategy, shape, stored):
        weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        quantized = round_to_nearest(weight, int_args(4, symmetric=False, strategy=strategy, group_size=8), stored)
        assert quantized.scale.shape == quantized.zero_point.shape == shape
        assert quantized.scale.dtype == stored
        assert quantized.zero_point.dtype == quantized.values.dtype == torch.int8
        assert quantized.values.shape == weight.shape

    def test_zeros_stay_zeros(self):
        weight = torch.zeros(3, 8)
        for strategy in STRATEGIES:
            quantized = round_to_nearest(
                weight, int_args(4, symmetric=False, strategy=strategy, group_size=4), weight.dtype
            )
            assert torch.equal(quantized.dequantize(), weight)

    def test_ranges_of_the_caller_are_used(self):
        weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        args = int_args(3, symmetric=False, strategy="channel")
        scale, zero_point = torch.full((3, 1), 0.25), torch.tensor([[-1], [0], [1]], dtype=torch.int8)
        quantized = round_to_nearest(weight, args, torch.float32, (scale, zero_point))
        expected = (weight / scale + zero_point).clamp(-4, 3).round()
        assert torch.equal(quantized.values.float(), expected)

    def test_leading_dimensions_are_candidates(self):
        weight = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
        for strategy in STRATEGIES:
            args = int_args(4, symmetric=False, strategy=strategy, group_size=4)
            scales, zero_points = minmax_parameters(weight, args, torch.bfloat16)
            for one, scale, zero_point in zip(weight, scales, zero_points, strict=True):
                alone = minmax_parameters(one, args, torch.bfloat16)
                assert torch.equal(scale, alone[0])
                assert torch.equal(zero_point, alone[1])


def gram_of(columns, rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(rows, columns, generator=generator) @ mix * (1 + 10 * torch.rand(columns, generator=generator) ** 8)
    return x.T @ x


# From the Gram matrix to what a search is given.
MEASURES = {"gram": lambda gram: gram, "diagonal": torch.diagonal, "identity": lambda _: None}


def as_matrix(gram, columns):
    """What a search is given as the matrix that it stands for."""
    if gram is None:
        return torch.eye(columns)
    return gram.diag() if gram.dim() == 1 else gram


class TestSearchParameters:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(("strategy", "size"), [("channel", 48), ("group", 16)])
    @pytest.mark.parametrize("stored", FLOATS)
    @pytest.mark.parametrize("measure", MEASURES)
    def test_finds_the_best_shrink_of_each_group(self, measure, strategy, size, symmetric, stored):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(5, 48, generator=generator) ** 3
        gram = MEASURES[measure](gram_of(48))
        args = int_args(3, symmetric, strategy, size)
        scale, zero_point = search_parameters(weight, args, gram, stored)
        gram = as_matrix(gram, 48)
        assert scale.dtype == stored
        assert zero_point.dtype == torch.int8
        assert scale.shape == zero_point.shape == (5, 48 // size)
        found = group_errors(weight, scale, zero_point, args, gram, size)
        tried = []
        for shrink in SHRINKS:
            candidate = minmax_parameters(weight * shrink, args, stored)
            tried.append(group_errors(weight, *candidate, args, gram, size))
        best = torch.stack(tried).amin(0)
        torch.testing.assert_close(found, best, rtol=1e-3, atol=0)
        assert bool((best < tried[0] * 0.9).any()), "the problem is one where clipping helps"

    def test_does_not_depend_on_how_rows_are_chunked(self, monkeypatch):
        weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
        args = int_args(4, symmetric=False, strategy="group", group_size=8)
        gram = gram_of(32)
        whole = search_parameters(weight, args, gram, torch.float32)
        monkeypatch.setattr("bitpress.solvers.ranges.SEARCH_CHUNK", 64)
        chunked = search_parameters(weight, args, gram, torch.float32)
        assert torch.equal(whole[0], chunked[0])
        assert torch.equal(whole[1], chunked[1])

    def test_dead_inputs_and_zero_weights_have_usable_ranges(self):
        weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
        weight[1] = 0
        gram = gram_of(32)
        gram[:8], gram[:, :8] = 0, 0
        args = int_args(4, symmetric=False, strategy="group", group_size=8)
        scale, _ = search_parameters(weight, args, gram, torch.bfloat16)
        assert bool((scale.isfinite() & (scale > 0)).all())
        # Nothing is known of the first group: its range is left as it is.
        assert torch.equal(scale[:, 0], minmax_parameters(weight, args, torch.bfloat16)[0][:, 0])

    @pytest.mark.parametrize("chunk", [64, 1 << 19])
    @pytest.mark.parametrize("measure", MEASURES)
    def test_a_range_per_tensor_is_that_of_least_error_in_all(self, measure, chunk, monkeypatch):
        monkeypatch.setattr("bitpress.solvers.ranges.SEARCH_CHUNK", chunk)
        weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(2)) ** 3
        args, gram = int_args(3, symmetric=False, strategy="tensor"), MEASURES[measure](gram_of(32))
        found = search_parameters(weight.bfloat16(), args, gram, torch.bfloat16)
        assert found[0].shape == found[1].shape == (1,)
        tried = [minmax_parameters(weight.bfloat16().float() * s, args, torch.bfloat16) for s in SHRINKS]
        errors = [float(group_errors(weight.bfloat16(), *t, args, as_matrix(gram, 32), 32).sum()) for t in tried]
        best = tried[errors.index(min(errors))]
        assert min(errors) < errors[0]
        assert torch.equal(found[0], best[0])
        assert torch.equal(found[1], best[1])

    @PROPERTY
    @given(problems(), st.sampled_from(sorted(MEASURES)))
    def test_each_measure_has_the_least_error_that_its_candidates_have(self, problem, measure):
        weight, args, stored = problem
        columns = weight.shape[1]
        size = args.group_size or columns
        gram = MEASURES[measure](gram_of(columns))
        together = args.strategy == "tensor"

        def error(scale, zero_point):
            found = group_errors(weight, scale, zero_point, args, as_matrix(gram, columns), size)
            return found.sum().reshape(1) if together else found

        found = error(*search_parameters(weight, args, gram, stored))
        tried = [error(*minmax_parameters(weight.float() * s, args, stored)) for s in SHRINKS]
        # Candidates are compared in float32: of two that are almost equal the other may win, and error is measured in
        # steps, of which a value that is all but on the grid has few.
        slack = 1e-3 * tried[0] + 1e-9 * weight.double().square().sum() * as_matrix(gram, columns).double().trace()
        assert bool((found <= torch.stack(tried).amin(0) + slack).all())
        assert bool((found <= tried[0] + slack).all())


def group_errors(weight, scale, zero_point, args, gram, size):
    """``e^T H_g e`` of each group in float64: (out, groups)."""
    quantized = round_to_nearest(weight, args, scale.dtype, (scale, zero_point))
    offset = None if args.symmetric else zero_point
    error = (dequantize(quantized.values, scale.float(), offset, args).double() - weight.double()).unflatten(
        1, (-1, size)
    )
    columns = weight.shape[1]
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, columns, size)]).double()
    return torch.einsum("rgi,gij,rgj->rg", error, blocks, error)


class TestOutputError:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_that_of_the_output(self, dtype):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(100, 24, generator=generator)
        delta = (torch.randn(7, 24, generator=generator) * 1e-2).to(dtype)
        expected = float((x.double() @ delta.double().T).square().sum())
        assert output_error(delta, x.T @ x) == pytest.approx(expected, rel=1e-5)


class TestCheckFinite:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_names_the_tensor_and_counts(self, bad, dtype):
        weight = torch.ones(4, 5, dtype=dtype)
        weight[1, 2] = weight[3, 4] = bad
        with pytest.raises(BitpressError, match=r"layers\.0\.up\.weight holds 2 "):
            check_finite(weight, "layers.0.up")

    def test_lets_every_finite_weight_pass(self):
        for dtype in FLOATS:
            check_finite(torch.full((3, 3), torch.finfo(dtype).max, dtype=dtype), "w")
