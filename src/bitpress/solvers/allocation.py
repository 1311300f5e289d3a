"""Bit allocation: one choice for each group, the least cost within a budget of size.

The loss that quantization adds is, to second order and where the errors of different layers are not correlated, a sum
over the layers (Malinovskii et al., "HIGGS: Pushing the Limits of Large Language Model Quantization via the Linearity
Theorem", 2024, https://arxiv.org/abs/2411.17525, theorem 1). What is left is the multiple-choice knapsack problem.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Steps that the budget is divided into where the sizes have no common divisor that gives fewer.
STEPS = 1 << 15


def allocate(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, steps: int = STEPS
) -> list[int]:
    """The choice of each group, so that the costs add up to the least, and the sizes to no more than the budget.

    Dynamic programming over the size beyond the least possible. It is exact where that size, in units of the greatest
    common divisor of the differences, is no more than ``steps``. Otherwise differences are rounded up to whole steps,
    which gives away less than a step per group, and what is left over is spent on the moves that gain most.

    Args:
        costs: of each group's choices, finite.
        sizes: the same shape, > 0.
        budget: in the unit of ``sizes``.
        steps: the resolution.

    Returns:
        The index of the choice, group by group.

    Raises:
        ValueError: the smallest choices are larger than the budget.
    """
    least = sum(map(min, sizes))
    slack = min(budget, sum(map(max, sizes))) - least
    if slack < 0:
        raise ValueError(f"the smallest choices take {least}, more than the budget of {budget}.")
    extra = [[size - min(of_group) for size in of_group] for of_group in sizes]
    unit = math.gcd(*(e for of_group in extra for e in of_group)) or 1
    unit = max(unit, -(-slack // steps))
    capacity = slack // unit
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    units = [[-(-e // unit) for e in of_group] for of_group in extra]
    for of_group, more in zip(costs, units, strict=True):
        options = torch.full((len(of_group), capacity + 1), math.inf, dtype=torch.float64)
        for option, cost, steps_more in zip(options, of_group, more, strict=True):
            if steps_more <= capacity:
                option[steps_more:] = best[: capacity + 1 - steps_more] + cost
        best, choice = options.min(0)
        taken.append(choice.to(torch.int16))
    chosen = []
    for choice, more in zip(reversed(taken), reversed(units), strict=True):
        chosen.append(int(choice[capacity]))
        capacity -= more[chosen[-1]]
    chosen.reverse()
    return _spend(chosen, costs, extra, slack)


def _spend(
    chosen: list[int], costs: Sequence[Sequence[float]], extra: Sequence[Sequence[int]], slack: int
) -> list[int]:
    """Change one group's choice after the other, that first which gains most, while what is left over allows it."""
    left = slack - sum(e[c] for e, c in zip(extra, chosen, strict=True))
    while True:
        gain, group, choice = max(
            (of_group[chosen[g]] - cost, g, c)
            for g, of_group in enumerate(costs)
            for c, cost in enumerate(of_group)
            if extra[g][c] - extra[g][chosen[g]] <= left
        )
        if gain <= 0:
            return chosen
        left -= extra[group][choice] - extra[group][chosen[group]]
        chosen[group] = choice
