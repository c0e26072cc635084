"""The search for tau without a sweep, from moments of the first evaluation. For Stieltjes forms of
order 1: forward KL, Jensen-Shannon.

The first evaluation has summed, for each part of a tile and without its best token,

    S_k = sum h u^(k-1),   k = 1 to 4,     h = p / (t0 + x),   u = 1 / (t0 + x)

at its point t0. At another point t the part's sum is that of h / (1 + (t - t0) u). Gauss quadrature
takes two values of u for all of the part's, and weights such that the four moments are right;
Radau's takes the largest u and another, and three moments are right. For t < t0 all derivatives of
the function of u are positive. So Gauss' sum is no larger than the part's and Radau's no smaller:
their difference bounds the error (Golub and Meurant, Matrices, Moments and Quadrature, 1994).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import EXCLUDED, INFINITY
from .elementary import reciprocal
from .normalizer import secular_step
from .parts import four_sums
from .workspace import (
    BEST_P,
    EVALUATED,
    FIRST,
    LEAST_Q,
    LEAST_REST,
    LOWER,
    MASS,
    S1,
    S2,
    S3,
    S4,
    SOLVED,
    UPPER,
)

#: A row is solved where the two quadratures differ by less in total, and rounding changes less.
MOST_DIFFERENCE = tl.constexpr(1e-5)
MOST_NOISE = tl.constexpr(2e-6)
MOMENT_ROUNDING = tl.constexpr(2e-7)  # of a part's sums
LEAST_VARIANCE = tl.constexpr(2e-6)  # of u, over its mean squared: less is rounding
ONE_VALUE = tl.constexpr(1e-6)  # the mean is as near to the largest u
LARGEST_MOMENT = tl.constexpr(1e18)  # over the mean's power: its square is below float32's largest
MOST_PASSES = tl.constexpr(4)


@triton.jit
def quadrature(s1, s2, s3, s4, most):
    """Values u and weights of a part's two quadratures: Gauss' low and high one; then Radau's inner
    one, whose other value is `most`, the largest u. Last whether float32 holds the moments."""
    there = (s1 > 0.0) & (s2 > 0.0) & (s2 < INFINITY)
    mean = tl.where(there, s2 / tl.where(there, s1, 1.0), 0.0)
    scale = tl.where(there, s2 * mean, 1.0)
    third = tl.where(there, s3 / scale, 1.0)  # moments of u over its mean
    fourth = tl.where(there, s4 / tl.where(there, scale * mean, 1.0), 1.0)
    # The values over the mean solve a v^2 - b v + c = 0.
    a = third - 1.0
    b = fourth - third
    c = fourth - third * third
    two = there & (a > LEAST_VARIANCE) & (b > 0.0) & (c > 0.0) & (fourth < LARGEST_MOMENT)
    a = tl.where(two, a, 1.0)
    b = tl.where(two, b, 2.0)
    c = tl.where(two, c, 1.0)
    wide = b + tl.sqrt(tl.maximum(b * b - 4.0 * a * c, 0.0))
    high = wide / (2.0 * a)
    low = 2.0 * c / wide
    bound = tl.where(there, most / tl.where(there, mean, 1.0), 1.0)
    high = tl.minimum(high, bound)
    two = two & (low < 1.0) & (high > 1.0)
    share = tl.where(two, (1.0 - low) / tl.where(two, high - low, 1.0), 0.0)
    high = tl.where(two, high, 1.0) * mean
    low = tl.where(two, low, 1.0) * mean
    weight = tl.where(there, s1, 0.0)
    # Radau's: one value is `most`, and three moments are right.
    apart = there & (bound > 1.0 + ONE_VALUE)
    # Rounded so that `most` weighs rather more.
    inner = bound - third * (1.0 + 2.0 * MOMENT_ROUNDING)
    inner = tl.where(apart, inner / tl.where(apart, bound - 1.0, 1.0), 1.0)
    inner = tl.minimum(tl.maximum(inner, 0.0), 1.0)
    inner_share = tl.where(apart, (bound - 1.0) / tl.where(apart, bound - inner, 1.0), 1.0)
    # The third moment is at least 1, unless it has underflown.
    sound = (s1 == 0.0) | (there & (third > 1.0 - 1e-5) & (third < LARGEST_MOMENT))
    low_weight, high_weight = weight * (1.0 - share), weight * share
    return low, low_weight, high, high_weight, inner * mean, weight * inner_share, sound


@triton.jit
def moved(weight, u, step):
    """weight / (1 + step u), and 1 / (1 + step u)."""
    fall = reciprocal(tl.maximum(1.0 + step * u, 1e-6))
    return weight * fall, fall


@triton.jit
def load_number(pointers, there):
    """Numbers of a row's parts."""
    return tl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def block_at(
    mixing, fields, begin, best_part, least, start, growth, t, tiles, variant: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a block of parts at `t`, without s*, stored in their fields MASS and FIRST, which
    have been read: those of an evaluation, how far the two quadratures differ, and what rounding
    changes."""
    i = begin + tl.arange(0, BLOCK)
    there = i < tiles * variant.parts
    own = fields + i * variant.record
    s1 = load_number(own + S1, there) * growth
    s2 = load_number(own + S2, there) * (growth * growth)
    s3 = load_number(own + S3, there) * (growth * growth * growth)
    s4 = load_number(own + S4, there) * (growth * growth * growth * growth)
    # The part's best token, which the moments lack.
    p = load_number(own + BEST_P, there)
    q = load_number(own + LEAST_Q, there).to(tl.float64) + load_number(own + LEAST_REST, there)
    other = there & (i != best_part) & (q < EXCLUDED)
    x = variant.excess(tl.where(other, q - least, 0.0).to(tl.float32), mixing.alpha)
    most = 1.0 / (start.to(tl.float32) + x)
    low, low_weight, high, high_weight, inner, inner_weight, sound = quadrature(
        s1, s2, s3, s4, most
    )
    step = (t - start).to(tl.float32)
    low_mass, low_fall = moved(low_weight, low, step)
    high_mass, high_fall = moved(high_weight, high, step)
    inner_mass, _ = moved(inner_weight, inner, step)
    outer_mass, outer_fall = moved(low_weight + high_weight - inner_weight, most, step)
    mass = low_mass + high_mass
    slope = low_mass * low * low_fall + high_mass * high * high_fall
    difference = tl.where(sound, tl.abs(inner_mass + outer_mass - mass), s1 * outer_fall)
    # Rounding of h, and of u where 1 + step u is small.
    far = high_fall - 1.0
    noise = mass * (MOMENT_ROUNDING * high_fall + LEAST_VARIANCE * far * far)
    fall = reciprocal(t.to(tl.float32) + x)
    best = tl.where(other, p * fall, 0.0)
    mass += best
    slope += best * fall
    tl.store(own + MASS, mass, mask=there)
    tl.store(own + FIRST, slope, mask=there)
    return mass, slope, difference, noise


@triton.jit
def solve_by_moments(
    mixing, state, fields, best_part, best, least, start, growth, following, lower, upper, tiles,
    variant: tl.constexpr,
):  # fmt: skip
    """Search for the t at which G is 1, from `following` on, with the parts' sums taken from
    their moments. If these are good enough, the row is solved.

    Args:
        best_part, best, least: the part of s*, its p and its Q.
        start, growth: t0, and what h and u of the first evaluation are to be multiplied by.
        lower, upper: the bracket of t.

    Returns the point to go on with.
    """
    BLOCK: tl.constexpr = (
        128 if variant.tiles * variant.parts > 128 else (variant.tiles * variant.parts)
    )
    t = following
    good = tl.full([], False, tl.int1)
    done = tl.full([], False, tl.int1)
    passes = 0
    while (passes < MOST_PASSES) & (done == 0):
        t = following
        mass = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        difference = tl.zeros([BLOCK], tl.float32)
        noise = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, tiles * variant.parts, BLOCK):
            own = block_at(
                mixing, fields, begin, best_part, least, start, growth.to(tl.float32), t, tiles,
                variant, BLOCK,
            )  # fmt: skip
            mass += own[0]
            slope += own[1]
            difference += own[2]
            noise += own[3]
        g, slopes, differences, noises = four_sums(mass, slope, difference, noise)
        following, lower, upper, done = secular_step(
            mixing, best, g.to(tl.float64), slopes.to(tl.float64), t, lower, upper, variant
        )
        factor = tl.full([], 1.0, tl.float32)
        if variant.factor:
            factor = (1.0 - t).to(tl.float32)
        good = (differences * factor < MOST_DIFFERENCE) & (noises * factor < MOST_NOISE)
        # Else the difference bounds nothing, or float32 does not hold the terms.
        good &= (t <= start * (1.0 + 1e-6)) & (t > start * 1e-5) & (growth < 1e5)
        passes += 1
    if done & good:
        tl.store(state + LOWER, lower)
        tl.store(state + UPPER, upper)
        tl.store(state + EVALUATED, t)
        tl.store(state + SOLVED, 1.0)
    return following
