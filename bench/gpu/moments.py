"""An experiment beside the shipped kernels: G = 1 solved without evaluations of G over the row.

Forward KL and JSD are Stieltjes kernels, G(t) = sum p / (t + x) up to JSD's factor 1 - t. The sweep
that finds the deficits takes eight moments of every tile on the way. They are the tile's 4-node
Gauss rule, evaluated as a continued fraction, with the tile's token of least deficit kept apart as
a pole of its own. The program that ends the sweep solves G = 1 with these fractions in place of the
tokens. Where the 3-node rules say something else, it finishes the row with sweeps as the shipped
kernel does.

    SUMS      log-sum-exps of the models, as shipped
    DEFICITS  p, Q, what the bracket needs, moments; then the point
    KEYS      keys and the race, as shipped

One launch a phase. Left out: alpha, whose order 1/a takes the nodes and weights themselves;
Jeffrey, which has no such form; and calls that do not draw in the mixture kernel.

With x = excess(D), a tile's least deficit at x_j and X = excess(Q - the tile's least Q),

    t + x = s_j ((t + x_j) / s_j + X),     s_j = 1 (forward KL), 1 + x_j (JSD).

Around a centre c > 0 of the tile's own, with u = c / (c + X), w = 1 - u = X / (c + X) in [0, 1) and
z = s_j c / (t + x_j) - 1 > -1,

    sum p / (t + x) = (t + x_j)^-1 sum p u / (1 + z w).

The moments are those of p u in powers of w. Where t is left of the centre, z >= 0 and the fraction
m_0 / (1 + g_1 z / (1 + g_2 z / ...)) has positive terms only: float32 loses nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mod_fused.triton_kernels.launching import Launch
from mod_fused.triton_kernels.mixture import MAX_EVALUATIONS
from mod_fused.triton_kernels.phases import (
    end_draw,
    end_evaluation,
    evaluation_of_tile,
    keys_of_tile,
    store_bracket,
    sums_of_tile,
)
from mod_fused.triton_kernels.solver import (
    BEST_P,
    S1,
    S2,
    TILE_FIELDS,
    end_deficits,
    end_sums,
    secular_step,
    start_offset,
    tile_field,
)
from mod_fused.triton_kernels.tiles import (
    BEST_MASS,
    BEST_TOKEN,
    EXCLUDED,
    LEAST,
    LOWER,
    POINT,
    SOLVED,
    STATE_FIELDS,
    TILE,
    UPPER,
    VALID,
    deficit_tile,
)

SUMS, DEFICITS, KEYS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MOMENTS = tl.constexpr(8)
#: A centre is at least this: where Z = 0 has no inverse, one has to be made up.
SMALLEST_CENTRE = tl.constexpr(1e-3)
#: What the 4-node and the 3-node rules may differ by in G, and the solution's G from 1.
CERTIFICATE = tl.constexpr(1e-4)
RESIDUAL = tl.constexpr(1e-5)
#: Where 1 + z is below it, far right of the centre, what decides is 1 - w, lost in the rounding of
#: the moments, and no difference of rules shows it. Weights of one sign never get there.
SMALLEST_RATIO = tl.constexpr(0.25)
#: Of a tile's moments: mass that it hides may lie right beside the pole, where no rule sees it.
ROUNDING = tl.constexpr(1.2e-7)
SMALLEST_VALUE = tl.constexpr(1e-6)  # of a fraction; it is positive but for rounding
MODEL_STEPS = tl.constexpr(8)


@triton.jit
def centre_of(least, m, row, C: tl.constexpr):
    """(t + x) / s at a tile's least Q where `start_ratios` has its point, and y there."""
    y = (least.to(tl.float64) + start_offset(m, row, C)).to(tl.float32)
    return tl.maximum(C.shift(y, m.alpha), SMALLEST_CENTRE), C.excess(y, m.alpha)


@triton.jit
def store_moments(m, moments, p, distance, least, row, tile, C: tl.constexpr):
    """sum p u w^k, k = 0 .. 7."""
    centre, _ = centre_of(least, m, row, C)
    x = C.excess(distance, m.alpha)
    fall = 1.0 / (centre + x)
    w = x * fall
    c0 = p * (centre * fall)
    c1 = c0 * w
    c2 = c1 * w
    c3 = c2 * w
    c4 = c3 * w
    c5 = c4 * w
    c6 = c5 * w
    c7 = c6 * w
    # One reduction for all of them.
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    sums = tl.reshape(tl.sum(tl.join(even, odd), 0), [MOMENTS])
    k = tl.arange(0, MOMENTS)
    tl.store(moments + k * C.tiles + tile, sums)


