"""What a program computes from one tile of 1024 token ids: loads, log-sum-exps, keys and deficits
(design §2). `m` is a `Mixing`, `C` a `Variant` (launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import exp

#: Tile of the race in token ids; part of the definition of the random numbers (design §3).
TILE = tl.constexpr(1024)
INFINITY = tl.constexpr(float("inf"))
#: Q of a token outside the support: its ratio is 0 in float32, and it is still finite.
EXCLUDED = tl.constexpr(9.999999933815813e36)  # 1e37 in float32
SMALLEST_WEIGHT = tl.constexpr(2.0**-126)  # a normal float32
WEIGHT_ROUNDING = tl.constexpr(2.0**-40)  # of a sum of weights
FLOAT32_ROUNDING = tl.constexpr(2.0**-24)  # of each number of one
LEAST_TAU = tl.constexpr(1e-36)  # of Z = 0 where sup f' is finite
SMALLEST_LOG_REF = tl.constexpr(-80.0)  # the range of float32, design §2
SMALLEST_LOG_RATIO = tl.constexpr(-80.0)
FAR_LEVEL = tl.constexpr(128.0)  # of a model's log-sum-exp

# Fields of a row's state, float64.
LOG_NORM = tl.constexpr(0)  # [9], log-sum-exp of each model's logits
PEAK = tl.constexpr(9)  # [9]
SHIFT = tl.constexpr(18)  # [9], added to differences of logits less their levels to make d
LEAST = tl.constexpr(27)  # min Q over the support
BEST_TOKEN = tl.constexpr(28)  # s* = argmin Q, and pi_ref of it
BEST_MASS = tl.constexpr(29)
POINT = tl.constexpr(30)  # where G is evaluated next: t = shift(tau), or tau
LOWER = tl.constexpr(31)  # the bracket of that
UPPER = tl.constexpr(32)
SOLVED = tl.constexpr(33)
LEVEL = tl.constexpr(34)  # log pi* = (key - level) - log_norm
MIX_LOG_NORM = tl.constexpr(35)
VALID = tl.constexpr(36)
STEPS = tl.constexpr(37)  # evaluations of G so far, that of the deficits aside
STATE_FIELDS = tl.constexpr(40)


@triton.jit
def load_tile(row_pointer, tile, vocab, OTHER: tl.constexpr):
    """A row's tile as float32; `OTHER` beyond the vocabulary. Whole tiles are loaded without a
    mask, which keeps the loads wide for any vocabulary size."""
    offsets = tile * TILE + tl.arange(0, TILE)
    if (tile + 1) * TILE <= vocab:
        x = tl.load(row_pointer + offsets).to(tl.float32)
    else:
        x = tl.load(row_pointer + offsets, mask=offsets < vocab, other=OTHER).to(tl.float32)
    return x


@triton.jit
def model_tile(m, k: tl.constexpr, row, tile):
    """Scaled logits of model k."""
    x = load_tile(m.logits[k] + row.to(tl.int64) * m.strides[k], tile, m.vocab, float("-inf"))
    if m.scales is not None:
        x = x * m.scales[k]
    return x


@triton.jit
def value_tile(m, j: tl.constexpr, row, tile):
    """V_j, -inf beyond the vocabulary."""
    pointer = m.scores + tl.full([], j, tl.int64) * m.value_strides[0]
    pointer += row.to(tl.int64) * m.value_strides[1]
    return load_tile(pointer, tile, m.vocab, float("-inf"))


@triton.jit
def normal(weight):
    """A weight; 0 where float32 holds no normal number for it."""
    return tl.where(tl.abs(weight) < SMALLEST_WEIGHT, 0.0, weight)


@triton.jit
def weight(m, row, i: tl.constexpr):
    """w of policy i (counted from 0), float64."""
    if m.weights_pointer is None:
        return normal(tl.full([], m.weights[i], tl.float64))
    else:
        offset = row.to(tl.int64) * m.weights_strides[0] + i * m.weights_strides[1]
        return normal(tl.load(m.weights_pointer + offset).to(tl.float64))


@triton.jit
def value_weight(m, row, j: tl.constexpr):
    """v of value j, float64."""
    if m.value_weights_pointer is None:
        return normal(tl.full([], m.value_weights[j], tl.float64))
    else:
        offset = row.to(tl.int64) * m.value_weights_strides[0] + j * m.value_weights_strides[1]
        return normal(tl.load(m.value_weights_pointer + offset).to(tl.float64))


@triton.jit
def reference_weight(m, row, C: tl.constexpr):
    """1 - sum w, float32."""
    POLICIES: tl.constexpr = C.models - 1
    if m.weights_pointer is None:
        return tl.full([], m.reference_weight, tl.float32)
    else:
        total = tl.zeros([], tl.float64)
        for i in tl.static_range(POLICIES):
            total += weight(m, row, i)
        return (1.0 - total).to(tl.float32)


@triton.jit
def own_coefficient(m, row, C: tl.constexpr):
    """1 - sum w under reverse KL, float32; 0 where that is no more than rounding."""
    own = reference_weight(m, row, C)
    rounding = tl.full([], WEIGHT_ROUNDING, tl.float32)
    if m.weights_pointer is not None:
        if m.weights_pointer.dtype.element_ty == tl.float32:
            rounding = tl.full([], C.models * FLOAT32_ROUNDING, tl.float32)
    return tl.where(tl.abs(own) <= rounding, 0.0, own)


@triton.jit
def finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def sum_exp(x, peak, broken):
    """sum exp(x - peak), NaN where some token is broken. (One reduction instead of two: each holds
    registers for as long as its program runs.)"""
    terms = exp(x - tl.where(peak == -INFINITY, 0.0, peak))
    return tl.sum(tl.where(broken, float("nan"), terms), 0)


@triton.jit
def peak_and_sum(x):
    """max x and sum exp(x - max) of a tile; the sum is NaN where NaN or +inf stands in it."""
    peak = tl.max(x, 0)
    # +inf becomes inf - inf; the maximum passes NaN over, the difference does not.
    return peak, tl.sum(exp(x - tl.where(peak == -INFINITY, 0.0, peak)), 0)


@triton.jit
def store_model_sum(x, k: tl.constexpr, fields, tile, C: tl.constexpr):
    peak, total = peak_and_sum(x)
    tl.store(fields + 2 * k * C.tiles + tile, peak)
    tl.store(fields + (2 * k + 1) * C.tiles + tile, total)


@triton.jit
def log_linear_tile(
    m,
    state,
    fields,
    row,
    tile,
    tiles,
    C: tl.constexpr,
):
    """The log-linear key, -inf off the support, and where a tensor that counts is broken. Terms
    are accumulated in the order of design §3: the order of tokens depends on it."""
    MODELS: tl.constexpr = C.models
    VALUES: tl.constexpr = C.scores
    FIRST_POLICY: tl.constexpr = C.first_policy
    zeros = tl.zeros([TILE], tl.float32)
    key = zeros
    inside = tile * TILE + tl.arange(0, TILE) < m.vocab
    broken = tl.zeros([TILE], tl.int1)
    for k in tl.static_range(MODELS):
        x = model_tile(m, k, row, tile)
        if C.model_logprobs and not C.sums:
            store_model_sum(x, k, fields, tile, C)
        if k == C.plausible:
            inside &= x - tl.load(state + PEAK + k).to(tl.float32) >= m.log_plausibility
        if k < FIRST_POLICY:
            c = zeros + own_coefficient(m, row, C)
        else:
            c = zeros + weight(m, row, k - FIRST_POLICY).to(tl.float32)
        counts = c != 0.0
        broken |= counts & ((x < INFINITY) == 0)
        inside &= finite(x) | (counts == 0)
        key = tl.fma(c, tl.where(finite(x) & counts, x, 0.0), key)
    for j in tl.static_range(VALUES):
        v = zeros + value_weight(m, row, j).to(tl.float32)
        x = value_tile(m, j, row, tile)
        counts = v != 0.0
        broken |= counts & ((x < INFINITY) == 0)
        inside &= finite(x) | (counts == 0)
        key = tl.fma(v, tl.where(finite(x) & counts, x, 0.0), key)
    broken |= inside & ((key < INFINITY) == 0)  # the sum itself overflowed; to -inf it may
    return tl.where(inside, key, -INFINITY), broken


@triton.jit
def finite_log_linear_tile(m, row, tile, C: tl.constexpr):
    """`log_linear_tile` to the bit where all that counts is finite, NaN elsewhere, in half the
    instructions."""
    MODELS: tl.constexpr = C.models
    VALUES: tl.constexpr = C.scores
    FIRST_POLICY: tl.constexpr = C.first_policy
    key = tl.zeros([TILE], tl.float32)
    for k in tl.static_range(MODELS):
        x = model_tile(m, k, row, tile)
        if k < FIRST_POLICY:
            c = own_coefficient(m, row, C)
        else:
            c = weight(m, row, k - FIRST_POLICY).to(tl.float32)
        key = tl.where(c != 0.0, tl.fma(x, c, key), key)
    for j in tl.static_range(VALUES):
        v = value_weight(m, row, j).to(tl.float32)
        key = tl.where(v != 0.0, tl.fma(value_tile(m, j, row, tile), v, key), key)
    return tl.fma(key, 0.0, key)


@triton.jit
def level_of(state, k: tl.constexpr):
    """What is taken off a model's logits before float32 rounds what depends on them: nothing near
    0, further off a whole number, which leaves differences of 16-bit logits exact."""
    norm = tl.load(state + LOG_NORM + k)
    return tl.where(tl.abs(norm) > FAR_LEVEL, tl.floor(norm + 0.5), 0.0)


@triton.jit
def deficit_tile(m, state, row, tile, C: tl.constexpr):
    """log pi_ref, Q (EXCLUDED off the support; float64 where there are values, because a tilt moves
    min Q away from 0), and where a value is broken."""
    MODELS: tl.constexpr = C.models
    VALUES: tl.constexpr = C.scores
    ref = model_tile(m, 0, row, tile)
    plausible = tl.full([TILE], True, tl.int1)
    if C.plausible == 0:
        plausible = ref - tl.load(state + PEAK).to(tl.float32) >= m.log_plausibility
    level = level_of(state, 0)
    ref = ref - level.to(tl.float32)
    log_ref = ref - (tl.load(state + LOG_NORM) - level).to(tl.float32)
    # log pi_ref where all that counts is finite, else NaN: eight comparisons need more predicates
    # than there are.
    support = log_ref
    zeros = tl.zeros([TILE], tl.float32)
    q = zeros
    for k in tl.static_range(1, MODELS):
        x = model_tile(m, k, row, tile)
        if k == C.plausible:
            plausible = x - tl.load(state + PEAK + k).to(tl.float32) >= m.log_plausibility
        x = x - level_of(state, k).to(tl.float32)
        w = zeros + weight(m, row, k - 1).to(tl.float32)
        counts = w != 0.0
        support = tl.where(counts, tl.fma(x, 0.0, support), support)
        # Raw differences first: they are exact for logits of 16 bits.
        d = (x - ref) + tl.load(state + SHIFT + k).to(tl.float32)
        if C.clamped:
            d = tl.maximum(d, SMALLEST_LOG_RATIO)
        q = tl.where(counts, q + w * C.deficit(d, m.alpha), q)
    inside = plausible & (support >= SMALLEST_LOG_REF)
    inside &= q < EXCLUDED
    broken = tl.zeros([TILE], tl.int1)
    if VALUES > 0:
        tilted = q.to(tl.float64)
        for j in tl.static_range(VALUES):
            v = value_weight(m, row, j).to(tl.float32).to(tl.float64) + tl.zeros([TILE], tl.float64)
            x = value_tile(m, j, row, tile)
            counts = v != 0.0
            broken |= counts & ((x < INFINITY) == 0)
            inside &= finite(x) | (counts == 0)
            tilted -= tl.where(finite(x) & counts, v * x.to(tl.float64), 0.0)
        inside &= tilted < EXCLUDED
        return log_ref, tl.where(inside, tilted, EXCLUDED), broken
    else:
        return log_ref, tl.where(inside, q, EXCLUDED), broken
