"""What happens between two phases of a row, by the program that ends the first: reductions over the
row's tiles, the bracket of tau and the steps towards it (design §2). `m` is a `Mixing`, `C` a
`Variant` (launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import exp, log_of, reciprocal
from .tiles import (
    BEST_MASS,
    BEST_TOKEN,
    EXCLUDED,
    INFINITY,
    LEAST,
    LOG_NORM,
    LOWER,
    PEAK,
    POINT,
    SHIFT,
    SOLVED,
    STEPS,
    UPPER,
    VALID,
    level_of,
    own_coefficient,
    reference_weight,
    weight,
)

#: Prefix differences below it are shifted up together.
SMALLEST_PREFIX_DIFFERENCE = tl.constexpr(-40.0)
#: Below this |log G| a short step is the last: its error is about the square, what float32 sums
#: leave.
LAST_STEP = tl.constexpr(1e-3)
LAST_RATIO = tl.constexpr(1e-2)
TOLERANCE = tl.constexpr(1e-6)  # where float32 sums leave log G
WIDEN = tl.constexpr(1e-4)
ROUNDING = tl.constexpr(1e-5)  # of float32 sums over a row

# Fields of a tile, float32 [fields, C.tiles] a row; 2 * models more stand before them.
KEY_PEAK = tl.constexpr(0)
KEY_SUM = tl.constexpr(1)  # sum exp(key - peak); NaN where a tensor that counts is broken
DRAW_PEAK = tl.constexpr(2)  # the same after the mask and at the temperature
DRAW_SUM = tl.constexpr(3)
MASS = tl.constexpr(4)  # sum p; NaN where a value is broken
FIRST = tl.constexpr(5)  # sum p Q
S1 = tl.constexpr(6)  # sum p H, sum p (-H'); of a Stieltjes kernel see `ratios`
S2 = tl.constexpr(7)
BEST_P = tl.constexpr(8)  # p of the tile's argmin Q
TILE_FIELDS = tl.constexpr(9)


@triton.jit
def tile_field(fields, field, tiles, C: tl.constexpr, OTHER: tl.constexpr):
    """One number per tile of a row."""
    i = tl.arange(0, C.tiles)
    return tl.load(fields + field * C.tiles + i, mask=i < tiles, other=OTHER, cache_modifier=".cg")


@triton.jit
def log_sum_exp(fields, field, tiles, C: tl.constexpr):
    """max and log-sum-exp of a row out of its tiles' (max, sum exp(. - max)) at field, field + 1;
    NaN where a sum is."""
    peaks = tile_field(fields, field, tiles, C, float("-inf"))
    sums = tile_field(fields, field + 1, tiles, C, 0.0)
    peak = tl.max(peaks, 0)
    scaled = exp(peaks - tl.where(peak == -INFINITY, 0.0, peak))
    parts = tl.where(peaks == -INFINITY, 0.0, scaled).to(tl.float64) * sums.to(tl.float64)
    return peak.to(tl.float64), tl.log(tl.sum(parts, 0)) + peak


@triton.jit
def store_model_norms(state, fields, tiles, C: tl.constexpr):
    """`log_sum_exp` of all models at once, into the row's state."""
    k = tl.arange(0, C.model_block)
    i = tl.arange(0, C.tiles)
    pointers = fields + 2 * k[:, None] * C.tiles + i[None, :]
    there = (k[:, None] < C.models) & (i[None, :] < tiles)
    peaks = tl.load(pointers, mask=there, other=-INFINITY, cache_modifier=".cg")
    sums = tl.load(pointers + C.tiles, mask=there, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, 1)
    scaled = exp(peaks - tl.where(peak == -INFINITY, 0.0, peak)[:, None])
    parts = tl.where(peaks == -INFINITY, 0.0, scaled).to(tl.float64) * sums.to(tl.float64)
    norm = tl.log(tl.sum(parts, 1)) + peak
    tl.store(state + LOG_NORM + k, norm, mask=k < C.models)
    tl.store(state + PEAK + k, peak.to(tl.float64), mask=k < C.models)
    tl.debug_barrier()