@triton.jit
def moments_of_tile(m, w, state, fields, moments, row, tile, tiles, C: tl.constexpr):
    log_ref, q, broken = deficit_tile(m, state, row, tile, C)
    p, least, best = store_bracket(m, w, fields, log_ref, q, broken, row, tile, tiles, C)
    p = tl.where(tl.arange(0, TILE) == best, 0.0, p)
    distance = tl.where(q < EXCLUDED, q - least, 0.0).to(tl.float32)
    store_moments(m, moments, p, distance, least, row, tile, C)


@triton.jit
def fraction_of(moments):
    """g_1 .. g_7 of the tiles from their moments, by Chebyshev's algorithm for the symmetric
    measure with these even moments. Nothing but rounding makes a coefficient leave the range of a
    measure on [0, 1]: there its tail is cut off or bounded."""
    before = moments
    row = moments[1:]
    out = ()
    rest = before[0] * 0.0 + 1.0  # 1 - h_(k-1), g_k = (1 - h_(k-1)) h_k with h in [0, 1]
    for k in tl.static_range(7):
        whole = before[0] > 0.0
        g = tl.where(whole, row[0] / tl.where(whole, before[0], 1.0), 0.0)
        following = ()
        for j in tl.static_range(6 - k):
            following = following + (row[j + 1] - g * before[j + 1],)
        h = tl.minimum(tl.maximum(g / tl.maximum(rest, 1e-30), 0.0), 1.0)
        out = out + ((rest * h).to(tl.float32),)
        rest = 1.0 - h
        before = row
        row = following
    return out


@triton.jit
def fraction(g, z, COUNT: tl.constexpr):
    """1 + g_1 z / (1 + g_2 z / (... 1 + g_COUNT z)) and its derivative."""
    value = z * 0.0 + 1.0
    slope = z * 0.0
    for k in tl.static_range(COUNT):
        fall = 1.0 / value
        term = g[COUNT - 1 - k] * fall
        slope = term * (1.0 - z * slope * fall)
        value = tl.maximum(1.0 + z * term, SMALLEST_VALUE)
    return value, slope


@triton.jit
def model(t, x, scale, poles, mass, g, COUNT: tl.constexpr):
    """sum p / y and sum p / y^2 of every tile, y = t + x, s* left out."""
    fall = 1.0 / (t.to(tl.float32) + x)
    ratio = scale * fall
    value, slope = fraction(g, ratio - 1.0, COUNT)
    h = mass * fall / value
    return h + poles * fall, (h * (1.0 - slope * ratio / value) + poles * fall) * fall


@triton.jit
def load_leasts(w, row, tiles, C: tl.constexpr):
    """The least Q of every tile."""
    i = tl.arange(0, C.tiles)
    leasts = w.leasts + row.to(tl.int64) * tiles + i
    return tl.load(leasts, mask=i < tiles, other=EXCLUDED, cache_modifier=".cg")


@triton.jit
def store_start(m, w, fields, moments, row, tiles, C: tl.constexpr):
    """The sums that `store_deficits` stores, sum p / y = sum p u / y_j and its square's."""
    i = tl.arange(0, C.tiles)
    _, y = centre_of(load_leasts(w, row, tiles, C), m, row, C)
    fall = 1.0 / tl.maximum(y, SMALLEST_CENTRE)
    total = tile_field(moments, 0, tiles, C, 0.0)
    h = total * fall
    slope = (total - tile_field(moments, 1, tiles, C, 0.0)) * fall * fall
    tl.store(fields + S1 * C.tiles + i, h, mask=i < tiles)
    tl.store(fields + S2 * C.tiles + i, slope, mask=i < tiles)
    tl.debug_barrier()


@triton.jit
def solve(m, w, state, fields, moments, row, tiles, C: tl.constexpr):
    """The point of a row whose bracket is known, and whether it can be trusted."""
    i = tl.arange(0, C.tiles)
    leasts = load_leasts(w, row, tiles, C)
    there = leasts < EXCLUDED
    distance = tl.where(there, leasts - tl.load(state + LEAST), 0.0).to(tl.float32)
    x = C.excess(distance, m.alpha)
    scale, _ = centre_of(tl.where(there, leasts, 0.0), m, row, C)
    if C.is_jsd:
        scale = scale * (1.0 + x)
    best_tile = tl.load(state + BEST_TOKEN).to(tl.int32) // TILE
    poles = tl.where(there & (i != best_tile), tile_field(fields, BEST_P, tiles, C, 0.0), 0.0)
    sums = ()
    for k in tl.static_range(MOMENTS):
        own = tl.where(there, tile_field(moments, k, tiles, C, 0.0), 0.0)
        sums = sums + (own.to(tl.float64),)
    g = fraction_of(sums)
    mass = sums[0].to(tl.float32)

    near = tl.load(state + BEST_MASS)
    t = tl.load(state + POINT)
    lower = tl.load(state + LOWER)
    upper = tl.load(state + UPPER)
    steps = 0
    while steps < MODEL_STEPS:
        h, slope = model(t, x, scale, poles, mass, g, 7)
        s1 = tl.sum(h.to(tl.float64), 0)
        s2 = tl.sum(slope.to(tl.float64), 0)
        t, lower, upper, done = secular_step(m, near, s1, s2, t, lower, upper, C)
        steps = tl.where(done, MODEL_STEPS, steps + 1)
    h, _ = model(t, x, scale, poles, mass, g, 7)
    fewer, _ = model(t, x, scale, poles, mass, g, 5)
    factor = tl.full([], 1.0, tl.float64)
    if C.is_jsd:
        factor -= t
    whole = factor * (tl.sum(h.to(tl.float64), 0) + near / t)
    right = (mass > 0.0) & (scale < SMALLEST_RATIO * (t.to(tl.float32) + x))
    error = tl.where(right, h, tl.abs(h - fewer)) + ROUNDING * mass / (t.to(tl.float32) + x)
    error = factor * tl.sum(error.to(tl.float64), 0)
    return t, (error <= CERTIFICATE) & (tl.abs(whole - 1.0) <= RESIDUAL)


