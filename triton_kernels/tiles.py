"""Computations on one tile of 1024 token ids, in the shape [parts, tokens of a part]: loads,
log-sum-exps, log-linear keys and deficits.

A key is log pi* of a token up to a constant of its row. The deficit of a ratio pi_i / pi_ref is how
far f' of it lies below sup f'. Q is the weighted sum of a token's deficits over the policies, less
its values. A token is *broken* if it has NaN or +inf in a tensor that counts. `mixing` is a
`Mixing` (parameters.py), `variant` a `Variant` (launch.py) everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import EXCLUDED, FAR_LEVEL, INFINITY, SMALLEST_LOG_REF, TILE
from .elementary import exp
from .own_mass import policy_deficit, tilt_scale
from .parameters import (
    load_candidates,
    log_plausibility,
    reference_weight,
    value_weight,
    weight,
)
from .parts import part_sums, places, store_parts
from .workspace import LOG_NORM, LOG_SUM, PEAK, SHIFT


@triton.jit
def load_logits(mixing, row, tile, WHOLE: tl.constexpr, variant: tl.constexpr):
    """The logits of all models as they are stored, -inf beyond the vocabulary. `WHOLE`: the tile
    is known to lie inside; without a mask the loads are wide for any vocabulary size."""
    MODELS: tl.constexpr = variant.models
    offsets = tile * TILE + places(variant)
    found = ()
    for k in tl.static_range(MODELS):
        pointers = mixing.logits[k] + row.to(tl.int64) * mixing.strides[k] + offsets
        if WHOLE:
            found = found + (tl.load(pointers),)
        else:
            inside = offsets < mixing.vocab
            found = found + (tl.load(pointers, mask=inside, other=float("-inf")),)
    return found


@triton.jit
def logits_of_tile(mixing, row, tile, variant: tl.constexpr):
    """`load_logits`: all models' loads are issued before anything waits for one of them."""
    if (tile + 1) * TILE <= mixing.vocab:
        found = load_logits(mixing, row, tile, True, variant)
    else:
        found = load_logits(mixing, row, tile, False, variant)
    return found


@triton.jit
def scaled(mixing, logits, k: tl.constexpr):
    """The scaled logits of model k, float32."""
    x = logits[k].to(tl.float32)
    if mixing.scales is not None:
        x = x * mixing.scales[k]
    return x


@triton.jit
def load_tile(row_pointer, tile, vocab, OTHER: tl.constexpr, variant: tl.constexpr):
    """A row's tile as float32; `OTHER` beyond the vocabulary. Whole tiles are loaded without a
    mask, which keeps the loads wide for any vocabulary size."""
    offsets = tile * TILE + places(variant)
    if (tile + 1) * TILE <= vocab:
        x = tl.load(row_pointer + offsets)
    else:
        x = tl.load(row_pointer + offsets, mask=offsets < vocab, other=OTHER)
    return x.to(tl.float32)