@triton.jit
def prefix_of(m, row, k: tl.constexpr):
    """Log-probability of the response so far under model k, float64."""
    offset = row.to(tl.int64) * m.prefix_strides[0] + k * m.prefix_strides[1]
    return tl.load(m.prefix + offset).to(tl.float64)


@triton.jit
def end_sums(m, state, fields, row, tiles, C: tl.constexpr):
    """Log-sum-exps, shifts of d, and whether a model that counts is broken."""
    MODELS: tl.constexpr = C.models
    FIRST_POLICY: tl.constexpr = C.first_policy
    valid = tl.full([], 1.0, tl.float64)
    ref_norm = tl.zeros([], tl.float64)
    store_model_norms(state, fields, tiles, C)
    for k in tl.static_range(MODELS):
        norm = tl.load(state + LOG_NORM + k)
        if k < FIRST_POLICY:
            ref_norm = norm
            counts = tl.full([], True, tl.int1)
            if C.general == 0:
                counts = own_coefficient(m, row, C) != 0.0
        else:
            counts = weight(m, row, k - FIRST_POLICY) != 0.0
        if k == C.plausible:
            counts = tl.full([], True, tl.int1)
        valid = tl.where(counts & ((tl.abs(norm) < INFINITY) == 0), 0.0, valid)
    if C.general:
        lift = tl.zeros([], tl.float64)
        if m.prefix is not None:
            ref_prefix = prefix_of(m, row, 0)
            for k in tl.static_range(MODELS):
                own = prefix_of(m, row, k)
                counts = tl.full([], True, tl.int1)
                if k > 0:
                    counts = weight(m, row, k - 1) != 0.0
                valid = tl.where(counts & ((tl.abs(own) < INFINITY) == 0), 0.0, valid)
                short = tl.where(counts, SMALLEST_PREFIX_DIFFERENCE - (own - ref_prefix), 0.0)
                if C.clamped:
                    lift = tl.maximum(lift, short)
        ref_rest = ref_norm - level_of(state, 0)
        for k in tl.static_range(1, MODELS):
            shift = ref_rest - (tl.load(state + LOG_NORM + k) - level_of(state, k))
            if m.prefix is not None:
                shift += prefix_of(m, row, k) - prefix_of(m, row, 0) + lift
            tl.store(state + SHIFT + k, shift)
    tl.store(state + VALID, valid)


@triton.jit
def ratios(y, m, C: tl.constexpr):
    """H and -H' at y = tau + D; of a Stieltjes kernel y^(-1/order) and the same over y, where y is
    t + x."""
    if C.excess is not None:
        fall = reciprocal(y)
        h = fall
        if C.is_alpha:
            h = exp(-log_of(y) * (1.0 / m.alpha))
        slope = h * fall
    else:
        h = exp(C.log_ratio(y, m.alpha))
        slope = exp(C.log_slope(y, m.alpha))
    return h, slope


@triton.jit
def start_ratios(q, m, row, C: tl.constexpr):
    """`ratios` where G is evaluated first, beside the deficits: where Z = 0 if the reference counts
    as one policy more, of the weight that the others leave. Its tau is least + `start_offset`."""
    y = (q + start_offset(m, row, C)).to(tl.float32)
    if C.excess is not None:
        y = C.excess(y, m.alpha)
    return ratios(y, m, C)


@triton.jit
def start_offset(m, row, C: tl.constexpr):
    return reference_weight(m, row, C) * C.deficit(tl.zeros([], tl.float32), m.alpha)


