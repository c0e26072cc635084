"""The last launch where a bias, top-k, top-p or min-p are on: finds the least key of each row that
the filters keep, and draws.

The launches before have stored the largest key of every *cell*, of 8 tokens or more. A lower bound
of the least key follows from these maxima alone. Only few cells reach it: their keys fit registers,
where one program finds the least key. A row with more such cells is *flat*: it is swept by several
programs (flat_rows.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .draw import store_draw, store_proposal, summed_masses, winner_tile, winner_token
from .elementary import exp
from .flat_rows import search_row
from .keys import key_tile
from .parameters import (
    good_parameters,
    inverse_temperature,
    row_parameter,
    row_seed,
    temperature_of,
)
from .parts import row_fields
from .thresholds import (
    FIXED_POINT,
    LEAST_ORDER,
    STORED,
    fixed_mass,
    least_order,
    narrowed,
    ordered,
    pivots_of,
    share_of,
    store_inside,
    unordered,
    weights_from,
)
from .workspace import CANDIDATES, LEVEL, MIX_LOG_NORM, STATE_FIELDS, VALID

#: By how much a row's mass, summed in float32 in each tile, may differ from its keys' in fixed
#: point: 1.5e-5 of it. The largest part is the rounding of exponents as large as 27, where fixed
#: point ends.
ROUNDING = tl.constexpr(1.5e-5)
MARGIN = tl.constexpr(2e-6)  # of a bound: 16 roundings of float32


@triton.jit
def key_below(peak, distance):
    """The order of a key that is no larger than any rounding of peak + distance."""
    bound = peak + distance - MARGIN * (tl.abs(peak) + tl.abs(distance))
    return tl.maximum(ordered(bound), LEAST_ORDER)


@triton.jit
def bound_of_maxima(
    cell_peaks, order, peaks, k, use_k, use_p, share, total, log_min_p, peak, beta, vocab, tiles,
    variant: tl.constexpr,
):  # fmt: skip
    """A lower bound of the order of the least key that the filters keep, and how many of the cells'
    maxima [1, CELLS] reach it. `share` is the mass that top-p needs, of `total`."""
    MOST: tl.constexpr = CANDIDATES // variant.cell
    most = share * (1.0 + ROUNDING)
    low = tl.full([], LEAST_ORDER, tl.int32)
    count = tl.sum(tl.sum((order >= low).to(tl.int32), 1), 0)
    if count > MOST:
        # All tokens lighter than this together weigh so little that top-p drops them.
        light = (total * (1.0 - ROUNDING) - most) / vocab
        distance = tl.log(tl.where(light > 0.0, light, 1.0)).to(tl.float32)
        distance = tl.where(light > 0.0, distance, -INFINITY)
        distance = tl.where(use_p, distance, log_min_p)
        low = key_below(peak, distance / beta)
        # Each tile has a key that reaches the least of their peaks.
        i = tl.arange(0, variant.tiles)
        least_peak = tl.min(tl.where(i < tiles, peaks, INFINITY), 0)
        least_peak = tl.where(k <= tiles, least_peak, -INFINITY)
        low = tl.where(use_k, tl.maximum(ordered(least_peak), LEAST_ORDER), low)
        count = tl.sum(tl.sum((order >= low).to(tl.int32), 1), 0)
        # Of the maxima alone as many as are needed, or so much mass, reach an order.
        needed = tl.where(use_k, k.to(tl.float32), (most * (1.0 + 1e-5)).to(tl.float32))
        weight = tl.where(use_k, 1.0, exp((cell_peaks - peak) * beta))
        high = ordered(peak) + 1
        fewer = tl.zeros([], tl.int32)  # maxima that reach `high`
        more = use_k | use_p
        while more & (low + 1 < high) & (count > MOST) & (fewer <= MOST):
            pivot = pivots_of(low, high)
            reached = tl.sum(tl.where(order >= pivot[:, None], weight, 0.0), 1)
            low, high = narrowed(low, high, pivot, reached >= needed)
            count = tl.sum(tl.sum((order >= low).to(tl.int32), 1), 0)
            fewer = tl.sum(tl.sum((order >= high).to(tl.int32), 1), 0)
    return low, count


@triton.jit
def store_reached(maxima, candidates, cells, order, low, high, CELLS: tl.constexpr):
    """Store the numbers of the cells whose maxima, of this `order` [1, CELLS], lie in [low, high).
    The maxima are read once more: that takes less time than moving registers."""
    LANES: tl.constexpr = STORED if CELLS > STORED else CELLS
    inside = (order >= low) & (order < high)
    counts = tl.sum(tl.reshape(inside.to(tl.int32), [CELLS // LANES, LANES]), 0)
    at = tl.cumsum(counts, 0) - counts
    for begin in tl.static_range(0, CELLS, LANES):
        at = store_inside(maxima, candidates, at, begin, cells, low, high, LANES)


@triton.jit
def kept_of_cells(
    work, row, keys, maxima, order, low, count, k, use_k, p, use_p, share, log_min_p, peak, beta,
    vocab, tiles, variant: tl.constexpr,
):  # fmt: skip
    """The least order that is kept, where the cells from `low` on, `count` of them, have all the
    keys that are; stores the masses of the tiles."""
    CELLS: tl.constexpr = variant.tiles * TILE // variant.cell
    TILES: tl.constexpr = variant.tiles
    candidates = work.candidates + row.to(tl.int64) * tl.minimum(vocab, CANDIDATES)
    masses = work.masses + row.to(tl.int64) * tiles
    cells = tiles * (TILE // variant.cell)
    high = ordered(peak) + 1
    store_reached(maxima, candidates, cells, order, low, high, CELLS)
    t = tl.arange(0, variant.tiles)
    tl.store(masses + t, tl.zeros([TILES], tl.int64), mask=t < tiles)
    tl.debug_barrier()
    i = tl.arange(0, CANDIDATES)[None, :]
    there = i // variant.cell < count
    cell = tl.load(candidates + i // variant.cell, mask=there, other=0, cache_modifier=".cg")
    offsets = cell * variant.cell + i % variant.cell
    there &= offsets < vocab
    key = tl.load(keys + offsets, mask=there, other=-INFINITY, cache_modifier=".cg")
    order = ordered(key)
    mass = fixed_mass(key, peak, beta)

    least = low
    if variant.top_k:
        if use_k:
            one = tl.full([1, CANDIDATES], 1, tl.int32)
            least = least_order(order, one, k, low, high)
    if variant.top_p:
        if use_p:
            whole = tl.sum(tl.sum(tl.where(order >= least, mass, 0), 1), 0)
            most = share * (1.0 + ROUNDING)
            fewest = share * (1.0 - ROUNDING)
            exact = use_k | (low == LEAST_ORDER)  # all that counts is here
            needed = tl.where(exact, share_of(p, whole), tl.ceil(most * FIXED_POINT).to(tl.int64))
            cut = least_order(order, mass, needed, least, high)
            above = tl.sum(tl.sum(tl.where(order > cut, mass, 0), 1), 0)
            if (exact == 0) & (above >= tl.ceil(fewest * FIXED_POINT).to(tl.int64)):
                # The rounding of the row's mass decides: sum it in fixed point.
                pivot = tl.full([1], LEAST_ORDER, tl.int32)
                _, wholes = weights_from(keys, pivot, peak, beta, 0, tiles, vocab, True, variant)
                needed = share_of(p, tl.sum(wholes, 0))
                cut = least_order(order, mass, needed, least, high)
            least = cut
    stays = (order >= least) & ((key - peak) * beta >= log_min_p) & (mass > 0)
    tl.atomic_add(masses + offsets // TILE, mass, mask=stays, sem="relaxed")
    tl.debug_barrier()
    return least


@triton.jit
def kept(
    mixing, drawing, work, top_k, row, keys, peaks, parts, peak, beta, tiles, searching, part,
    slices, variant: tl.constexpr,
):  # fmt: skip
    """What top-k, then top-p, then min-p leave of a row: the least key, the least log of a mass,
    and the masses of the tiles, `parts` before. First of all whether this program is to draw, and
    whether the search went well."""
    CELLS: tl.constexpr = variant.tiles * TILE // variant.cell
    vocab = mixing.vocab
    least = tl.full([], LEAST_ORDER, tl.int32)
    k = tl.zeros([], tl.int32)
    p = tl.full([], 1.0, tl.float64)
    log_min_p = tl.full([], float("-inf"), tl.float32)
    if variant.top_k:
        given = row_parameter(top_k, drawing.top_k_pointer, drawing.top_k_stride, row, tl.int64)
        k = tl.where(given < vocab, given, 0).to(tl.int32)
    if variant.top_p:
        p = row_parameter(
            drawing.top_p, drawing.top_p_pointer, drawing.top_p_stride, row, tl.float64
        )
    if variant.min_p:
        min_p = row_parameter(
            drawing.min_p, drawing.min_p_pointer, drawing.min_p_stride, row, tl.float32
        )
        log_min_p = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), log_min_p)
    use_k = k > 0
    use_p = p < 1.0
    draws = part == 0
    well = tl.full([], True, tl.int1)
    if searching & (use_k | use_p | (log_min_p > -INFINITY)):
        total = tl.sum(parts.to(tl.float64), 0)
        share = p * total
        cells = tiles * (TILE // variant.cell)
        i = tl.arange(0, CELLS)[None, :]
        maxima = work.maxima + row.to(tl.int64) * cells
        cell_peaks = tl.load(maxima + i, mask=i < cells, other=-INFINITY)
        order = ordered(cell_peaks)
        low, count = bound_of_maxima(
            cell_peaks, order, peaks, k, use_k, use_p, share, total, log_min_p, peak, beta, vocab,
            tiles, variant,
        )  # fmt: skip
        if count <= CANDIDATES // variant.cell:
            if draws:
                least = kept_of_cells(
                    work, row, keys, maxima, order, low, count, k, use_k, p, use_p, share,
                    log_min_p, peak, beta, vocab, tiles, variant,
                )  # fmt: skip
        else:
            draws, well, least = search_row(
                work, row, keys, low, k, use_k, p, use_p, log_min_p, peak, beta, vocab, tiles,
                slices, variant,
            )  # fmt: skip
        if draws:
            masses = work.masses + row.to(tl.int64) * tiles
            t = tl.arange(0, variant.tiles)
            mass = tl.load(masses + t, mask=t < tiles, other=0, cache_modifier=".cg")
            parts = mass.to(tl.float32) * (1.0 / FIXED_POINT)
    return draws, well, unordered(least), log_min_p, parts


@triton.jit(do_not_specialize=["seed", "position", "top_k", "slices"])
def filter_kernel(
    mixing,
    drawing,
    work,
    seed: tl.int64,
    position: tl.int64,
    top_k: tl.int64,
    slices: tl.int32,
    # Meta-parameters
    variant: tl.constexpr,
):
    """Filters and draws. The launches before have stored the masked and biased keys of each row,
    their peaks and sums, and the maxima of the cells. A row has a program for each of its `slices`;
    unless the row is flat, the first does it alone."""
    row = tl.program_id(0) // slices
    part = tl.program_id(0) % slices
    tiles = tl.cdiv(mixing.vocab, TILE)
    state = work.states + row.to(tl.int64) * STATE_FIELDS
    model_fields = row_fields(work, row, variant)
    fields = model_fields + 2 * variant.models
    keys = work.keys + row.to(tl.int64) * mixing.vocab
    temperature = temperature_of(drawing, row)
    beta = inverse_temperature(temperature)
    valid = tl.load(state + VALID) > 0.0
    valid &= good_parameters(mixing, drawing, row, variant)
    mass, peaks, peak, valid = summed_masses(fields, tiles, beta, valid, variant)
    least = tl.full([], float("-inf"), tl.float32)
    log_min_p = tl.full([], float("-inf"), tl.float32)
    draws = part == 0
    if variant.top_k or variant.top_p or variant.min_p:
        draws, well, least, log_min_p, mass = kept(
            mixing, drawing, work, top_k, row, keys, peaks, mass, peak, beta, tiles,
            valid & (temperature > 0.0), part, slices, variant,
        )  # fmt: skip
        valid &= well
    if draws == 0:
        return
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
    scaled = (key - peak) * beta
    stays = (key > -INFINITY) & (key >= least) & (scaled >= log_min_p)
    token, token_key, inside = winner_token(
        key, tl.where(stays, exp(scaled), 0.0), tile, temperature, peak, own_seed, own_position
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
