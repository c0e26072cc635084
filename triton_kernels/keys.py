"""What the phases of a row do with one of its tiles, and what the program that ends a phase does
(design §2, §3). `m` is a `Mixing`, `r` a `Drawing`, `w` a `Workspace`, `C` a `Variant` (launch.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .draw import (
    allowed,
    good_parameters,
    good_weights,
    inverse_temperature,
    row_parameter,
    row_seed,
    store_draw,
    temperature_of,
    winner_tile,
    winner_token,
)
from .elementary import exp
from .normalizer import (
    BEST_P,
    DRAW_PEAK,
    DRAW_SUM,
    FIRST,
    KEY_PEAK,
    KEY_SUM,
    MASS,
    S1,
    S2,
    end_keys,
    ratios,
    start_ratios,
    step_newton,
    step_stieltjes,
    tile_field,
)
from .tiles import (
    BEST_TOKEN,
    EXCLUDED,
    INFINITY,
    LEAST,
    LEAST_TAU,
    LEVEL,
    MIX_LOG_NORM,
    POINT,
    SOLVED,
    TILE,
    VALID,
    deficit_tile,
    finite_log_linear_tile,
    log_linear_tile,
    model_tile,
    reference_weight,
    store_model_sum,
    sum_exp,
)


@triton.jit
def above_least(state, q, C: tl.constexpr):
    """D = Q - min Q, float32. A Q without values is float32, and so are all of its row."""
    distance = (q - tl.load(state + LEAST).to(q.dtype)).to(tl.float32)
    if C.scores > 0:
        distance = tl.minimum(distance, EXCLUDED)  # the value of another token may be that large
    return distance


@triton.jit
def evaluate(m, state, log_ref, q, tile, C: tl.constexpr):
    """sum p H and sum p (-H') of a tile at the row's point; a Stieltjes kernel's leave s* out: next
    to its pole the others would drown in their rounding."""
    distance = above_least(state, q, C)
    point = tl.load(state + POINT).to(tl.float32)
    if C.excess is not None:
        # Off the support Q is so large that H is 0.
        best = tl.load(state + BEST_TOKEN).to(tl.int32) - tile * TILE
        p = exp(log_ref)
        if (best >= 0) & (best < TILE):
            p = tl.where(tl.arange(0, TILE) == best, 0.0, p)
        y = point + C.excess(distance, m.alpha)
    else:
        inside = q < EXCLUDED
        p = tl.where(inside, exp(log_ref), 0.0)
        y = point + tl.where(inside, distance, 0.0)
    h, slope = ratios(y, m, C)
    return tl.sum(p * h, 0), tl.sum(p * slope, 0)


@triton.jit
def deficit_key(m, state, log_ref, q, broken, row, C: tl.constexpr):
    """`key_tile` off reverse KL, from a tile's deficits."""
    inside = q < EXCLUDED
    if C.exact:
        point = tl.load(state + POINT).to(tl.float32)
        if C.unshift is not None:
            point = C.unshift(point, m.alpha)
        y = point + above_least(state, q, C)
    else:
        # Eq. 6 as printed: Z = 0, that is tau = c (1 - sum w) + min Q.
        y = (q + m.supremum * reference_weight(m, row, C)).to(tl.float32)
        if C.bounded:
            broken |= inside & (((y > LEAST_TAU) & (y < INFINITY)) == 0)
        else:
            broken |= q <= -EXCLUDED
    key = log_ref + C.log_ratio(tl.where(inside, y, 1.0), m.alpha)
    return tl.where(inside, key, -INFINITY), broken


@triton.jit
def key_tile(m, state, model_fields, row, tile, tiles, C: tl.constexpr):
    """log pi* up to a row's constant, -inf off the support, and where something is broken."""
    if C.general:
        log_ref, q, broken = deficit_tile(m, state, row, tile, C)
        return deficit_key(m, state, log_ref, q, broken, row, C)
    else:
        return log_linear_tile(m, state, model_fields, row, tile, tiles, C)


@triton.jit
def masked_key(r, m, key, row, tile, C: tl.constexpr):
    if C.mask:
        key = tl.where(allowed(r, m, row, tl.arange(0, TILE) + tile * TILE, C), key, -INFINITY)
    return key


@triton.jit
def sums_of_tile(m, model_fields, row, tile, C: tl.constexpr):
    MODELS: tl.constexpr = C.models
    for k in tl.static_range(MODELS):
        store_model_sum(model_tile(m, k, row, tile), k, model_fields, tile, C)


@triton.jit
def store_bracket(m, w, fields, log_ref, q, broken, row, tile, tiles, C: tl.constexpr):
    """What the bracket needs of a tile's deficits. Its p, least Q, and which token has that."""
    inside = q < EXCLUDED
    i = tl.arange(0, TILE)
    p = tl.where(inside, exp(log_ref), 0.0)
    least = tl.min(q, 0)
    best = tl.min(tl.where(q == least, i, TILE - 1), 0)
    tl.store(w.leasts + row.to(tl.int64) * tiles + tile, least.to(tl.float64))
    tl.store(w.winners + row.to(tl.int64) * tiles + tile, best + tile * TILE)
    tl.store(fields + BEST_P * C.tiles + tile, tl.sum(tl.where(i == best, p, 0.0), 0))
    tl.store(fields + MASS * C.tiles + tile, tl.sum(tl.where(broken, float("nan"), p), 0))
    tl.store(fields + FIRST * C.tiles + tile, tl.sum(p * q.to(tl.float32), 0))
    return p, least, best


@triton.jit
def store_deficits(m, w, fields, log_ref, q, broken, row, tile, tiles, C: tl.constexpr):
    p, _, best = store_bracket(m, w, fields, log_ref, q, broken, row, tile, tiles, C)
    if C.excess is not None:
        p = tl.where(tl.arange(0, TILE) == best, 0.0, p)  # it may be s*
    else:
        q = tl.where(q < EXCLUDED, q, 1.0)
    h, slope = start_ratios(q, m, row, C)
    tl.store(fields + S1 * C.tiles + tile, tl.sum(p * h, 0))
    tl.store(fields + S2 * C.tiles + tile, tl.sum(p * slope, 0))


@triton.jit
def deficits_of_tile(m, w, state, fields, row, tile, tiles, C: tl.constexpr):
    log_ref, q, broken = deficit_tile(m, state, row, tile, C)
    store_deficits(m, w, fields, log_ref, q, broken, row, tile, tiles, C)


@triton.jit
def store_evaluation(m, state, fields, log_ref, q, tile, C: tl.constexpr):
    s1, s2 = evaluate(m, state, log_ref, q, tile, C)
    tl.store(fields + S1 * C.tiles + tile, s1)
    tl.store(fields + S2 * C.tiles + tile, s2)


@triton.jit
def evaluation_of_tile(m, state, fields, row, tile, C: tl.constexpr):
    log_ref, q, _ = deficit_tile(m, state, row, tile, C)
    store_evaluation(m, state, fields, log_ref, q, tile, C)


@triton.jit
def store_key_sums(m, r, w, fields, key, peak, total, row, tile, C: tl.constexpr):
    tl.store(fields + KEY_PEAK * C.tiles + tile, peak)
    tl.store(fields + KEY_SUM * C.tiles + tile, total)
    if C.mask or C.tempered:
        beta = inverse_temperature(temperature_of(r, row))
        key = masked_key(r, m, key, row, tile, C)
        peak = tl.max(key, 0)
        below = key - tl.where(peak == -INFINITY, 0.0, peak)
        tl.store(fields + DRAW_PEAK * C.tiles + tile, peak)
        tl.store(fields + DRAW_SUM * C.tiles + tile, tl.sum(exp(below * beta), 0))
    if C.store_keys:
        offsets = tile * TILE + tl.arange(0, TILE)
        keys = w.keys + row.to(tl.int64) * m.vocab
        tl.store(keys + offsets, key, mask=offsets < m.vocab)


@triton.jit
def store_keys(m, r, w, fields, key, broken, row, tile, C: tl.constexpr):
    peak = tl.max(key, 0)
    store_key_sums(m, r, w, fields, key, peak, sum_exp(key, peak, broken), row, tile, C)


@triton.jit
def store_deficit_keys(m, r, w, state, fields, log_ref, q, broken, row, tile, C: tl.constexpr):
    """`store_keys` off reverse KL, from a tile's deficits."""
    if C.exact and C.excess is not None and not (C.mask or C.tempered or C.store_keys):
        # Only sums are asked for, and a Stieltjes kernel has them without logarithms.
        point = tl.load(state + POINT).to(tl.float32)
        h, _ = ratios(point + C.excess(above_least(state, q, C), m.alpha), m, C)
        if C.is_jsd:
            h = h * (1.0 - point)
        total = tl.sum(tl.where(broken, float("nan"), exp(log_ref) * h), 0)
        tl.store(fields + KEY_PEAK * C.tiles + tile, 0.0)
        tl.store(fields + KEY_SUM * C.tiles + tile, total)
    else:
        key, broken = deficit_key(m, state, log_ref, q, broken, row, C)
        store_keys(m, r, w, fields, key, broken, row, tile, C)


@triton.jit
def keys_of_tile(m, r, w, state, model_fields, fields, row, tile, tiles, C: tl.constexpr):
    if C.general:
        log_ref, q, broken = deficit_tile(m, state, row, tile, C)
        store_deficit_keys(m, r, w, state, fields, log_ref, q, broken, row, tile, C)
    elif C.sums or C.model_logprobs:
        key, broken = key_tile(m, state, model_fields, row, tile, tiles, C)
        store_keys(m, r, w, fields, key, broken, row, tile, C)
    else:
        # Rarely is there a token that is excluded or broken: then the tile is read once more.
        key = tl.zeros([TILE], tl.float32)
        peak = tl.full([], 0.0, tl.float32)
        total = tl.full([], float("nan"), tl.float32)
        if (tile + 1) * TILE <= m.vocab:
            key = finite_log_linear_tile(m, row, tile, C)
            peak = tl.max(key, 0)
            total = tl.sum(exp(key - peak), 0)
        if total != total:
            key, broken = key_tile(m, state, model_fields, row, tile, tiles, C)
            peak = tl.max(key, 0)
            total = sum_exp(key, peak, broken)
        store_key_sums(m, r, w, fields, key, peak, total, row, tile, C)


@triton.jit
def finish_tile(m, w, state, row, tile):
    """log pi* out of the keys, in place; NaN in an invalid row."""
    offsets = tile * TILE + tl.arange(0, TILE)
    keys = w.keys + row.to(tl.int64) * m.vocab + offsets
    key = tl.load(keys, mask=offsets < m.vocab, other=0.0, cache_modifier=".cg")
    result = (
        key - tl.load(state + LEVEL).to(tl.float32) - tl.load(state + MIX_LOG_NORM).to(tl.float32)
    )
    result = tl.where(tl.load(state + VALID) > 0.0, result, float("nan"))
    tl.store(keys, result, mask=offsets < m.vocab)


@triton.jit
def draw(m, r, state, model_fields, fields, row, tiles, seed, position, C: tl.constexpr):
    """The race of a row whose keys are summed, without filters."""
    level, norm, good = end_keys(state, fields, tiles, C)
    temperature = temperature_of(r, row)
    beta = inverse_temperature(temperature)
    if C.mask or C.tempered:
        peaks = tile_field(fields, DRAW_PEAK, tiles, C, float("-inf"))
        sums = tile_field(fields, DRAW_SUM, tiles, C, 0.0)
    else:
        peaks = tile_field(fields, KEY_PEAK, tiles, C, float("-inf"))
        sums = tile_field(fields, KEY_SUM, tiles, C, 0.0)
    peak = tl.max(peaks, 0)
    valid = (good > 0.0) & (tl.abs(peak) < INFINITY) & good_parameters(r, m, row, C)
    peak = tl.where(valid, peak, 0.0)
    mass = tl.where(peaks == -INFINITY, 0.0, sums * exp((peaks - peak) * beta))
    own_seed = row_seed(r, seed, row)
    own_position = row_parameter(position, r.position_pointer, r.position_stride, row, tl.int64)
    tile, found = winner_tile(mass, temperature, peaks, peak, own_seed, own_position, C)
    tile = tl.where(valid & found, tile, 0)
    key, _ = key_tile(m, state, model_fields, row, tile, tiles, C)
    key = masked_key(r, m, key, row, tile, C)
    token, token_key, inside = winner_token(
        key, exp((key - peak) * beta), tile, temperature, peak, own_seed, own_position
    )
    valid = valid & found & inside
    # Keys and masses are rounded apart: no token is likelier than certain.
    logprob = tl.minimum(token_key - level - norm, 0.0)
    store_draw(r, m, state, model_fields, row, token, logprob, valid, tiles, C)


@triton.jit
def end_evaluation(m, state, fields, tiles, C: tl.constexpr):
    """The step after an evaluation."""
    if tl.load(state + SOLVED) == 0.0:
        s1 = tl.sum(tile_field(fields, S1, tiles, C, 0.0).to(tl.float64), 0)
        s2 = tl.sum(tile_field(fields, S2, tiles, C, 0.0).to(tl.float64), 0)
        if C.excess is not None:
            step_stieltjes(m, state, s1, s2, C)
        else:
            step_newton(m, state, s1, s2, C)


@triton.jit
def end_draw(m, r, state, model_fields, fields, row, tiles, seed, position, C: tl.constexpr):
    """The draw, or what the launch after this one needs."""
    if C.draw:
        draw(m, r, state, model_fields, fields, row, tiles, seed, position, C)
    else:
        level, norm, valid = end_keys(state, fields, tiles, C)
        valid = tl.where(good_weights(m, row, C), valid, 0.0)
        tl.store(state + LEVEL, level)
        tl.store(state + MIX_LOG_NORM, norm)
        tl.store(state + VALID, valid)
