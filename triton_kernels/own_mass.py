"""The divergences of a whole response, measured from the mixture's own mass m of the response so
far, as in mod_fused/torch_kernels/own_mass.py, which derives them, and csrc/own_mass.h.

The parameter of their three functions is log m of the row, which `end_sums` stores. Forward KL and
alpha have no functions of their own: their f' is a power.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import SMALLEST_LOG_RATIO, SMALLEST_PREFIX_DIFFERENCE
from .divergences import (
    TritonDivergence,
    jsd_deficit,
    jsd_log_ratio,
    jsd_log_slope,
    one_minus_exp,
)
from .elementary import exp, log1p_unit, log_of, wright_omega
from .workspace import LOG_MASS

LARGEST_EXPONENT = tl.constexpr(80.0)
LARGEST_LOG_SCALE = tl.constexpr(70.0)


@triton.jit
def jsd_of_policy(d, a):
    scale = exp(tl.minimum(tl.maximum(a, 0.0), LARGEST_LOG_SCALE))
    # The deficit is e^-(d + log m) there: m times it is e^-d, however large m is.
    power = exp(tl.minimum(-d, LARGEST_EXPONENT))
    whole = tl.where(a > 0.0, d + a, 0.0)
    return tl.where(whole > 16.0, power, scale * jsd_deficit(d + tl.maximum(a, 0.0), a))


@triton.jit
def jsd_of_mass_deficit(d, a):
    return jsd_of_policy(d + tl.minimum(a, 0.0), a)


@triton.jit
def jsd_of_mass_log_ratio(y, a):
    q = y * exp(-tl.maximum(a, 0.0))
    t = tl.maximum(q, 1e-4)
    # log(expm1(q) / q) keeps its digits where m is so large that q underflows.
    rest = tl.where(q < 1e-4, 0.5 * q, -jsd_log_ratio(t, a) - log_of(t))
    # log m first: y + log m is small where both are large.
    below = -(y + a) - log_of(one_minus_exp(y))
    return tl.where(a > 0.0, -log_of(y) - rest, below)


@triton.jit
def jsd_of_mass_log_slope(y, a):
    above = y * exp(-tl.maximum(a, 0.0)) + 2.0 * jsd_of_mass_log_ratio(y, a)
    return tl.where(a > 0.0, above, jsd_log_slope(y, a) - a)


@triton.jit
def jeffrey_of_policy(d, a):
    power = exp(tl.minimum(-d, LARGEST_EXPONENT))
    return power - exp(tl.minimum(a, 0.0)) * (d + tl.minimum(a, 0.0) + 1.0)


@triton.jit
def jeffrey_of_mass_deficit(d, a):
    return jeffrey_of_policy(d + tl.maximum(a, 0.0), a)


@triton.jit
def jeffrey_of_mass_log_ratio(y, a):
    q = y * exp(tl.minimum(tl.maximum(-a, 0.0), LARGEST_LOG_SCALE))
    # v = 1/x solves v + log v = q + 1; from 1e15 on it is q, and 1 / (m x) is y.
    z = 1.0 + tl.minimum(q, 1e15)
    v = wright_omega(z)
    # log m first: q + log m is small where both are large.
    near = tl.where(z > 0.0, -log_of(v) - a, (v - 1.0) - (q + a))
    return tl.where(q < 1e15, near, -log_of(tl.where(q < 1e15, 1.0, y)))


@triton.jit
def jeffrey_of_mass_log_slope(y, a):
    log_ratio = jeffrey_of_mass_log_ratio(y, a)
    log_x = log_ratio + a
    softplus = tl.maximum(log_x, 0.0) + log1p_unit(exp(-tl.abs(log_x)))
    return 2.0 * log_ratio + tl.maximum(a, 0.0) - softplus


#: By the divergence's name.
OF_MASS = {
    "jsd": TritonDivergence(
        jsd_of_mass_deficit, jsd_of_mass_log_ratio, jsd_of_mass_log_slope, bounded=True,
        of_mass="at least 1",
    ),
    "jeffrey": TritonDivergence(
        jeffrey_of_mass_deficit, jeffrey_of_mass_log_ratio, jeffrey_of_mass_log_slope,
        clamped=True, of_mass="at most 1",
    ),
}  # fmt: skip


@triton.jit
def parameter(mixing, state, variant: tl.constexpr):
    """The parameter of the divergence's functions: alpha, or log m."""
    if variant.of_mass is None:
        return mixing.alpha
    else:
        return tl.load(state + LOG_MASS).to(tl.float32)


@triton.jit
def counted_mass(mixing, log_mass, least, variant: tl.constexpr):
    """log m as it counts, float64; `least` is the least prefix difference of the policies that
    count."""
    if variant.of_mass == "at least 1":
        least = tl.maximum(least, 0.0)
    counted = tl.minimum(log_mass, least - SMALLEST_PREFIX_DIFFERENCE / mixing.alpha)
    if variant.of_mass == "at least 1":
        counted = tl.where(log_mass < 0.0, log_mass, tl.maximum(counted, 0.0))
    elif variant.of_mass == "at most 1":
        counted = tl.where(counted < 0.0, counted, log_mass)
    return counted.to(tl.float32).to(tl.float64)


@triton.jit
def shift_of_mass(log_mass, variant: tl.constexpr):
    """What is taken off the policies' log-ratios: log kappa / alpha, float64."""
    if variant.of_mass == "at least 1":
        log_mass = tl.maximum(log_mass, 0.0)
    elif variant.of_mass == "at most 1":
        log_mass = tl.minimum(log_mass, 0.0)
    return log_mass


@triton.jit
def policy_deficit(d, mixing, state, variant: tl.constexpr):
    """The deficit of a policy's log-ratio, which `shift_of_mass` was taken off."""
    a = parameter(mixing, state, variant)
    if variant.clamped:
        least = SMALLEST_LOG_RATIO
        if variant.own_mass:
            least = SMALLEST_LOG_RATIO / mixing.alpha
        d = tl.maximum(d, least)
    if variant.of_mass is None:
        return variant.deficit(d, a)
    elif variant.of_mass == "at least 1":
        return jsd_of_policy(d, a)
    else:
        return jeffrey_of_policy(d, a)


@triton.jit
def tilt_scale(mixing, state, variant: tl.constexpr):
    """kappa of a row, float64."""
    log_scale = shift_of_mass(tl.load(state + LOG_MASS), variant) * mixing.alpha
    return tl.exp(tl.minimum(log_scale, LARGEST_LOG_SCALE))