@triton.jit
def end_deficits(m, w, state, fields, row, tiles, C: tl.constexpr):
    """s*, the bracket of the point at which G is 1, and where it is evaluated next."""
    MODELS: tl.constexpr = C.models
    i = tl.arange(0, C.tiles)
    leasts = w.leasts + row.to(tl.int64) * tiles
    winners = w.winners + row.to(tl.int64) * tiles
    least_of = tl.load(leasts + i, mask=i < tiles, other=EXCLUDED, cache_modifier=".cg")
    least = tl.min(least_of, 0)
    best_tile = tl.min(tl.where((least_of == least) & (i < tiles), i, C.tiles - 1), 0)
    best_token = tl.load(winners + best_tile, cache_modifier=".cg")
    best = tl.load(fields + BEST_P * C.tiles + best_tile, cache_modifier=".cg").to(tl.float64)
    mass = tl.sum(tile_field(fields, MASS, tiles, C, 0.0).to(tl.float64), 0)
    first = tl.sum(tile_field(fields, FIRST, tiles, C, 0.0).to(tl.float64), 0)
    good = (tl.abs(least) < EXCLUDED) & (mass > 0.0) & (best > 0.0)
    mass = tl.where(good, mass, 1.0)
    best = tl.where(good, best, 1.0)

    upper = C.deficit(-tl.log(mass).to(tl.float32), m.alpha).to(tl.float64)
    lower = C.deficit(-tl.log(best).to(tl.float32), m.alpha).to(tl.float64)
    mean = first / mass
    # E[D], and what the sums' rounding may have taken from it.
    jensen = upper - (mean - least + ROUNDING * (tl.abs(mean) + tl.abs(least)))
    lower = tl.where(jensen > lower, jensen, lower)
    if C.bounded:
        if C.simplex:
            # On the simplex, without tilt and prefix, Z <= 0.
            total = tl.zeros([], tl.float64)
            positive = tl.full([], True, tl.int1)
            for k in tl.static_range(1, MODELS):
                own = weight(m, row, k - 1)
                total += own
                positive &= own >= 0.0
            # float32 weights sum to one within their rounding
            if tl.abs(total - 1.0) < 1e-6:
                upper = tl.where(positive & (least < upper), least, upper)
        lower = lower * (1.0 - WIDEN)
        upper = upper * (1.0 + WIDEN)
    else:
        lower -= WIDEN
        upper += WIDEN
    upper = tl.where(upper < lower, lower, upper)
    tl.store(state + LEAST, least)
    tl.store(state + BEST_TOKEN, best_token.to(tl.float64))
    tl.store(state + BEST_MASS, best)
    valid = tl.load(state + VALID)
    tl.store(state + VALID, tl.where(good, valid, 0.0))

    # The first step, from the sums beside the deficits.
    s1 = tl.sum(tile_field(fields, S1, tiles, C, 0.0).to(tl.float64), 0)
    s2 = tl.sum(tile_field(fields, S2, tiles, C, 0.0).to(tl.float64), 0)
    tau = least + start_offset(m, row, C).to(tl.float64)
    usable = good
    if C.bounded:
        usable = good & (tau > 0.0)
    tau = tl.where(usable, tau, 1.0)
    if C.excess is not None:
        # The best token of each tile is missing in its sums: all but s* are added.
        others = (i < tiles) & (i != best_tile) & (least_of < EXCLUDED)
        h, slope = start_ratios(tl.where(others, least_of, least), m, row, C)
        p = tl.where(others, tile_field(fields, BEST_P, tiles, C, 0.0), 0.0).to(tl.float64)
        s1 += tl.sum(p * h.to(tl.float64), 0)
        s2 += tl.sum(p * slope.to(tl.float64), 0)
        if C.is_jsd:
            # There y is expm1(tau + D) = e^tau (t + x).
            growth = tl.exp(tl.minimum(tau, 300.0))
            s1 *= growth
            s2 *= growth * growth
        lower = C.shift(lower.to(tl.float32), m.alpha).to(tl.float64)
        upper = C.shift(upper.to(tl.float32), m.alpha).to(tl.float64)
        tau = C.shift(tau.to(tl.float32), m.alpha).to(tl.float64)
        # Without those sums: everything but s* at its mean deficit, which is left of the solution.
        rest = tl.maximum(mass - best, 0.0)
        apart = tl.maximum(mean - least, 0.0) * mass / tl.where(rest > 0.0, rest, 1.0)
        distance = C.excess(tl.minimum(apart, EXCLUDED).to(tl.float32), m.alpha).to(tl.float64)
        point = point_of_poles(m, best, rest, distance, C)
        point = tl.where((point >= lower) & (point <= upper), point, tl.sqrt(lower * upper))
        following = secular_point(m, best, s1, s2, tau, C)
        usable = usable & (s1 < INFINITY) & (s2 < INFINITY)
    else:
        point = lower
        following = newton_point(m, tau, s1, s2, C)
    usable = usable & (following >= lower) & (following <= upper)
    tl.store(state + LOWER, lower)
    tl.store(state + UPPER, upper)
    tl.store(state + POINT, tl.where(usable, following, point).to(tl.float32).to(tl.float64))
    tl.store(state + STEPS, 0.0)
    tl.store(state + SOLVED, 0.0)


