"""The float64 oracle in numpy, separate from every backend: the distribution by the textbook
formula (slopes.py) and plain bisection (mixture.py), and the draw (sampling.py). Of whole
responses: worlds in which the optimum is known (trees.py)."""

from .mixture import (
    LOG_RATIO_FLOOR,
    PREFIX_FLOOR,
    log_probs,
    log_probs_row,
    log_softmax,
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
from .slopes import slope_of
from .trees import (
    NextTokens,
    Shortfall,
    Tree,
    bandit,
    divergence_terms,
    f_of,
    objective,
    optimum,
    random_tree,
    shortfall,
)

__all__ = [
    "LOG_RATIO_FLOOR",
    "PREFIX_FLOOR",
    "SCHEME_VERSION",
    "TILE",
    "NextTokens",
    "Shortfall",
    "Tree",
    "arrivals",
    "bandit",
    "divergence_terms",
    "exponentials",
    "f_of",
    "filtered_log_probs",
    "log_probs",
    "log_probs_row",
    "log_softmax",
    "objective",
    "optimum",
    "philox4x32",
    "race",
    "race_margin",
    "random_tree",
    "row_seeds",
    "shortfall",
    "slope_of",
    "solve_log_ratios",
    "splitmix64",
    "to_float64",
    "unpack_mask",
]
