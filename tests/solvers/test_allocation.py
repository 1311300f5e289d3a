"""Allocation beside every possible choice."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitpress.solvers import allocate


@st.composite
def problems(draw):
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    step = draw(st.sampled_from([1, 64]))
    cost = st.floats(0, 1e3) | st.floats(0, 1e-6)
    costs = [draw(st.lists(cost, min_size=n, max_size=n)) for n in counts]
    sizes = [[step * s for s in draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))] for n in counts]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return costs, sizes, draw(st.integers(least, most + step))


def total(table, picks):
    return sum(row[pick] for row, pick in zip(table, picks, strict=True))


def optimum(costs, sizes, budget):
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min((total(costs, c) for c in choices if total(sizes, c) <= budget), default=math.inf)


@given(problems())
def test_nothing_within_the_budget_costs_less(problem):
    costs, sizes, budget = problem
    picks = allocate(costs, sizes, budget)
    assert total(sizes, picks) <= budget
    assert total(costs, picks) == pytest.approx(optimum(*problem), rel=1e-9, abs=1e-12)


@given(problems(), st.integers(1, 20))
def test_coarse_steps_give_away_less_than_one_for_each_group(problem, steps):
    costs, sizes, budget = problem
    picks = allocate(costs, sizes, budget, steps)
    assert total(sizes, picks) <= budget
    slack = min(budget, sum(map(max, sizes))) - sum(map(min, sizes))
    differences = [size - min(row) for row in sizes for size in row]
    unit = max(math.gcd(*differences), -(-slack // steps))
    assert total(costs, picks) <= optimum(costs, sizes, budget - unit * (len(costs) + 1)) + 1e-9


@given(problems())
def test_a_budget_below_the_smallest_is_refused(problem):
    costs, sizes, _ = problem
    with pytest.raises(ValueError, match="the smallest choices take"):
        allocate(costs, sizes, sum(map(min, sizes)) - 1)