@triton.jit
def two_poles(near, far, distance, right, order, C: tl.constexpr):
    """y with near y^-order + far (y + distance)^-order = right."""
    # The norm of two numbers that the order makes is at least its largest ratio to their sum, which
    # makes a quadratic equation: its root is the solution for order 1, otherwise left of it.
    inverse = 1.0 / order
    a = near
    b = far
    r = right
    if C.is_alpha:
        a = tl.exp(tl.log(near) * inverse)
        b = tl.where(far > 0.0, tl.exp(tl.log(tl.where(far > 0.0, far, 1.0)) * inverse), 0.0)
        r = 2.0 * tl.exp(tl.log(0.5 * right) * inverse)
    p = r * distance - a - b
    root = tl.sqrt(p * p + 4.0 * r * a * distance)
    y = tl.where(p > 0.0, 2.0 * a * distance / (p + root), (root - p) / (2.0 * r))
    if C.is_alpha:
        # Two Newton steps that climb from the left, each on a concave function: in the variable in
        # which one pole alone is a straight line, for poles close together, and on what the far
        # one leaves to the near one.
        alone = tl.exp(tl.log(near / right) * inverse)
        together = tl.exp(tl.log((near + far) / right) * inverse) - distance
        y = tl.maximum(tl.maximum(y, alone), together)
        for _ in range(8):
            a = near * tl.exp(-order * tl.log(y))
            b = far * tl.exp(-order * tl.log(y + distance))
            g = a + b
            ratio = tl.exp(tl.log(g / right) * inverse)
            step = (ratio - 1.0) * g / (a / y + b / (y + distance))
            left = right - b
            target = tl.exp(tl.log(near / left) * inverse)
            other = (target - y) / (1.0 + target / left * b / (y + distance))
            step = tl.where((left > 0.0) & (other > step), other, step)
            y = tl.where((y + step > 0.0) & (step == step), y + step, y)
    return y


@triton.jit
def power(y, m, C: tl.constexpr):
    """y^-order, float64."""
    if C.is_alpha:
        return tl.exp(-tl.log(y) / tl.full([], m.alpha, tl.float64))
    else:
        return 1.0 / y


@triton.jit
def point_of_poles(m, near, far, distance, C: tl.constexpr):
    """t at which G is 1 if p H is near y^-order + far (y + distance)^-order, y = t."""
    order = tl.full([], 1.0, tl.float64)
    if C.is_alpha:
        order = 1.0 / tl.full([], m.alpha, tl.float64)
    right = tl.full([], 1.0, tl.float64)
    if C.is_jsd:
        # (1 - t) (near / t + far / (t + distance)) = 1, with the factor multiplied out
        right = 1.0 + near + far
        far = far * (1.0 + distance)
    return two_poles(near, far, distance, right, order, C)


