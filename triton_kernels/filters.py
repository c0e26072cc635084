"""The second launch, where a bias, top-k, top-p or min-p are on: for each row one program adds the
bias, finds the least key that the filters keep, by counting, and draws."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .draw import store_draw, store_proposal, winner_tile, winner_token
from .elementary import exp
from .keys import key_tile
from .parameters import (
    good_parameters,
    inverse_temperature,
    row_parameter,
    row_seed,
    temperature_of,
)
from .workspace import (
    DRAW_PEAK,
    DRAW_SUM,
    KEY_PEAK,
    LEVEL,
    MIX_LOG_NORM,
    STATE_FIELDS,
    VALID,
    by_tile,
    part_field,
    row_fields,
    tile_field,
    tile_fields,
)

FIXED_POINT = tl.constexpr(1099511627776.0)  # 2^40: masses are summed as integers of this unit
BITS = tl.constexpr(3)  # bits of the threshold that one sweep over the row finds


@triton.jit
def ordered(x):
    """An unsigned integer with the order of the floats; equal for -0 and +0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    sign = tl.full([], 0x80000000, tl.uint32)
    ones = tl.full([], 0xFFFFFFFF, tl.uint32)  # Triton 3.6's interpreter lacks ~ for uint32
    return tl.where((bits & sign) != 0, bits ^ ones, bits | sign)


