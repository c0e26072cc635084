"""From the masses of a row's tiles to a token: parameters, mask and the two-level race (design §3).
`m` is a
`Mixing`, `r` a `Drawing` (parameters.py), `C` a `Variant` (launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import exponential, split_mix
from .normalizer import store_model_norms
from .tiles import INFINITY, LOG_NORM, TILE, value_weight, weight

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def row_parameter(number, pointer, stride, row, DTYPE: tl.constexpr):
    """A row's parameter, from the launch or from a tensor."""
    if pointer is None:
        return tl.full([], number, DTYPE)
    else:
        return tl.load(pointer + row.to(tl.int64) * stride).to(DTYPE)


@triton.jit
def temperature_of(r, row):
    return row_parameter(
        r.temperature, r.temperature_pointer, r.temperature_stride, row, tl.float32
    )


@triton.jit
def inverse_temperature(temperature):
    """Finite even for the smallest temperatures, so that 0 times it is 0; 1 for temperature 0."""
    beta = tl.where(temperature > 1e-38, 1.0 / temperature, 1e38)
    return tl.where(temperature > 0.0, beta, 1.0)


@triton.jit
def good_weights(m, row, C: tl.constexpr):
    """Whether the weights are finite; those of the launch have been checked."""
    POLICIES: tl.constexpr = C.models - C.first_policy
    VALUES: tl.constexpr = C.scores
    good = tl.full([], True, tl.int1)
    if m.weights_pointer is not None:
        for i in tl.static_range(POLICIES):
            good = good & (tl.abs(weight(m, row, i)) < INFINITY)
    if m.value_weights_pointer is not None:
        for j in tl.static_range(VALUES):
            good = good & (tl.abs(value_weight(m, row, j)) < INFINITY)
    return good


@triton.jit
def good_parameters(r, m, row, C: tl.constexpr):
    """Whether what only the device can see is in range."""
    good = good_weights(m, row, C)
    if r.temperature_pointer is not None:
        t = temperature_of(r, row)
        good = good & (t >= 0.0) & (t < INFINITY)
    if r.top_k_pointer is not None:
        good = good & (tl.load(r.top_k_pointer + row.to(tl.int64) * r.top_k_stride) >= 0)
    if r.top_p_pointer is not None:
        p = tl.load(r.top_p_pointer + row.to(tl.int64) * r.top_p_stride)
        good = good & (p > 0.0) & (p <= 1.0)
    if r.min_p_pointer is not None:
        p = tl.load(r.min_p_pointer + row.to(tl.int64) * r.min_p_stride)
        good = good & (p >= 0.0) & (p <= 1.0)
    return good


@triton.jit
def allowed(r, m, row, offsets, C: tl.constexpr):
    """The mask of some tokens."""
    inside = offsets < m.vocab
    columns = offsets.to(tl.int64)
    row_mask = r.mask + row.to(tl.int64) * r.mask_strides[0]
    if C.packed_mask:
        word = tl.load(row_mask + (columns // 32) * r.mask_strides[1], mask=inside, other=0)
        return ((word >> (offsets % 32)) & 1) != 0
    else:
        return tl.load(row_mask + columns * r.mask_strides[1], mask=inside, other=0) != 0


@triton.jit
def first_least(x, index, END: tl.constexpr):
    """The lowest index among those of the least x, and whether there is one below infinity."""
    least = tl.min(x, 0)
    return tl.min(tl.where(x == least, index, END), 0), least < INFINITY


@triton.jit
def race(
    mass, highest, cold, index, local, seed, position, STREAM: tl.constexpr, END: tl.constexpr
):
    """argmin of E / mass, as an entry of `local`; at temperature 0 (`cold`) the first of the
    highest. A mass of 0 never wins, not even against a quotient that overflows."""
    arrival = tl.minimum(exponential(seed, position, index, STREAM) / mass, LARGEST)
    arrival = tl.where(mass > 0.0, arrival, INFINITY)
    arrival = tl.where(cold, tl.where(highest, 0.0, INFINITY), arrival)
    return first_least(arrival, local, END)


@triton.jit
def row_seed(r, seed, row):
    """Row b's own seed, or SplitMix64(seed + b)."""
    if r.seed_pointer is None:
        return split_mix(row.to(tl.int64) + seed)
    else:
        return tl.load(r.seed_pointer + row.to(tl.int64) * r.seed_stride)


@triton.jit
def winner_tile(mass, temperature, peaks, peak, seed, position, C: tl.constexpr):
    """The tile that holds the token, and whether there is one; at temperature 0 the first that
    holds the largest key."""
    i = tl.arange(0, C.tiles)
    cold = temperature == 0.0
    return race(mass, peaks == peak, cold, i, i, seed, position, 0, C.tiles)


@triton.jit
def winner_token(key, mass, tile, temperature, peak, seed, position):
    """The token in its tile, and its key."""
    i = tl.arange(0, TILE)
    cold = temperature == 0.0
    local, found = race(mass, key == peak, cold, tile * TILE + i, i, seed, position, 1, TILE)
    token_key = tl.sum(tl.where(i == local, key, 0.0), 0)
    return local + tile * TILE, token_key, found


@triton.jit
def store_draw(
    r,
    m,
    state,
    model_fields,
    row,
    token,
    logprob,
    valid,
    tiles,
    C: tl.constexpr,
):
    """The outputs of a row."""
    MODELS: tl.constexpr = C.models
    token = tl.where(valid, token, 0).to(tl.int64)
    tl.store(r.tokens + row, token)
    tl.store(r.logprobs + row, tl.where(valid, logprob, float("nan")).to(tl.float32))
    tl.store(r.valid + row, valid.to(tl.int8))
    if C.model_logprobs:
        if not C.sums:
            store_model_norms(state, model_fields, tiles, C)
        for k in tl.static_range(MODELS):
            norm = tl.load(state + LOG_NORM + k)
            x = tl.load(m.logits[k] + row.to(tl.int64) * m.strides[k] + token).to(tl.float32)
            if m.scales is not None:
                x = x * m.scales[k]
            own = tl.where(valid, x - norm, float("nan")).to(tl.float32)
            tl.store(r.model_logprobs + row.to(tl.int64) * MODELS + k, own)