@triton.jit
def candidates_of_tile(mixing, row, tile, variant: tl.constexpr):
    """The place of each token among the row's candidates, -1 for others; without candidates 0."""
    found = tl.zeros_like(places(variant))
    if variant.candidates:
        found -= 1
        BLOCK: tl.constexpr = variant.candidates
        NONE: tl.constexpr = TILE * BLOCK
        k = tl.arange(0, BLOCK)
        for begin in range(0, mixing.candidate_count, BLOCK):
            ids = load_candidates(mixing, row, begin, variant)
            # Token in the tile and place among the candidates in one number: one reduction finds
            # the next.
            packed = (ids % TILE).to(tl.int32) * BLOCK + k
            packed = tl.where((ids >= 0) & (ids // TILE == tile), packed, NONE)
            least = tl.min(packed, 0)
            while least < NONE:
                found = tl.where(places(variant) == least // BLOCK, begin + least % BLOCK, found)
                packed = tl.where(packed == least, NONE, packed)
                least = tl.min(packed, 0)
    return found


@triton.jit
def value_tile(mixing, j: tl.constexpr, candidates, row, tile, variant: tl.constexpr):
    """V_j, -inf beyond the vocabulary; of the tile's `candidates` alone where there are any."""
    pointer = mixing.scores + tl.full([], j, tl.int64) * mixing.value_strides[0]
    pointer += row.to(tl.int64) * mixing.value_strides[1]
    if variant.candidates:
        x = tl.load(pointer + candidates, mask=candidates >= 0, other=float("-inf"))
        return x.to(tl.float32)
    else:
        return load_tile(pointer, tile, mixing.vocab, float("-inf"), variant)


@triton.jit
def finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def below(x, peak):
    """x less its part's peak; x itself where the peak is -inf. +inf gives NaN."""
    return x - tl.where(peak == -INFINITY, 0.0, peak)[:, None]


@triton.jit
def store_model_sum(x, k: tl.constexpr, fields, tile, variant: tl.constexpr):
    """Store max x and sum exp(x - max) of the parts; a sum is NaN if its part holds NaN or
    +inf."""
    peak = tl.max(x, 1)  # ignores NaN, which the sum keeps
    store_parts(fields, 2 * k, tile, (peak, part_sums(exp(below(x, peak)))), variant)


@triton.jit
def plausible_tile(mixing, state, x, row, k: tl.constexpr):
    """Which tokens of model k's tile x plausibility keeps."""
    peak = tl.load(state + PEAK + k).to(tl.float32)
    return (x - peak < log_plausibility(mixing, row)) == 0


@triton.jit
def log_linear_tile(
    mixing,
    state,
    fields,
    row,
    tile,
    tiles,
    variant: tl.constexpr,
):
    """The log-linear key, -inf off the support, and which tokens are broken. Terms are added in the
    same order in every backend, so that rounding is the same: reference, policies, values."""
    MODELS: tl.constexpr = variant.models
    VALUES: tl.constexpr = variant.scores
    FIRST_POLICY: tl.constexpr = variant.first_policy
    i = tile * TILE + places(variant)
    zeros = tl.zeros_like(i).to(tl.float32)
    key = zeros
    inside = i < mixing.vocab
    broken = zeros != 0.0
    plausible = inside
    logits = logits_of_tile(mixing, row, tile, variant)
    for k in tl.static_range(MODELS):
        x = scaled(mixing, logits, k)
        if variant.model_logprobs and not variant.sums:
            store_model_sum(x, k, fields, tile, variant)
        if k < FIRST_POLICY:
            c = zeros + reference_weight(mixing, row, variant)
        else:
            c = zeros + weight(mixing, row, k - FIRST_POLICY).to(tl.float32)
        if k == variant.plausible:
            plausible = plausible_tile(mixing, state, x, row, k)
        if k < FIRST_POLICY:
            x = tl.where(c != 0.0, x, 0.0)
            counts = zeros == 0.0
        else:
            counts = c != 0.0
        broken |= counts & ((x < INFINITY) == 0)
        inside &= finite(x) | (counts == 0)
        key = tl.fma(c, tl.where(finite(x) & counts, x, 0.0), key)
    inside &= plausible
    candidates = candidates_of_tile(mixing, row, tile, variant)
    inside &= candidates >= 0
    for j in tl.static_range(VALUES):
        v = zeros + value_weight(mixing, row, j).to(tl.float32)
        x = value_tile(mixing, j, candidates, row, tile, variant)
        counts = v != 0.0
        broken |= counts & ((x < INFINITY) == 0)
        inside &= finite(x) | (counts == 0)
        key = tl.fma(v, tl.where(finite(x) & counts, x, 0.0), key)
    broken |= inside & ((key < INFINITY) == 0)  # the sum overflowed to +inf; -inf is allowed
    return tl.where(inside, key, -INFINITY), broken


@triton.jit
def finite_log_linear_tile(mixing, row, tile, variant: tl.constexpr):
    """`log_linear_tile` of a whole tile, to the bit where the reference and what counts is finite,
    NaN elsewhere, in half the instructions."""
    MODELS: tl.constexpr = variant.models
    VALUES: tl.constexpr = variant.scores
    FIRST_POLICY: tl.constexpr = variant.first_policy
    logits = load_logits(mixing, row, tile, True, variant)
    key = tl.zeros_like(logits[0]).to(tl.float32)
    for k in tl.static_range(MODELS):
        x = scaled(mixing, logits, k)
        if k < FIRST_POLICY:
            key = tl.fma(x, reference_weight(mixing, row, variant), key)
        else:
            c = weight(mixing, row, k - FIRST_POLICY).to(tl.float32)
            key = tl.where(c != 0.0, tl.fma(x, c, key), key)
    for j in tl.static_range(VALUES):
        v = value_weight(mixing, row, j).to(tl.float32)
        value = value_tile(mixing, j, None, row, tile, variant)
        key = tl.where(v != 0.0, tl.fma(value, v, key), key)
    return tl.fma(key, 0.0, key)


@triton.jit
def level_of(norm):
    """What is taken off a model's logits before float32 rounds what depends on them: nothing near
    0, further off a whole number, which leaves differences of 16-bit logits exact."""
    return tl.where(tl.abs(norm) > FAR_LEVEL, tl.floor(norm + 0.5), 0.0).to(tl.float32)


@triton.jit
def deficit_tile(mixing, state, row, tile, variant: tl.constexpr):
    """log pi_ref, Q, and which tokens have a broken value. Q is EXCLUDED off the support. It is
    float64 where the call has values: a tilt moves min Q away from 0."""
    MODELS: tl.constexpr = variant.models
    VALUES: tl.constexpr = variant.scores
    logits = logits_of_tile(mixing, row, tile, variant)
    ref = scaled(mixing, logits, 0)
    zeros = tl.zeros_like(ref)
    plausible = zeros == 0.0
    if variant.plausible == 0:
        plausible = plausible_tile(mixing, state, ref, row, 0)
    ref = ref - level_of(tl.load(state + LOG_NORM))
    log_ref = ref - tl.load(state + LOG_SUM).to(tl.float32)
    # log pi_ref where all that counts is finite, else NaN: eight comparisons need more predicates
    # than there are.
    support = log_ref
    q = zeros
    for k in tl.static_range(1, MODELS):
        x = scaled(mixing, logits, k)
        w = zeros + weight(mixing, row, k - 1).to(tl.float32)
        counts = w != 0.0
        if variant.plausible == k:
            plausible = plausible_tile(mixing, state, x, row, k)
        x = x - level_of(tl.load(state + LOG_NORM + k))
        support = tl.where(counts, tl.fma(x, 0.0, support), support)
        # Subtract the raw logits first: that is exact for 16-bit logits.
        d = (x - ref) + tl.load(state + SHIFT + k).to(tl.float32)
        q = tl.where(counts, q + w * policy_deficit(d, mixing, state, variant), q)
    inside = plausible & (support >= SMALLEST_LOG_REF)
    inside &= q < EXCLUDED
    broken = zeros != 0.0
    if VALUES > 0:
        tilted = q.to(tl.float64)
        candidates = candidates_of_tile(mixing, row, tile, variant)
        inside &= candidates >= 0
        for j in tl.static_range(VALUES):
            v = value_weight(mixing, row, j).to(tl.float32).to(tl.float64) + zeros.to(tl.float64)
            if variant.own_mass:
                v = v * tilt_scale(mixing, state, variant)
            x = value_tile(mixing, j, candidates, row, tile, variant)
            counts = v != 0.0
            broken |= counts & ((x < INFINITY) == 0)
            inside &= finite(x) | (counts == 0)
            tilted -= tl.where(finite(x) & counts, v * x.to(tl.float64), 0.0)
        inside &= tilted < EXCLUDED
        return log_ref, tl.where(inside, tilted, EXCLUDED), broken
    else:
        return log_ref, tl.where(inside, q, EXCLUDED), broken
