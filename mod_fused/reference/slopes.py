"""f' of every divergence and its inverse, in float64 or numpy's longdouble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

SMALL_ALPHA = 0.03  # below it c is 0


class Slope(NamedTuple):
    """f' - c of one divergence as a function of the log-ratio d; c is the supremum of f'.

    Subtracting a constant from f' only moves Z. f' - c is exact near the pole of its inverse, where
    f' itself rounds to c.
    """

    supremum: float  # c = sup f'; 0 where f' is unbounded (Jeffrey), and for a small alpha
    slope: Callable[[Array], Array]  # d -> f'(e^d) - c
    inverse: Callable[[Array], Array]  # the d with f'(e^d) - c = y
    top: float = 0.0  # sup f' - c: only smaller y have an inverse
    floors: bool = True  # whether the two floors on d apply: not to JSD, whose f' is linear there


def _jeffrey_inverse(y: Array) -> Array:
    """Solve d - e^-d + 1 = y. The left side is concave, so Newton never overshoots twice."""
    t = y - 1.0
    d = np.where(t < -1.0, -np.log(np.maximum(-t, 1.0)), t + 1.0)  # within one of the solution
    for _ in range(8):
        v = np.exp(-d)
        d = d - (d - v - t) / (1.0 + v)
    return d


def slope_of(divergence: Any, own_mass: bool = False) -> Slope | None:
    """The f' of a divergence given by name (or by an object with a `name`); None for reverse KL.

    With the mixture's own mass a small alpha, too, is measured from sup f': ratios of whole
    responses lie far from 1, where 1 - e^(-a d) would lose the digits of e^(-a d).
    """
    name = str(getattr(divergence, "name", divergence))
    if name == "reverse_kl":
        return None
    if name == "forward_kl":  # f = -log x, f' = -1/x
        return Slope(0.0, lambda d: -np.exp(-d), lambda y: -np.log(-y))
    if name == "jsd":  # f = x log x - (x+1) log((x+1)/2), f' = log 2 + log(x / (1+x))
        return Slope(
            float(np.log(2.0)),
            lambda d: -np.logaddexp(0.0, -d),
            lambda y: y - np.log(-np.expm1(y)),  # -log(expm1(-y)), without overflow
            floors=False,
        )
    if name.startswith("alpha:"):  # f = (x^(1-a) - (1-a) x - a) / (a (a-1)), f' = (1 - x^-a) / a
        a = float(name.removeprefix("alpha:"))
        if a < SMALL_ALPHA and not own_mass:
            return Slope(
                0.0, lambda d: -np.expm1(-a * d) / a, lambda y: -np.log1p(-a * y) / a, top=1.0 / a
            )
        return Slope(1.0 / a, lambda d: -np.exp(-a * d) / a, lambda y: -np.log(-a * y) / a)
    if name == "jeffrey":  # f = (x-1) log x, f' = log x - 1/x + 1
        return Slope(0.0, lambda d: d - np.exp(-d) + 1.0, _jeffrey_inverse, top=np.inf)
    raise ValueError(
        "expected reverse_kl, forward_kl, jsd, alpha:<number in (0, 1)> or jeffrey, got " + name
    )
