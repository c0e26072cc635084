"""The f-divergences as Triton device functions, as in mod_fused/divergence.py and
csrc/divergence.h, and the list of their properties. Nothing else in this folder asks which
divergence it is. docs/concepts.md explains the deficit q and tau.

    deficit(d, a)    q = sup f' - f'(e^d)
    log_ratio(q, a)  log H(q), H the inverse of q in ratio space
    log_slope(q, a)  log(-H'(q))

`a` is the divergence's parameter; only alpha has one. The three bounded divergences have a
*Stieltjes form*: H is a power of a sum t + x, where t = shift(tau, a) depends on tau alone and
x = excess(D, a) on the token alone,

    H(tau + D) = factor(t) y^-order,     y = t + x.

A sum over tokens then needs only a division per token. The order is 1 or 1/a, the factor is 1 or
1 - t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..divergence import Divergence
from .elementary import exp, expm1, log1p_unit, log_of, reciprocal, wright_omega


class TritonDivergence(NamedTuple):
    """The device functions and properties of a divergence; see the top of this file."""

    deficit: Any = None  # these three: None for the log-linear one
    log_ratio: Any = None
    log_slope: Any = None
    clamped: bool = False  # d is clamped below at -80
    bounded: bool = False  # sup f' is finite
    excess: Any = None  # these three: None without a Stieltjes form
    shift: Any = None
    unshift: Any = None  # tau from t
    root: bool = False  # the order is 1/a
    factor: bool = False  # the factor is 1 - t
    of_mass: str | None = None  # own_mass.py: kappa is m, but "at least 1" or "at most 1"

    @property
    def log_linear(self) -> bool:
        """Whether log pi* is a weighted sum of logits."""
        return self.deficit is None


@triton.jit
def identity(x, a):
    return x


@triton.jit
def forward_kl_deficit(d, a):
    return exp(-d)


@triton.jit
def forward_kl_log_ratio(q, a):
    return -log_of(q)


@triton.jit
def forward_kl_log_slope(q, a):
    return -2.0 * log_of(q)


@triton.jit
def jsd_deficit(d, a):
    # softplus(-d)
    return tl.maximum(-d, 0.0) + log1p_unit(exp(-tl.abs(d)))


@triton.jit
def one_minus_exp(q):
    # e^-q is 0 in float32 beyond 80.
    return -expm1(-tl.minimum(q, 80.0))


@triton.jit
def jsd_log_ratio(q, a):
    return -(q + log_of(one_minus_exp(q)))


@triton.jit
def jsd_log_slope(q, a):
    return -q - 2.0 * log_of(one_minus_exp(q))


@triton.jit
def jsd_excess(d, a):
    # 1 / expm1(tau + D) = e^-tau / ((1 - e^-tau) + expm1(D)); beyond D = 80 a sum ignores it.
    return expm1(tl.minimum(d, 80.0))


@triton.jit
def jsd_shift(tau, a):
    return -expm1(-tau)


@triton.jit
def jsd_unshift(t, a):
    # -log(1 - t), for small t by atanh's series: there 1 - t loses the digits of t.
    z = t / (2.0 - t)
    z2 = z * z
    series = (
        2.0 * z * (1.0 + z2 * (0.3333333333 + z2 * (0.2 + z2 * (0.1428571429 + z2 * 0.1111111))))
    )
    return tl.where(t < 0.25, series, -log_of(1.0 - tl.minimum(t, 0.99999994)))


@triton.jit
def alpha_deficit(d, a):
    return exp(-a * d) * (1.0 / a)


@triton.jit
def alpha_log_ratio(q, a):
    return -log_of(a * q) * (1.0 / a)


@triton.jit
def alpha_log_slope(q, a):
    return -(1.0 + 1.0 / a) * log_of(a * q)


@triton.jit
def alpha_scaled(x, a):
    # In units of 1/a, so that a small a does not overflow: H = (a tau + a D)^(-1/a).
    return a * x


@triton.jit
def alpha_unscaled(t, a):
    return t / a


@triton.jit
def small_alpha_deficit(d, a):
    # Relative to f'(1) = 0: beside 1/a float32 loses the differences.
    return expm1(-a * d) * (1.0 / a)


@triton.jit
def small_alpha_log_ratio(q, a):
    # log(1 + x), plus a correction for the rounding of 1 + x
    x = a * q
    rounded = 1.0 + x
    log = log_of(rounded) + (x - (rounded - 1.0)) * reciprocal(rounded)
    return tl.where(rounded > 0.0, log * (-1.0 / a), float("nan"))


@triton.jit
def small_alpha_log_slope(q, a):
    return (1.0 + a) * small_alpha_log_ratio(q, a)


@triton.jit
def jeffrey_deficit(d, a):
    return expm1(-d) - d


@triton.jit
def jeffrey_log_ratio(q, a):
    # v = 1/x solves v + log v = 1 + q; -log v cancels where v is large, v - z where it is small.
    z = 1.0 + q
    v = wright_omega(z)
    return tl.where(z > 0.0, -log_of(v), v - z)


@triton.jit
def jeffrey_log_slope(q, a):
    log_x = jeffrey_log_ratio(q, a)
    return 2.0 * log_x - (tl.maximum(log_x, 0.0) + log1p_unit(exp(-tl.abs(log_x))))


#: All divergences, by name. The deficit of a small alpha is relative to f'(1) = 0 and has no
#: Stieltjes form.
DIVERGENCES = {
    "reverse_kl": TritonDivergence(),
    "forward_kl": TritonDivergence(
        forward_kl_deficit, forward_kl_log_ratio, forward_kl_log_slope, clamped=True, bounded=True,
        excess=identity, shift=identity, unshift=identity,
    ),
    "jsd": TritonDivergence(
        jsd_deficit, jsd_log_ratio, jsd_log_slope, bounded=True,
        excess=jsd_excess, shift=jsd_shift, unshift=jsd_unshift, factor=True,
    ),
    "alpha": TritonDivergence(
        alpha_deficit, alpha_log_ratio, alpha_log_slope, clamped=True, bounded=True,
        excess=alpha_scaled, shift=alpha_scaled, unshift=alpha_unscaled, root=True,
    ),
    "small alpha": TritonDivergence(
        small_alpha_deficit, small_alpha_log_ratio, small_alpha_log_slope, clamped=True
    ),
    "jeffrey": TritonDivergence(
        jeffrey_deficit, jeffrey_log_ratio, jeffrey_log_slope, clamped=True
    ),
}  # fmt: skip


def device_functions(divergence: Divergence) -> TritonDivergence:
    """The device functions of a built-in or registered divergence.

    Raises:
        ValueError: if it has no device functions.
    """
    if divergence.triton is not None:
        return TritonDivergence(*divergence.triton, divergence.clamped, divergence.bounded)
    name = divergence.name.split(":")[0]
    if name == "alpha" and not divergence.bounded:
        name = "small alpha"
    if name not in DIVERGENCES:
        raise ValueError(f"divergence {divergence.name!r} has no Triton device functions")
    return DIVERGENCES[name]
