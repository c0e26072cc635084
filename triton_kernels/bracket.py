"""Deficits of a tile, and the bracket of tau that a row's deficits give (docs/concepts.md).

p is pi_ref of a token, Q its weighted deficit, D = Q - min Q its *excess*, s* the token where Q is
least. tau is the number for which the probabilities p H(tau + D) sum to 1; that sum is G(tau).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import EXCLUDED, INFINITY, TILE
from .elementary import exp, reciprocal
from .moments import solve_by_moments
from .normalizer import newton_point, point_of_poles, secular_point, weighted_ratios
from .own_mass import parameter
from .parameters import reference_weight, weight
from .parts import four_sums, part_field, part_sums, places, store_parts
from .tiles import deficit_tile
from .workspace import (
    BEST_MASS,
    BEST_P,
    BEST_TOKEN,
    FIRST,
    LEAST,
    LEAST_Q,
    LEAST_REST,
    LOWER,
    MASS,
    POINT,
    S1,
    S2,
    SOLVED,
    STEPS,
    UPPER,
    VALID,
    WINNER,
)

WIDEN = tl.constexpr(1e-4)
ROUNDING = tl.constexpr(1e-5)  # of float32 sums over a row


@triton.jit
def start_offset(mixing, state, row, variant: tl.constexpr):
    return reference_weight(mixing, row, variant) * variant.deficit(
        tl.zeros([], tl.float32), parameter(mixing, state, variant)
    )


@triton.jit
def start_y(q, mixing, state, row, variant: tl.constexpr):
    """The argument of H at the first point, y of `weighted_ratios`."""
    y = (q + start_offset(mixing, state, row, variant)).to(tl.float32)
    if variant.excess is not None:
        y = variant.excess(y, mixing.alpha)
    return y


@triton.jit
def start_ratios(p, q, mixing, state, row, variant: tl.constexpr):
    """`weighted_ratios` at the first point, where G is summed together with the deficits: tau =
    least + `start_offset`. There Z = 0 if the reference counts as a policy of weight 1 - sum w."""
    return weighted_ratios(p, start_y(q, mixing, state, row, variant), mixing, state, variant)


@triton.jit
def deficits_of_tile(mixing, state, fields, row, tile, tiles, variant: tl.constexpr):
    """Store a tile's sums for the bracket, and its part of the first evaluation."""
    log_ref, q, broken = deficit_tile(mixing, state, row, tile, variant)
    inside = q < EXCLUDED
    i = places(variant)
    p = tl.where(inside, exp(log_ref), 0.0)
    least = tl.min(q, 1)
    best = tl.min(tl.where(q == least[:, None], i, TILE - 1), 1)
    is_best = i == best[:, None]
    high = least.to(tl.float32)
    rest = (least - high).to(tl.float32)
    mass = part_sums(tl.where(broken, float("nan"), p))
    first = part_sums(p * q.to(tl.float32))
    best_p = part_sums(tl.where(is_best, p, 0.0))
    if variant.excess is not None:
        p = tl.where(is_best, 0.0, p)  # it may be s*; `end_deficits` adds the others
    else:
        q = tl.where(inside, q, 1.0)
    y = start_y(q, mixing, state, row, variant)
    h, slope = weighted_ratios(p, y, mixing, state, variant)
    sums = (part_sums(h), part_sums(slope))
    if (variant.excess is not None) and not variant.root:
        fall = reciprocal(y)
        third = slope * fall
        sums = sums + (part_sums(third), part_sums(third * fall))
    numbers = (mass, first, best_p, high, rest, best + tile * TILE) + sums
    store_parts(fields, MASS, tile, numbers, variant)


