"""The algorithms, as pure functions of weights, statistics and schemes. No modules, no models."""

from bitpress.solvers.allocation import allocate
from bitpress.solvers.awq import AWQ, BalanceWeight, scale_search, search_scales
from bitpress.solvers.correction import corrected_weight
from bitpress.solvers.descent import coordinate_descent
from bitpress.solvers.gptq import GPTQ, gptq, gptq_together
from bitpress.solvers.nearest import packed_to_nearest
from bitpress.solvers.objective import output_error
from bitpress.solvers.ranges import check_finite, minmax_parameters, round_to_nearest, search_parameters
from bitpress.solvers.refine import Refined, refine_together
from bitpress.solvers.refit import refit_scales
from bitpress.solvers.rounding import LearnedRounding
from bitpress.solvers.sensitivity import squared_slope
from bitpress.solvers.smoothquant import SmoothQuant, search_strength, smoothing_scales

__all__ = [
    "AWQ",
    "GPTQ",
    "BalanceWeight",
    "LearnedRounding",
    "Refined",
    "SmoothQuant",
    "allocate",
    "check_finite",
    "coordinate_descent",
    "corrected_weight",
    "gptq",
    "gptq_together",
    "minmax_parameters",
    "output_error",
    "packed_to_nearest",
    "refine_together",
    "refit_scales",
    "round_to_nearest",
    "scale_search",
    "search_parameters",
    "search_scales",
    "search_strength",
    "smoothing_scales",
    "squared_slope",
]