@triton.jit
def end_moments(m, w, state, fields, moments, row, tiles, C: tl.constexpr):
    """The bracket and the point; with sweeps by this program alone where moments are not enough."""
    store_start(m, w, fields, moments, row, tiles, C)
    end_deficits(m, w, state, fields, row, tiles, C)
    tl.debug_barrier()
    t, trusted = solve(m, w, state, fields, moments, row, tiles, C)
    unsolved = (trusted == 0) & (tl.load(state + VALID) > 0.0)
    tl.store(state + POINT, t)
    tl.store(state + SOLVED, tl.where(unsolved, 0.0, 1.0))
    evaluations = tl.where(unsolved, 0, MAX_EVALUATIONS)
    while evaluations < MAX_EVALUATIONS:
        tl.debug_barrier()
        for tile in range(tiles):
            evaluation_of_tile(m, state, fields, row, tile, C)
        tl.debug_barrier()
        end_evaluation(m, state, fields, tiles, C)
        tl.debug_barrier()
        evaluations = tl.where(tl.load(state + SOLVED) == 0.0, evaluations + 1, MAX_EVALUATIONS)


@triton.jit(do_not_specialize=["seed", "position"])
def moments_kernel(
    m, r, w, moments, seed: tl.int64, position: tl.int64, PHASE: tl.constexpr, C: tl.constexpr
):
    """One phase of all rows; `moments` float32 [B, MOMENTS, C.tiles], else as `mixture_kernel`."""
    MODEL_FIELDS: tl.constexpr = 2 * C.models
    FIELDS: tl.constexpr = TILE_FIELDS + 2 * C.models
    tiles = tl.cdiv(m.vocab, TILE)
    chunks = tl.cdiv(tiles, C.chunk)
    row = tl.program_id(0) // chunks
    begin = tl.program_id(0) % chunks * C.chunk
    state = w.states + row.to(tl.int64) * STATE_FIELDS
    model_fields = w.fields + row.to(tl.int64) * FIELDS * C.tiles
    fields = model_fields + MODEL_FIELDS * C.tiles
    own = moments + row.to(tl.int64) * MOMENTS * C.tiles
    for tile in range(begin, tl.minimum(begin + C.chunk, tiles)):
        if PHASE == SUMS:
            sums_of_tile(m, model_fields, row, tile, C)
        elif PHASE == DEFICITS:
            moments_of_tile(m, w, state, fields, own, row, tile, tiles, C)
        else:
            keys_of_tile(m, r, w, state, model_fields, fields, row, tile, tiles, C)
    tl.debug_barrier()
    arrived = tl.atomic_add(w.arrivals + row, 1, sem="acq_rel")
    if arrived == chunks - 1:
        tl.debug_barrier()
        if PHASE == SUMS:
            end_sums(m, state, model_fields, row, tiles, C)
        elif PHASE == DEFICITS:
            end_moments(m, w, state, fields, own, row, tiles, C)
        else:
            end_draw(m, r, state, model_fields, fields, row, tiles, seed, position, C)
        tl.atomic_xchg(w.arrivals + row, 0, sem="relaxed")  # as it was found


def launches(shipped: Launch) -> list[Launch] | None:
    """This experiment's launches in place of a call's first, with the same inputs and outputs; None
    where it does not cover the call."""
    m, r, w, rows, _, seed, position = shipped.arguments
    variant = shipped.variant
    covered = variant.exact and variant.excess is not None and not variant.is_alpha
    if not covered or not variant.draw:
        return None
    chunks = triton.cdiv(triton.cdiv(m.vocab, TILE.value), variant.chunk)
    moments = w.fields.new_empty((rows * MOMENTS.value * variant.tiles,))
    return [
        Launch(
            moments_kernel,
            (rows * chunks,),
            (m, r, w, moments, seed, position, phase.value),
            variant,
            shipped.threads,
        )
        for phase in (SUMS, DEFICITS, KEYS)
    ]
