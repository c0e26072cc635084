"""The search for tau (docs/concepts.md): G(tau) = sum p H(tau + D) over a tile, and the step
towards G = 1 over a row. D = Q - min Q is a token's excess.

With a Stieltjes form (divergences.py) the search is for t = shift(tau). G is then a sum of poles
p / (t + x)^order, and a step solves a model of G with two poles. Without one it takes Newton steps
in tau. A *point* is a trial value of t or tau.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import EXCLUDED, INFINITY, TILE
from .elementary import exp, log_of, reciprocal
from .own_mass import parameter
from .parts import by_tile, part_field, part_sums, places, store_parts, two_sums
from .tiles import deficit_tile
from .workspace import (
    BEST_MASS,
    BEST_TOKEN,
    EVALUATED,
    LEAST,
    LOWER,
    MASS,
    POINT,
    S1,
    S2,
    SOLVED,
    STEPS,
    UPPER,
)

#: Below this |log G| a short step is the last: its error is about log G squared, the rounding of
#: float32 sums.
LAST_STEP = tl.constexpr(1e-3)
LAST_RATIO = tl.constexpr(1e-2)
TOLERANCE = tl.constexpr(1e-6)  # the rounding of log G in float32 sums


@triton.jit
def weighted_ratios(p, y, mixing, state, variant: tl.constexpr):
    """p H and p (-H') at y = tau + D. With a Stieltjes form: p y^-order and that over y, at y = t +
    x. p comes first: without it the slope of a token whose p is e^-50 is beyond float32."""
    if variant.excess is not None:
        fall = reciprocal(y)
        h = fall
        if variant.root:
            h = exp(-log_of(y) * (1.0 / mixing.alpha))
        weighted = p * h
        return weighted, weighted * fall
    else:
        a = parameter(mixing, state, variant)
        return p * exp(variant.log_ratio(y, a)), p * exp(variant.log_slope(y, a))


@triton.jit
def above_least(state, q, variant: tl.constexpr):
    """D = Q - min Q, float32. Q is float64 where the call has values, else float32."""
    distance = (q - tl.load(state + LEAST).to(q.dtype)).to(tl.float32)
    if variant.scores > 0:
        distance = tl.minimum(distance, EXCLUDED)  # other tokens may have values that large
    return distance


@triton.jit
def evaluation_of_tile(mixing, state, fields, row, tile, variant: tl.constexpr):
    """Store sum p H and sum p (-H') of a tile's parts at the row's point. With a Stieltjes form s*
    is left out: beside its pole float32 loses the other tokens."""
    log_ref, q, _ = deficit_tile(mixing, state, row, tile, variant)
    distance = above_least(state, q, variant)
    point = tl.load(state + POINT).to(tl.float32)
    if variant.excess is not None:
        # Off the support Q is so large that H is 0.
        best = tl.load(state + BEST_TOKEN).to(tl.int32) - tile * TILE
        p = exp(log_ref)
        if (best >= 0) & (best < TILE):
            p = tl.where(places(variant) == best, 0.0, p)
        y = point + variant.excess(distance, mixing.alpha)
    else:
        inside = q < EXCLUDED
        p = tl.where(inside, exp(log_ref), 0.0)
        y = point + tl.where(inside, distance, 0.0)
    h, slope = weighted_ratios(p, y, mixing, state, variant)
    store_parts(fields, S1, tile, (part_sums(h), part_sums(slope)), variant)


@triton.jit
def end_evaluation(mixing, state, fields, tiles, variant: tl.constexpr):
    """The step after an evaluation: store the next point."""
    if tl.load(state + SOLVED) == 0.0:
        s1, s2 = two_sums(
            part_field(fields, S1, tiles, variant, 0.0).to(tl.float64),
            part_field(fields, S2, tiles, variant, 0.0).to(tl.float64),
        )
        if variant.excess is not None:
            step_stieltjes(mixing, state, s1, s2, variant)
        else:
            step_newton(mixing, state, s1, s2, variant)


@triton.jit
def two_poles(near, far, distance, right, order, variant: tl.constexpr):
    """The y, a scalar, with near y^-order + far (y + distance)^-order = right, from the left."""
    # Start: bounding the power mean of the two poles by their sum gives a quadratic equation. Its
    # root is the solution for order 1, and left of the solution otherwise.
    inverse = 1.0 / order
    a = near
    b = far
    r = right
    if variant.root:
        a = tl.exp(tl.log(near) * inverse)
        b = tl.where(far > 0.0, tl.exp(tl.log(tl.where(far > 0.0, far, 1.0)) * inverse), 0.0)
        r = 2.0 * tl.exp(tl.log(0.5 * right) * inverse)
    p = r * distance - a - b
    root = tl.sqrt(p * p + 4.0 * r * a * distance)
    y = tl.where(p > 0.0, 2.0 * a * distance / (p + root), (root - p) / (2.0 * r))
    if variant.root:
        # Take the longer of two Newton steps. Both come from the left on a concave function, so
        # neither overshoots. The first uses the variable in which a single pole is a straight line,
        # which is good for close poles; the second subtracts the far pole from the right side.
        alone = tl.exp(tl.log(near / right) * inverse)
        together = tl.exp(tl.log((near + far) / right) * inverse) - distance
        y = tl.maximum(tl.maximum(y, alone), together)
        moved = y
        passes = 0
        while (passes < 8) & (moved > 1e-8 * y):
            a = near * tl.exp(-order * tl.log(y))
            b = far * tl.exp(-order * tl.log(y + distance))
            g = a + b
            ratio = tl.exp(tl.log(g / right) * inverse)
            step = (ratio - 1.0) * g / (a / y + b / (y + distance))
            left = right - b
            target = tl.exp(tl.log(near / left) * inverse)
            other = (target - y) / (1.0 + target / left * b / (y + distance))
            step = tl.where((left > 0.0) & (other > step), other, step)
            good = (y + step > 0.0) & (step == step)
            moved = tl.where(good, tl.abs(step), 0.0)
            y = tl.where(good, y + step, y)
            passes += 1
    return y


@triton.jit
def power(y, mixing, variant: tl.constexpr):
    """y^-order, float64."""
    if variant.root:
        return tl.exp(-tl.log(y) / tl.full([], mixing.alpha, tl.float64))
    else:
        return 1.0 / y


@triton.jit
def point_of_poles(mixing, near, far, distance, variant: tl.constexpr):
    """The t at which G is 1, if G is factor(t) (near t^-order + far (t + distance)^-order)."""
    order = tl.full([], 1.0, tl.float64)
    if variant.root:
        order = 1.0 / tl.full([], mixing.alpha, tl.float64)
    right = tl.full([], 1.0, tl.float64)
    if variant.factor:
        # (1 - t) (near / t + far / (t + distance)) = 1, with the factor multiplied out
        right = 1.0 + near + far
        far = far * (1.0 + distance)
    return two_poles(near, far, distance, right, order, variant)


@triton.jit
def secular_point(mixing, best, s1, s2, t, variant: tl.constexpr):
    """The t at which a model of G is 1. The model has two poles: that of s*, and one for all other
    tokens, with their sum and slope at `t`. (Eigenvalue updates solve the same *secular
    equation*.)"""
    pole = (s1 > 0.0) & (s2 > 0.0) & (s1 < INFINITY) & (s2 < INFINITY)
    distance = tl.where(pole, s1 / tl.where(pole, s2, 1.0) - t, 0.0)
    distance = tl.where(distance > 0.0, distance, 0.0)
    far = tl.where(pole, s1 / power(tl.where(pole, t + distance, 1.0), mixing, variant), 0.0)
    return point_of_poles(mixing, best, far, distance, variant)


@triton.jit
def secular_step(mixing, best, s1, s2, t, lower, upper, variant: tl.constexpr):
    """The next point with a Stieltjes form, the bracket, and whether that point is the solution.
    s1 and s2 are without s*."""
    g = s1 + best * power(t, mixing, variant)
    if variant.factor:
        g = g * (1.0 - t)
    log_g = tl.log(g)
    lower = tl.where(log_g > 0.0, t, lower)
    upper = tl.where(log_g <= 0.0, t, upper)
    good = (tl.abs(log_g) < INFINITY) & (tl.abs(s2) < INFINITY)
    following = secular_point(mixing, best, s1, s2, t, variant)
    inside = good & (following >= lower) & (following <= upper)
    otherwise = tl.where(tl.abs(log_g) < TOLERANCE, t, tl.sqrt(lower * upper))
    following = tl.where(inside, following, otherwise)
    last = inside & (tl.abs(log_g) < LAST_STEP) & (tl.abs(following - t) < LAST_RATIO * t)
    following = following.to(tl.float32).to(tl.float64)
    return following, lower, upper, last | (following == t)


@triton.jit
def step_stieltjes(mixing, state, s1, s2, variant: tl.constexpr):
    """Store the next point with a Stieltjes form. s1 and s2 are without s*."""
    t = tl.load(state + POINT)
    lower = tl.load(state + LOWER)
    upper = tl.load(state + UPPER)
    best = tl.load(state + BEST_MASS)
    following, lower, upper, done = secular_step(mixing, best, s1, s2, t, lower, upper, variant)
    tl.store(state + LOWER, lower)
    tl.store(state + UPPER, upper)
    tl.store(state + EVALUATED, t)
    tl.store(state + POINT, following)
    tl.store(state + SOLVED, tl.where(done, 1.0, 0.0))
    tl.store(state + STEPS, tl.load(state + STEPS) + 1.0)


@triton.jit
def solved_masses(mixing, state, fields, tiles, variant: tl.constexpr):
    """The masses of the tiles at the solution, float32, from the sums of the last evaluation, or of
    the moments: a part without s* is one pole there. The step from that evaluation is so short
    (LAST_STEP) that the error is about 1e-5 of the row's mass at most."""
    t = tl.load(state + POINT)
    step = (t - tl.load(state + EVALUATED)).to(tl.float32)
    behind = 0
    if not variant.root:
        behind = tl.where(tl.load(state + STEPS) == 0.0, MASS - S1, 0)  # solved by moments
    s1 = part_field(fields, behind + S1, tiles, variant, 0.0)
    s2 = part_field(fields, behind + S2, tiles, variant, 0.0)
    there = (s1 > 0.0) & (s2 > 0.0) & (s2 < INFINITY)
    growth = 1.0 + tl.where(there, step * s2 / tl.where(there, s1, 1.0), 0.0)
    if variant.root:
        mass = s1 * exp(-log_of(growth) * (1.0 / mixing.alpha))
    else:
        mass = s1 / growth
    mass = part_sums(by_tile(mass, variant))
    best = tl.load(state + BEST_TOKEN).to(tl.int32) // TILE
    near = (tl.load(state + BEST_MASS) * power(t, mixing, variant)).to(tl.float32)
    mass += tl.where(tl.arange(0, variant.tiles) == best, near, 0.0)
    if variant.factor:
        mass = mass * (1.0 - t).to(tl.float32)
    return mass


@triton.jit
def newton_point(mixing, state, tau, s1, s2, variant: tl.constexpr):
    """The point after a Newton step, for any divergence, on q(log G(tau)), which is almost a
    straight line; NaN or infinite where there is no step."""
    a = parameter(mixing, state, variant)
    q = variant.deficit(tl.log(s1).to(tl.float32), a)
    slope = tl.exp(variant.log_slope(q, a).to(tl.float64))
    return tau + (variant.deficit(tl.zeros([], tl.float32), a) - q).to(tl.float64) * slope / s2


@triton.jit
def step_newton(mixing, state, s1, s2, variant: tl.constexpr):
    """Store the next point without a Stieltjes form."""
    tau = tl.load(state + POINT)
    lower = tl.load(state + LOWER)
    upper = tl.load(state + UPPER)
    log_g = tl.log(s1)
    lower = tl.where(log_g > 0.0, tau, lower)
    upper = tl.where(log_g <= 0.0, tau, upper)
    newton = newton_point(mixing, state, tau, s1, s2, variant)
    good = (tl.abs(log_g) < INFINITY) & (newton > lower) & (newton < upper)
    following = tl.where(good, newton, 0.5 * (lower + upper)).to(tl.float32).to(tl.float64)
    short = tl.abs(following - tau) < LAST_RATIO * tl.maximum(tl.abs(tau), 1.0)
    last = good & (tl.abs(log_g) < LAST_STEP) & short
    done = last | (tl.abs(log_g) < TOLERANCE) | (following == tau)
    tl.store(state + LOWER, lower)
    tl.store(state + UPPER, upper)
    tl.store(state + POINT, tl.where(tl.abs(log_g) < TOLERANCE, tau, following))
    tl.store(state + SOLVED, tl.where(done, 1.0, 0.0))
    tl.store(state + STEPS, tl.load(state + STEPS) + 1.0)