@triton.jit
def unordered(x):
    sign = tl.full([], 0x80000000, tl.uint32)
    ones = tl.full([], 0xFFFFFFFF, tl.uint32)
    return tl.where((x & sign) != 0, x ^ sign, x ^ ones).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(keys, begin, vocab, peak, beta, least, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The `ordered` keys of a block and their weights: 1, or with MASS the mass in fixed point. The
    weight is 0 below `least` and where the mask forbids the token."""
    offsets = begin + tl.arange(0, BLOCK)
    key = tl.load(keys + offsets, mask=offsets < vocab, other=-INFINITY, cache_modifier=".cg")
    kept = (key > -INFINITY) & (key >= least)
    if MASS:
        mass = exp((tl.where(kept, key, peak) - peak) * beta) * FIXED_POINT
        weight = tl.where(kept, mass.to(tl.int64), 0)
    else:
        weight = kept.to(tl.int64)
    return ordered(key), weight


@triton.jit
def weighted_rank(
    keys, vocab, peak, beta, least, share, count, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key such that it and all larger keys together weigh at least `count`, or with
    MASS ceil(share * total); -inf if all keys weigh less. Sums of integers do not depend on the
    order."""
    needed = count.to(tl.int64)
    if MASS:
        total = tl.zeros([], tl.int64)
        for begin in range(0, vocab, BLOCK):
            _, weight = weights_of(keys, begin, vocab, peak, beta, least, MASS, BLOCK)
            total += tl.sum(weight, 0)
        needed = tl.ceil(share.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    found = tl.zeros([], tl.uint32)
    shift = 32
    lowest = tl.full([], False, tl.int1)
    while shift > 0:
        bits = tl.minimum(shift, BITS)
        shift -= bits
        steps = (1 << bits) - 1
        # w_j: the weight of all keys from the candidate found + (j << shift) on.
        w1 = tl.zeros([], tl.int64)
        w2 = tl.zeros([], tl.int64)
        w3 = tl.zeros([], tl.int64)
        w4 = tl.zeros([], tl.int64)
        w5 = tl.zeros([], tl.int64)
        w6 = tl.zeros([], tl.int64)
        w7 = tl.zeros([], tl.int64)
        w0 = tl.zeros([], tl.int64)
        for begin in range(0, vocab, BLOCK):
            order, weight = weights_of(keys, begin, vocab, peak, beta, least, MASS, BLOCK)
            order = order.to(tl.int64)
            base = found.to(tl.int64)
            unit = (tl.zeros([], tl.int64) + 1) << shift
            w0 += tl.sum(weight, 0)
            w1 += tl.sum(tl.where(order >= base + unit, weight, 0), 0)
            w2 += tl.sum(tl.where(order >= base + 2 * unit, weight, 0), 0)
            w3 += tl.sum(tl.where(order >= base + 3 * unit, weight, 0), 0)
            w4 += tl.sum(tl.where(order >= base + 4 * unit, weight, 0), 0)
            w5 += tl.sum(tl.where(order >= base + 5 * unit, weight, 0), 0)
            w6 += tl.sum(tl.where(order >= base + 6 * unit, weight, 0), 0)
            w7 += tl.sum(tl.where(order >= base + 7 * unit, weight, 0), 0)
        lowest = w0 < needed
        step = (w1 >= needed).to(tl.int32) + (w2 >= needed).to(tl.int32)
        step += (w3 >= needed).to(tl.int32) + (w4 >= needed).to(tl.int32)
        step += (w5 >= needed).to(tl.int32) + (w6 >= needed).to(tl.int32)
        step += (w7 >= needed).to(tl.int32)
        step = tl.minimum(step, steps)
        found += step.to(tl.uint32) << shift.to(tl.uint32)
    return tl.where(lowest, -INFINITY, unordered(found))


@triton.jit
def block_at(begin, vocab, variant: tl.constexpr):
    """The tiles of a block from tile `begin` on, their tokens, and which of these there are."""
    tile = begin + tl.arange(0, variant.filter_block // TILE)
    offsets = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    return tile, offsets, offsets < vocab


@triton.jit
def add_bias(drawing, state, fields, keys, row, vocab, tiles, variant: tl.constexpr):
    """Add the bias to a row's keys, up to a constant, and store the tiles' peaks. Returns whether
    the bias holds neither NaN nor +inf."""
    ROWS: tl.constexpr = variant.filter_block // TILE
    biases = drawing.bias + row.to(tl.int64) * drawing.bias_stride
    level = tl.load(state + LEVEL).to(tl.float32)
    highest = tl.full([], float("-inf"), tl.float32)
    unreadable = tl.zeros([], tl.int32)
    for begin in range(0, tiles, ROWS):
        _, offsets, inside = block_at(begin, vocab, variant)
        key = tl.load(keys + offsets, mask=inside, other=-INFINITY, cache_modifier=".cg")
        bias = tl.load(biases + offsets, mask=inside, other=0.0).to(tl.float32)
        unreadable += tl.sum(tl.sum(((bias < INFINITY) == 0).to(tl.int32), 1), 0)
        left = tl.where((key > -INFINITY) & (bias < INFINITY), bias, -INFINITY)
        highest = tl.maximum(highest, tl.max(tl.max(left, 1), 0))
    for begin in range(0, tiles, ROWS):
        tile, offsets, inside = block_at(begin, vocab, variant)
        key = tl.load(keys + offsets, mask=inside, other=-INFINITY, cache_modifier=".cg")
        bias = tl.load(biases + offsets, mask=inside, other=0.0).to(tl.float32)
        # Both are measured from their largest, so that neither rounds the other away.
        key = tl.where(key > -INFINITY, (key - level) + (bias - highest), -INFINITY)
        tl.store(keys + offsets, key, mask=inside)
        peaks = tile_fields(fields, DRAW_PEAK, tile, variant)
        tl.store(peaks, tl.max(key, 1), mask=tile < tiles)
    tl.debug_barrier()
    return unreadable == 0


@triton.jit
def kept_mass(key, peak, beta, least, log_min_p):
    scaled = (tl.where(key > -INFINITY, key, peak) - peak) * beta
    kept = (key > -INFINITY) & (key >= least) & (scaled >= log_min_p)
    return tl.where(kept, exp(scaled), 0.0)


@triton.jit(do_not_specialize=["seed", "position", "top_k"])
def filter_kernel(
    mixing,
    drawing,
    work,
    seed: tl.int64,
    position: tl.int64,
    top_k: tl.int64,
    # Meta-parameters
    variant: tl.constexpr,
):
    """Filters and draws a row. `mixture_kernel` has stored its masked keys and their norm."""
    BLOCK: tl.constexpr = variant.filter_block
    ROWS: tl.constexpr = variant.filter_block // TILE
    row = tl.program_id(0)
    tiles = tl.cdiv(mixing.vocab, TILE)
    state = work.states + row.to(tl.int64) * STATE_FIELDS
    model_fields = row_fields(work, row, variant)
    fields = model_fields + 2 * variant.models
    keys = work.keys + row.to(tl.int64) * mixing.vocab
    temperature = temperature_of(drawing, row)
    beta = inverse_temperature(temperature)
    readable = tl.full([], True, tl.int1)
    if variant.bias:
        readable = add_bias(drawing, state, fields, keys, row, mixing.vocab, tiles, variant)
    if variant.bias:
        peaks = tile_field(fields, DRAW_PEAK, tiles, variant, float("-inf"))
    else:
        FIELD: tl.constexpr = DRAW_PEAK if variant.mask or variant.tempered else KEY_PEAK
        peaks = part_field(fields, FIELD, tiles, variant, float("-inf"))
        peaks = tl.max(by_tile(peaks, variant), 1)
    peak = tl.max(peaks, 0)
    valid = (
        (tl.load(state + VALID) > 0.0)
        & (tl.abs(peak) < INFINITY)
        & readable
        & good_parameters(mixing, drawing, row, variant)
    )
    peak = tl.where(valid, peak, 0.0)
    searching = valid & (temperature > 0.0)

    least = tl.full([], float("-inf"), tl.float32)
    one = tl.full([], 1.0, tl.float64)
    if variant.top_k:
        k = row_parameter(top_k, drawing.top_k_pointer, drawing.top_k_stride, row, tl.int64)
        if searching & (k > 0) & (k < mixing.vocab):
            least = weighted_rank(keys, mixing.vocab, peak, beta, least, one, k, False, BLOCK)
    if variant.top_p:
        p = row_parameter(
            drawing.top_p, drawing.top_p_pointer, drawing.top_p_stride, row, tl.float64
        )
        if searching & (p < 1.0):
            none = tl.zeros([], tl.int64)
            cut = weighted_rank(keys, mixing.vocab, peak, beta, least, p, none, True, BLOCK)
            least = tl.maximum(least, cut)
    log_min_p = tl.full([], float("-inf"), tl.float32)
    if variant.min_p:
        min_p = row_parameter(
            drawing.min_p, drawing.min_p_pointer, drawing.min_p_stride, row, tl.float32
        )
        log_min_p = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), log_min_p)

    for begin in range(0, tiles, ROWS):
        tile, offsets, inside = block_at(begin, mixing.vocab, variant)
        key = tl.load(keys + offsets, mask=inside, other=-INFINITY, cache_modifier=".cg")
        tl.store(
            tile_fields(fields, DRAW_SUM, tile, variant),
            tl.sum(kept_mass(key, peak, beta, least, log_min_p), 1),
            mask=tile < tiles,
        )
    tl.debug_barrier()
    mass = tile_field(fields, DRAW_SUM, tiles, variant, 0.0)
    own_seed = row_seed(drawing, seed, row)
    own_position = row_parameter(
        position, drawing.position_pointer, drawing.position_stride, row, tl.int64
    )
    tile, found = winner_tile(mass, temperature, peaks, peak, own_seed, own_position, variant)
    tile = tl.where(valid & found, tile, 0)
    offsets = tile * TILE + tl.arange(0, TILE)
    key = tl.load(
        keys + offsets, mask=offsets < mixing.vocab, other=-INFINITY, cache_modifier=".cg"
    )
    token, token_key, inside = winner_token(
        key,
        kept_mass(key, peak, beta, least, log_min_p),
        tile,
        temperature,
        peak,
        own_seed,
        own_position,
    )
    valid = valid & found & inside
    own_key = token_key
    if variant.bias:
        unbiased = key_tile(mixing, state, model_fields, row, tile, tiles, variant)
        own_key = tl.sum(tl.where(offsets == token, unbiased, 0.0), 0)
    logprob = own_key - tl.load(state + LEVEL) - tl.load(state + MIX_LOG_NORM)
    store_draw(mixing, drawing, state, model_fields, row, token, logprob, valid, tiles, variant)
    if variant.proposal_logprobs:
        store_proposal(drawing, row, valid, token_key, peak, mass, temperature)
