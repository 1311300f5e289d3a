"""The algorithms, as pure functions of weights, statistics and schemes. No modules, no models."""

from bitpress.solvers.awq import AWQ, BalanceWeight, search_scales
from bitpress.solvers.gptq import GPTQ, gptq
from bitpress.solvers.objective import output_error
from bitpress.solvers.ranges import check_finite, round_to_nearest, search_parameters

__all__ = [
    "AWQ",
    "GPTQ",
    "BalanceWeight",
    "check_finite",
    "gptq",
    "output_error",
    "round_to_nearest",
    "search_parameters",
    "search_scales",
]
