"""The keys of a tile and their sums. A key is log pi* of a token up to a constant of its row."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import EXCLUDED, INFINITY, LEAST_TAU, TILE
from .elementary import exp
from .normalizer import above_least
from .own_mass import parameter
from .parameters import inverse_temperature, masked_key, reference_weight, temperature_of
from .parts import log_sum_exp, part_sums, places, store_parts
from .tiles import below, deficit_tile, finite_log_linear_tile, load_tile, log_linear_tile
from .workspace import BIAS_PEAK, DRAW_PEAK, KEY_PEAK, LEVEL, MIX_LOG_NORM, POINT, VALID


@triton.jit
def deficit_key(mixing, state, log_ref, q, broken, row, variant: tl.constexpr):
    """`key_tile` for all divergences but reverse KL, from a tile's deficits."""
    inside = q < EXCLUDED
    if variant.exact:
        point = tl.load(state + POINT).to(tl.float32)
        if variant.unshift is not None:
            point = variant.unshift(point, mixing.alpha)
        y = point + above_least(state, q, variant)
    else:
        # Z = 0, MOD's eq. 6 as printed: tau = c (1 - sum w) + min Q.
        y = (q + mixing.supremum * reference_weight(mixing, row, variant)).to(tl.float32)
        if variant.bounded:
            broken |= inside & (((y > LEAST_TAU) & (y < INFINITY)) == 0)
        else:
            broken |= q <= -EXCLUDED
    key = log_ref + variant.log_ratio(tl.where(inside, y, 1.0), parameter(mixing, state, variant))
    return tl.where(inside, key, -INFINITY), broken


@triton.jit
def keys_and_broken(mixing, state, model_fields, row, tile, tiles, variant: tl.constexpr):
    """The keys of a tile, -inf off the support, and which tokens have NaN or +inf in a tensor that
    counts."""
    if variant.general:
        log_ref, q, broken = deficit_tile(mixing, state, row, tile, variant)
        return deficit_key(mixing, state, log_ref, q, broken, row, variant)
    else:
        return log_linear_tile(mixing, state, model_fields, row, tile, tiles, variant)


@triton.jit
def key_tile(mixing, state, model_fields, row, tile, tiles, variant: tl.constexpr):
    """The keys of a tile, [TILE]."""
    key, _ = keys_and_broken(mixing, state, model_fields, row, tile, tiles, variant)
    return tl.reshape(key, [TILE])


@triton.jit
def store_maxima(work, key, row, tile, tiles, variant: tl.constexpr):
    """Store the largest key of each cell of a tile."""
    CELLS: tl.constexpr = TILE // variant.cell
    maxima = work.maxima + (row.to(tl.int64) * tiles + tile) * CELLS
    tl.store(maxima + tl.arange(0, CELLS), tl.max(tl.reshape(key, [CELLS, variant.cell]), 1))


@triton.jit
def store_bias_peak(mixing, drawing, fields, key, row, tile, variant: tl.constexpr):
    """Store the largest bias of the tokens that are left in a tile's parts; +inf where the bias
    holds NaN or +inf."""
    biases = drawing.bias + row.to(tl.int64) * drawing.bias_stride
    bias = load_tile(biases, tile, mixing.vocab, 0.0, variant)
    left = tl.where(bias < INFINITY, tl.where(key > -INFINITY, bias, -INFINITY), INFINITY)
    store_parts(fields, BIAS_PEAK, tile, (tl.max(left, 1),), variant)


@triton.jit
def store_draw_sums(drawing, fields, key, row, tile, variant: tl.constexpr):
    """Store the sums of the race, from the keys after mask and bias."""
    beta = inverse_temperature(temperature_of(drawing, row))
    peak = tl.max(key, 1)
    total = part_sums(exp(below(key, peak) * beta))
    store_parts(fields, DRAW_PEAK, tile, (peak, total), variant)


@triton.jit
def store_key_sums(
    mixing, drawing, work, fields, key, peak, total, row, tile, variant: tl.constexpr
):
    store_parts(fields, KEY_PEAK, tile, (peak, total), variant)
    offsets = tile * TILE + places(variant)
    key = masked_key(mixing, drawing, key, row, offsets, variant)
    if variant.bias:
        store_bias_peak(mixing, drawing, fields, key, row, tile, variant)
    elif variant.mask or variant.tempered:
        store_draw_sums(drawing, fields, key, row, tile, variant)
    if variant.store_keys:
        keys = work.keys + row.to(tl.int64) * mixing.vocab
        tl.store(keys + offsets, key, mask=offsets < mixing.vocab)
        if not (variant.finish or variant.bias):
            store_maxima(work, key, row, tile, tl.cdiv(mixing.vocab, TILE), variant)


@triton.jit
def peak_and_sum(key, broken):
    """The largest keys of the parts, and their sums, NaN where a token is broken."""
    peak = tl.max(key, 1)
    return peak, part_sums(tl.where(broken, float("nan"), exp(below(key, peak))))


@triton.jit
def keys_of_tile(
    mixing, drawing, work, state, model_fields, fields, row, tile, tiles, variant: tl.constexpr
):
    if variant.sums or variant.model_logprobs or variant.candidates:
        key, broken = keys_and_broken(mixing, state, model_fields, row, tile, tiles, variant)
        peak, total = peak_and_sum(key, broken)
        store_key_sums(mixing, drawing, work, fields, key, peak, total, row, tile, variant)
    else:
        # A tile with an excluded or broken token is rare, and is read once more.
        whole = (tile + 1) * TILE <= mixing.vocab
        if whole:
            key = finite_log_linear_tile(mixing, row, tile, variant)
            peak = tl.max(key, 1)
            total = part_sums(exp(key - peak[:, None]))
            whole = tl.max((total != total).to(tl.int32), 0) == 0
            if whole:
                store_key_sums(mixing, drawing, work, fields, key, peak, total, row, tile, variant)
        if whole == 0:
            key, broken = keys_and_broken(mixing, state, model_fields, row, tile, tiles, variant)
            peak, total = peak_and_sum(key, broken)
            store_key_sums(mixing, drawing, work, fields, key, peak, total, row, tile, variant)


@triton.jit
def end_keys(state, fields, tiles, variant: tl.constexpr):
    """A row's level and norm (log pi* = key - level - norm), and whether the row is valid."""
    level, norm = log_sum_exp(fields, KEY_PEAK, tiles, variant)
    good = (tl.abs(level) < INFINITY) & (tl.abs(norm) < INFINITY)
    valid = tl.where(good, 1.0, 0.0)
    if variant.sums:
        valid = tl.where(good, tl.load(state + VALID), 0.0)
    return level, norm - level, valid


@triton.jit
def finish_tile(mixing, work, state, row, tile):
    """Turn the keys into log pi* in place; NaN in an invalid row."""
    offsets = tile * TILE + tl.arange(0, TILE)
    keys = work.keys + row.to(tl.int64) * mixing.vocab + offsets
    key = tl.load(keys, mask=offsets < mixing.vocab, other=0.0, cache_modifier=".cg")
    result = (
        key - tl.load(state + LEVEL).to(tl.float32) - tl.load(state + MIX_LOG_NORM).to(tl.float32)
    )
    result = tl.where(tl.load(state + VALID) > 0.0, result, float("nan"))
    tl.store(keys, result, mask=offsets < mixing.vocab)
