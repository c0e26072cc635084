"""The float64 oracle in numpy, separate from every backend: the distribution by the textbook
formula and plain bisection (mixture.py), and the draw (sampling.py)."""

from .mixture import (
    LOG_RATIO_FLOOR,
    PREFIX_FLOOR,
    log_probs,
    log_probs_row,
    log_softmax,
    slope_of,
    solve_log_ratios,
    to_float64,
)
from .sampling import (
    SCHEME_VERSION,
    TILE,
    arrivals,
    exponentials,
    filtered_log_probs,
    philox4x32,
    race,
    race_margin,
    row_seeds,
    splitmix64,
    unpack_mask,
)

__all__ = [
    "LOG_RATIO_FLOOR",
    "PREFIX_FLOOR",
    "SCHEME_VERSION",
    "TILE",
    "arrivals",
    "exponentials",
    "filtered_log_probs",
    "log_probs",
    "log_probs_row",
    "log_softmax",
    "philox4x32",
    "race",
    "race_margin",
    "row_seeds",
    "slope_of",
    "solve_log_ratios",
    "splitmix64",
    "to_float64",
    "unpack_mask",
]