@triton.jit
def secular_point(m, best, s1, s2, t, C: tl.constexpr):
    """t at which a model of G with two poles is 1: s* exactly where it is and everything else as
    the one that has its sum and slope at `t` (the secular equation of eigenvalue updates)."""
    pole = (s1 > 0.0) & (s2 > 0.0) & (s1 < INFINITY) & (s2 < INFINITY)
    distance = tl.where(pole, s1 / tl.where(pole, s2, 1.0) - t, 0.0)
    distance = tl.where(distance > 0.0, distance, 0.0)
    far = tl.where(pole, s1 / power(tl.where(pole, t + distance, 1.0), m, C), 0.0)
    return point_of_poles(m, best, far, distance, C)


@triton.jit
def secular_step(m, best, s1, s2, t, lower, upper, C: tl.constexpr):
    """The next point for a Stieltjes kernel, the bracket, and whether that point is the solution.
    s1 and s2 leave s* out."""
    g = s1 + best * power(t, m, C)
    if C.is_jsd:
        g = g * (1.0 - t)
    log_g = tl.log(g)
    lower = tl.where(log_g > 0.0, t, lower)
    upper = tl.where(log_g <= 0.0, t, upper)
    good = (tl.abs(log_g) < INFINITY) & (tl.abs(s2) < INFINITY)
    following = secular_point(m, best, s1, s2, t, C)
    inside = good & (following >= lower) & (following <= upper)
    otherwise = tl.where(tl.abs(log_g) < TOLERANCE, t, tl.sqrt(lower * upper))
    following = tl.where(inside, following, otherwise)
    last = inside & (tl.abs(log_g) < LAST_STEP) & (tl.abs(following - t) < LAST_RATIO * t)
    following = following.to(tl.float32).to(tl.float64)
    return following, lower, upper, last | (following == t)


@triton.jit
def step_stieltjes(m, state, s1, s2, C: tl.constexpr):
    """The next point for a Stieltjes kernel. s1 and s2 leave s* out."""
    t = tl.load(state + POINT)
    lower = tl.load(state + LOWER)
    upper = tl.load(state + UPPER)
    best = tl.load(state + BEST_MASS)
    following, lower, upper, done = secular_step(m, best, s1, s2, t, lower, upper, C)
    tl.store(state + LOWER, lower)
    tl.store(state + UPPER, upper)
    tl.store(state + POINT, following)
    tl.store(state + SOLVED, tl.where(done, 1.0, 0.0))
    tl.store(state + STEPS, tl.load(state + STEPS) + 1.0)


@triton.jit
def newton_point(m, tau, s1, s2, C: tl.constexpr):
    """A Newton step for any divergence, on q(log G(tau)), which is almost straight; NaN or infinite
    where there is none."""
    q = C.deficit(tl.log(s1).to(tl.float32), m.alpha)
    slope = tl.exp(C.log_slope(q, m.alpha).to(tl.float64))
    return tau + (C.deficit(tl.zeros([], tl.float32), m.alpha) - q).to(tl.float64) * slope / s2


@triton.jit
def step_newton(m, state, s1, s2, C: tl.constexpr):
    """The next point for any divergence."""
    tau = tl.load(state + POINT)
    lower = tl.load(state + LOWER)
    upper = tl.load(state + UPPER)
    log_g = tl.log(s1)
    lower = tl.where(log_g > 0.0, tau, lower)
    upper = tl.where(log_g <= 0.0, tau, upper)
    newton = newton_point(m, tau, s1, s2, C)
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


@triton.jit
def end_keys(state, fields, tiles, C: tl.constexpr):
    """Level and norm of the keys, and whether they can be trusted."""
    level, norm = log_sum_exp(fields, KEY_PEAK, tiles, C)
    good = (tl.abs(level) < INFINITY) & (tl.abs(norm) < INFINITY)
    valid = tl.where(good, 1.0, 0.0)
    if C.sums:
        valid = tl.where(good, tl.load(state + VALID), 0.0)
    return level, norm - level, valid
