"""Log-sum-exps of the models' logits, of a tile and of a row, and the shifts of the log-ratios."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, SMALLEST_PREFIX_DIFFERENCE, TILE
from .elementary import exp
from .own_mass import counted_mass, shift_of_mass
from .parameters import log_plausibility, reference_weight, weight
from .tiles import level_of, load_logits, scaled, store_model_sum
from .workspace import LOG_MASS, LOG_NORM, LOG_SUM, PEAK, SHIFT, VALID


@triton.jit
def sums_of_tile(mixing, logits, fields, tile, variant: tl.constexpr):
    """Store the sums of the parts of all models."""
    MODELS: tl.constexpr = variant.models
    for k in tl.static_range(MODELS):
        store_model_sum(scaled(mixing, logits, k), k, fields, tile, variant)


@triton.jit
def sums_of_tiles(mixing, fields, row, begin, end, variant: tl.constexpr):
    """`sums_of_tile` of the tiles from `begin` to before `end`. While one is summed the next is on
    its way from memory; the last is loaded once more, from the cache, because a branch around the
    loads would wait for them."""
    whole = tl.minimum(end, mixing.vocab // TILE)
    if begin < whole:
        logits = load_logits(mixing, row, begin, True, variant)
        for tile in range(begin, whole):
            following = logits
            if variant.chunk > 1:
                ahead = tl.minimum(tile + 1, whole - 1)
                following = load_logits(mixing, row, ahead, True, variant)
            sums_of_tile(mixing, logits, fields, tile, variant)
            logits = following
    if whole < end:
        logits = load_logits(mixing, row, whole, False, variant)
        sums_of_tile(mixing, logits, fields, whole, variant)


@triton.jit
def store_model_norms(state, fields, tiles, variant: tl.constexpr):
    """Store `log_sum_exp` of all models in the row's state, and what it leaves when the level is
    taken off: beside a level of 1e17 float64 would lose it."""
    MODELS: tl.constexpr = variant.models
    PARTS: tl.constexpr = variant.tiles * variant.parts
    # As many models at once as registers hold.
    MOST: tl.constexpr = 1 if PARTS > 2048 else 2048 // PARTS
    GROUP: tl.constexpr = MOST if MOST < variant.model_block else variant.model_block
    i = tl.arange(0, PARTS)
    for first in tl.static_range(0, MODELS, GROUP):
        k = first + tl.arange(0, GROUP)
        pointers = fields + i[None, :] * variant.record + 2 * k[:, None]
        there = (k[:, None] < variant.models) & (i[None, :] < tiles * variant.parts)
        peaks = tl.load(pointers, mask=there, other=-INFINITY, cache_modifier=".cg")
        sums = tl.load(pointers + 1, mask=there, other=0.0, cache_modifier=".cg")
        peak = tl.max(peaks, 1)
        scaled = exp(peaks - tl.where(peak == -INFINITY, 0.0, peak)[:, None])
        parts = tl.where(peaks == -INFINITY, 0.0, scaled).to(tl.float64) * sums.to(tl.float64)
        log_sum = tl.log(tl.sum(parts, 1))
        norm = log_sum + peak
        tl.store(state + LOG_NORM + k, norm, mask=k < variant.models)
        tl.store(state + PEAK + k, peak.to(tl.float64), mask=k < variant.models)
        rest = (peak - level_of(norm)).to(tl.float64) + log_sum
        tl.store(state + LOG_SUM + k, rest, mask=k < variant.models)
    tl.debug_barrier()


@triton.jit
def prefix_of(mixing, row, k: tl.constexpr):
    """Log-probability of the response so far under model k, float64."""
    offset = row.to(tl.int64) * mixing.prefix_strides[0] + k * mixing.prefix_strides[1]
    return tl.load(mixing.prefix + offset).to(tl.float64)


@triton.jit
def end_sums(mixing, state, fields, row, tiles, variant: tl.constexpr):
    """Store the log-sum-exps, the shifts of d, and whether all models that count are finite."""
    MODELS: tl.constexpr = variant.models
    FIRST_POLICY: tl.constexpr = variant.first_policy
    valid = tl.full([], 1.0, tl.float64)
    store_model_norms(state, fields, tiles, variant)
    for k in tl.static_range(MODELS):
        norm = tl.load(state + LOG_NORM + k)
        if k < FIRST_POLICY:
            counts = tl.full([], True, tl.int1)
            if variant.general == 0:
                counts = reference_weight(mixing, row, variant) != 0.0
        else:
            counts = weight(mixing, row, k - FIRST_POLICY) != 0.0
        if k == variant.plausible:
            counts |= log_plausibility(mixing, row) > -INFINITY
        valid = tl.where(counts & ((tl.abs(norm) < INFINITY) == 0), 0.0, valid)
    if variant.general:
        lift = tl.zeros([], tl.float64)
        least = tl.full([], INFINITY, tl.float64)
        if mixing.prefix is not None:
            ref_prefix = prefix_of(mixing, row, 0)
            for k in tl.static_range(MODELS):
                own = prefix_of(mixing, row, k)
                counts = tl.full([], True, tl.int1)
                if k > 0:
                    counts = weight(mixing, row, k - 1) != 0.0
                valid = tl.where(counts & ((tl.abs(own) < INFINITY) == 0), 0.0, valid)
                if k > 0:
                    least = tl.where(counts, tl.minimum(least, own - ref_prefix), least)
            if variant.own_mass:
                own = tl.load(mixing.own_prefix + row.to(tl.int64) * mixing.own_prefix_stride)
                log_mass = own.to(tl.float64) - ref_prefix
                valid = tl.where(tl.abs(log_mass) < INFINITY, valid, 0.0)
                counted = counted_mass(mixing, log_mass, least, variant)
                tl.store(state + LOG_MASS, counted)
                lift = -shift_of_mass(counted, variant)
            elif variant.clamped:
                lift = tl.maximum(lift, SMALLEST_PREFIX_DIFFERENCE - least)
        for k in tl.static_range(1, MODELS):
            shift = tl.load(state + LOG_SUM) - tl.load(state + LOG_SUM + k)
            if mixing.prefix is not None:
                shift += prefix_of(mixing, row, k) - prefix_of(mixing, row, 0) + lift
            tl.store(state + SHIFT + k, shift)
    tl.store(state + VALID, valid)