@triton.jit
def end_deficits(mixing, state, fields, row, tiles, variant: tl.constexpr):
    """Store s*, the bracket of the point where G is 1, and the next point to evaluate."""
    MODELS: tl.constexpr = variant.models
    i = tl.arange(0, variant.tiles * variant.parts)
    there = i < tiles * variant.parts
    least_of = part_field(fields, LEAST_Q, tiles, variant, EXCLUDED).to(tl.float64)
    least_of += part_field(fields, LEAST_REST, tiles, variant, 0.0)
    least, best_part = tl.min(least_of, 0, return_indices=True, return_indices_tie_break_left=True)
    best_record = fields + best_part * variant.record
    best_token = tl.load(best_record + WINNER, cache_modifier=".cg").to(tl.int32, bitcast=True)
    best = tl.load(best_record + BEST_P, cache_modifier=".cg").to(tl.float64)
    s1 = part_field(fields, S1, tiles, variant, 0.0).to(tl.float64)
    s2 = part_field(fields, S2, tiles, variant, 0.0).to(tl.float64)
    if variant.excess is not None:
        # Each part's sums lack its best token: add all of these but s*.
        others = there & (i != best_part) & (least_of < EXCLUDED)
        p = tl.where(others, part_field(fields, BEST_P, tiles, variant, 0.0), 0.0)
        q = tl.where(others, least_of, least)
        h, slope = start_ratios(p, q, mixing, state, row, variant)
        s1 += h.to(tl.float64)
        s2 += slope.to(tl.float64)
    mass, first, s1, s2 = four_sums(
        part_field(fields, MASS, tiles, variant, 0.0).to(tl.float64),
        part_field(fields, FIRST, tiles, variant, 0.0).to(tl.float64),
        s1,
        s2,
    )
    good = (tl.abs(least) < EXCLUDED) & (mass > 0.0) & (best > 0.0)
    mass = tl.where(good, mass, 1.0)
    best = tl.where(good, best, 1.0)

    a = parameter(mixing, state, variant)
    upper = variant.deficit(-tl.log(mass).to(tl.float32), a).to(tl.float64)
    lower = variant.deficit(-tl.log(best).to(tl.float32), a).to(tl.float64)
    mean = first / mass
    # The mean of D bounds tau from below (Jensen), less the rounding of the sums.
    jensen = upper - (mean - least + ROUNDING * (tl.abs(mean) + tl.abs(least)))
    lower = tl.where(jensen > lower, jensen, lower)
    if variant.bounded:
        if variant.simplex:
            # On the simplex, without tilt and prefix, Z <= 0.
            total = tl.zeros([], tl.float64)
            positive = tl.full([], True, tl.int1)
            for k in tl.static_range(1, MODELS):
                own = weight(mixing, row, k - 1)
                total += own
                positive &= own >= 0.0
            # float32 weights sum to one within their rounding
            if tl.abs(total - 1.0) < 1e-6:
                upper = tl.where(positive & (least < upper), least, upper)
        lower = lower * (1.0 - WIDEN)
        upper = upper * (1.0 + WIDEN)
    elif variant.of_mass is not None:
        # Where m is small H all but has a pole at 0.
        scale = tl.exp(tl.minimum(a, 0.0)).to(tl.float64)
        lower -= WIDEN * (tl.abs(lower) + scale)
        upper += WIDEN * (tl.abs(upper) + scale)
    else:
        lower -= WIDEN
        upper += WIDEN
    upper = tl.where(upper < lower, lower, upper)
    tl.store(state + LEAST, least)
    tl.store(state + BEST_TOKEN, best_token.to(tl.float64))
    tl.store(state + BEST_MASS, best)
    valid = tl.load(state + VALID)
    tl.store(state + VALID, tl.where(good, valid, 0.0))

    # The first step, from the sums of the first evaluation.
    tau = least + start_offset(mixing, state, row, variant).to(tl.float64)
    usable = good
    if variant.bounded:
        usable = good & (tau > 0.0)
    tau = tl.where(usable, tau, 1.0)
    tl.store(state + STEPS, 0.0)
    tl.store(state + SOLVED, 0.0)
    if variant.excess is not None:
        growth = tl.full([], 1.0, tl.float64)
        if variant.factor:
            # There y is expm1(tau + D) = e^tau (t + x).
            growth = tl.exp(tau)
            s1 *= growth
            s2 *= growth * growth
        lower = variant.shift(lower.to(tl.float32), mixing.alpha).to(tl.float64)
        upper = variant.shift(upper.to(tl.float32), mixing.alpha).to(tl.float64)
        tl.store(state + LOWER, lower)
        tl.store(state + UPPER, upper)
        tau = variant.shift(tau.to(tl.float32), mixing.alpha).to(tl.float64)
        following = secular_point(mixing, best, s1, s2, tau, variant)
        usable = usable & (s1 < INFINITY) & (s2 < INFINITY)
        usable = usable & (following >= lower) & (following <= upper)
        tl.debug_barrier()  # sums that have been read are overwritten
        if usable:
            if not variant.root:
                following = solve_by_moments(
                    mixing, state, fields, best_part, best, least, tau, growth, following, lower,
                    upper, tiles, variant,
                )  # fmt: skip
        else:
            # Without those sums: all tokens but s* at their mean deficit, left of the solution.
            rest = tl.maximum(mass - best, 0.0)
            apart = tl.maximum(mean - least, 0.0) * mass / tl.where(rest > 0.0, rest, 1.0)
            far = variant.excess(tl.minimum(apart, EXCLUDED).to(tl.float32), mixing.alpha)
            following = point_of_poles(mixing, best, rest, far.to(tl.float64), variant)
            inside = (following >= lower) & (following <= upper)
            following = tl.where(inside, following, tl.sqrt(lower * upper))
    else:
        following = newton_point(mixing, state, tau, s1, s2, variant)
        usable = usable & (following >= lower) & (following <= upper)
        following = tl.where(usable, following, lower)
        tl.store(state + LOWER, lower)
        tl.store(state + UPPER, upper)
    tl.store(state + POINT, following.to(tl.float32).to(tl.float64))
