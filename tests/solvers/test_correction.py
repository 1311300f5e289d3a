"""The corrected weight against least squares in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.solvers import corrected_weight, output_error

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
SIZES = {"rows": st.integers(1, 6), "columns": st.integers(1, 24), "seed": st.integers(0, 99)}


def problem(rows, columns, seed, noise=0.3):
    """W, what the original feeds the layer, and what the compressed model does, in float64."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(40 + 4 * columns, columns, generator=generator).double()
    mixing = torch.eye(columns) + noise * torch.randn(columns, columns, generator=generator) / columns
    x = original @ mixing.double() + noise * torch.randn(original.shape, generator=generator)
    return torch.randn(rows, columns, generator=generator).double(), original, x


def solve(weight, original, x, **options):
    gram, drift = x.T @ x, (original - x).T @ x
    return corrected_weight(weight.float(), gram.float(), drift.float(), **options).double()


def squared_error(weight, original, x, found):
    return float((original @ weight.T - x @ found.T).square().sum())


@PROPERTY
@given(**SIZES)
def test_without_dampening_it_is_the_least_squares_solution(rows, columns, seed):
    weight, original, x = problem(rows, columns, seed)
    expected = torch.linalg.lstsq(x, original @ weight.T).solution.T
    torch.testing.assert_close(solve(weight, original, x, dampening=1e-9), expected, rtol=1e-3, atol=1e-4)


@PROPERTY
@given(**SIZES, dampening=st.floats(1e-3, 10))
def test_it_is_ridge_regression_towards_the_weight(rows, columns, seed, dampening):
    weight, original, x = problem(rows, columns, seed)
    d = (dampening * (x.T @ x).diagonal().mean()).sqrt()
    # The ridge as rows of data: d W = d W*.
    inputs = torch.cat([x, d * torch.eye(columns)])
    outputs = torch.cat([original @ weight.T, d * weight.T])
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(solve(weight, original, x, dampening=dampening), expected, rtol=1e-3, atol=1e-4)


@PROPERTY
@given(**SIZES)
def test_dampened_without_bound_it_is_the_weight(rows, columns, seed):
    weight, original, x = problem(rows, columns, seed)
    torch.testing.assert_close(solve(weight, original, x, dampening=1e7), weight, rtol=0, atol=1e-4)


@PROPERTY
@given(**SIZES, dampening=st.floats(1e-3, 10))
def test_the_more_of_it_the_nearer_is_the_output_to_the_original_one(rows, columns, seed, dampening):
    weight, original, x = problem(rows, columns, seed)
    steps = [solve(weight, original, x, dampening=dampening, strength=s) for s in (0.0, 0.25, 0.5, 1.0)]
    errors = [squared_error(weight, original, x, each) for each in steps]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(steps[2], (steps[0] + steps[3]) / 2)


@PROPERTY
@given(**SIZES)
def test_inputs_that_have_not_drifted_leave_the_weight_to_the_bit(rows, columns, seed):
    weight, original, _ = problem(rows, columns, seed)
    assert torch.equal(solve(weight, original, original), weight.float().double())


@PROPERTY
@given(**SIZES, dampening=st.floats(1e-2, 1))
def test_inputs_that_were_scaled_are_undone(rows, columns, seed, dampening):
    """X = 2 X': the answer, W / 2, is approached, and not overshot towards 0."""
    weight, original, _ = problem(rows, columns, seed)
    found = solve(weight, original, 2 * original, dampening=dampening)
    assert squared_error(weight, original, 2 * original, found) < output_error(weight, original.T @ original)
    assert float(found.norm()) >= float(weight.norm()) / 2 - 1e-5


@PROPERTY
@given(**SIZES)
def test_smoothing_before_or_after_is_the_same(rows, columns, seed):
    weight, original, x = problem(rows, columns, seed)
    s = torch.rand(columns, generator=torch.Generator().manual_seed(seed)).double() + 0.5
    after = solve(weight, original, x, dampening=1e-9) * s
    torch.testing.assert_close(solve(weight * s, original / s, x / s, dampening=1e-9), after, rtol=1e-3, atol=1e-3)


def test_a_channel_that_is_never_active_keeps_its_weights():
    weight, original, x = problem(3, 8, 0)
    x[:, 2] = 0
    found = solve(weight, original, x)
    assert torch.equal(found[:, 2], weight[:, 2].float().double())
    assert found.isfinite().all()
