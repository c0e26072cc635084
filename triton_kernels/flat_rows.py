"""The search for the least key of a flat row, which has too many keys for registers.

Several programs share a row. A *round* sweeps its *slices*, some tiles each. The program that ends
a round's last slice makes the step to the next round:

    COUNT       how many keys there are from each pivot on, for top-k
    MASS        what they weigh, for top-p
    GATHER      the keys between the ends, once they are few; the step finds the least that is kept
    KEEP        the masses of the tiles, of the keys that are kept
    ENDED       no round is left; the program that ended KEEP draws

A program claims a slice of a round by a ticket of the row, and waits for the round before. The
slices of that round have lower tickets, so they are already running: any number of programs makes
progress. An earlier launch has zeroed the row's counters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .handoffs import wait_for
from .thresholds import (
    LEAST_ORDER,
    fixed_mass,
    lane_keys,
    least_order,
    narrowed,
    ordered,
    pivots_of,
    share_of,
    weights_from,
)
from .workspace import CANDIDATES, PIVOTS, SEARCH_FIELDS, SEARCH_SIZE, SLICES

# Rounds. GATHER + COUNT and GATHER + MASS gather for either search.
COUNT, MASS = tl.constexpr(0), tl.constexpr(1)
GATHER = tl.constexpr(2)
KEEP, ENDED = tl.constexpr(4), tl.constexpr(5)

# What the programs hand over, fields of a row's search, int64.
TICKETS = tl.constexpr(0)
ARRIVALS = tl.constexpr(1)
DONE = tl.constexpr(2)  # rounds that have ended, at last more than a ticket has
KIND = tl.constexpr(3)  # of the running round
LOW = tl.constexpr(4)  # the least order that is kept lies in [LOW, HIGH); KEEP: it is LOW
HIGH = tl.constexpr(5)
HELD = tl.constexpr(6)  # at least the number of keys from LOW on; more than V: not known yet
FEWER = tl.constexpr(7)  # the number of keys from HIGH on, and what they weigh
ABOVE = tl.constexpr(8)
NEEDED = tl.constexpr(9)  # what the keys that are kept must weigh
FLOOR = tl.constexpr(10)  # of the keys from here on top-p needs its share
GATHERED = tl.constexpr(11)

#: Most keys that are gathered.
FEW = tl.constexpr(2048)
MORE_THAN_TICKETS = tl.constexpr(1 << 40)


@triton.jit
def search_of(work, row):
    """Where the fields of a row's search are."""
    return work.searches + row.to(tl.int64) * SEARCH_SIZE


@triton.jit
def zero_counters(work, row):
    """To be called by one program of an earlier launch."""
    search = search_of(work, row)
    for field in tl.static_range(3):
        tl.store(search + field, tl.zeros([], tl.int64))


@triton.jit
def field_of(search, FIELD: tl.constexpr, first, initial):
    """A field of the search as the round before has left it, or as it is in the first round."""
    return tl.where(first, initial, tl.load(search + FIELD, cache_modifier=".cg"))


@triton.jit
def gather(search, candidates, keys, low, high, begin, end, vocab, variant: tl.constexpr):
    """Store the keys of the tiles from `begin` to before `end` that are in [low, high)."""
    PASSES: tl.constexpr = TILE // (variant.filter_block // variant.swept)
    for n in range(tl.cdiv(end - begin, variant.swept) * PASSES):
        key = lane_keys(keys, begin, end, n, vocab, variant)
        order = ordered(key)
        inside = (order >= low) & (order < high)
        one = tl.full(key.shape, 1, tl.int64)
        at = tl.atomic_add(search + GATHERED + 0 * order, one, mask=inside, sem="relaxed")
        # Another call on this workspace, which must not be, might have changed the keys.
        inside &= at < FEW
        tl.store(candidates + at, key.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def store_masses(
    masses, keys, least, log_min_p, peak, beta, begin, end, vocab, variant: tl.constexpr
):
    """Store the masses of the tiles from `begin` to before `end`, of the keys that are kept."""
    SWEPT: tl.constexpr = variant.swept
    COLUMNS: tl.constexpr = variant.filter_block // variant.swept
    for tile in range(begin, end, SWEPT):
        mass = tl.zeros([1, SWEPT * COLUMNS], tl.int64)
        for n in range(TILE // COLUMNS):
            key = lane_keys(keys, tile, end, n, vocab, variant)
            stays = (ordered(key) >= least) & ((key - peak) * beta >= log_min_p)
            mass += tl.where(stays, fixed_mass(key, peak, beta), 0)
        i = tile + tl.arange(0, SWEPT)
        tl.store(masses + i, tl.sum(tl.reshape(mass, [SWEPT, COLUMNS]), 1), mask=i < end)


@triton.jit
def store_weights(search, part, counts, weights):
    """Store what a slice has found for each pivot."""
    at = search + SEARCH_FIELDS + part * (2 * PIVOTS) + tl.arange(0, PIVOTS)
    tl.store(at, counts.to(tl.int64))
    tl.store(at + PIVOTS, weights)


@triton.jit
def row_weights(search, slices):
    """The sums over the slices, for each pivot: the numbers of keys and what they weigh."""
    part = tl.arange(0, SLICES)[:, None]
    at = search + SEARCH_FIELDS + part * (2 * PIVOTS) + tl.arange(0, PIVOTS)[None, :]
    counts = tl.load(at, mask=part < slices, other=0, cache_modifier=".cg")
    weights = tl.load(at + PIVOTS, mask=part < slices, other=0, cache_modifier=".cg")
    return tl.sum(counts, 0), tl.sum(weights, 0)


@triton.jit
def least_gathered(candidates, count, needed, low, high, peak, beta, by_mass):
    """`least_order` of the keys that were gathered, which weigh their mass or one each."""
    i = tl.arange(0, FEW)[None, :]
    bits = tl.load(candidates + i, mask=i < count, other=0, cache_modifier=".cg")
    key = tl.where(i < count, bits.to(tl.float32, bitcast=True), -INFINITY)
    weight = tl.where(by_mass, fixed_mass(key, peak, beta), tl.full([], 1, tl.int64))
    return least_order(ordered(key), weight, needed, low, high)


@triton.jit
def range_of(search, first, bound, peak, vocab):
    """LOW, HIGH, HELD and FLOOR of a round, int32."""
    low = field_of(search, LOW, first, bound).to(tl.int32)
    high = field_of(search, HIGH, first, ordered(peak) + 1).to(tl.int32)
    held = field_of(search, HELD, first, vocab + 1).to(tl.int32)
    floor = field_of(search, FLOOR, first, LEAST_ORDER).to(tl.int32)
    return low, high, held, floor


@triton.jit
def begins_search(held, vocab):
    """Whether a pivot is the first one of a search's first round, where it is the floor."""
    return (held > vocab) & (tl.arange(0, PIVOTS) == 0)


@triton.jit
def step(search, candidates, first, kind, bound, k, p, use_p, peak, beta, vocab, slices):
    """The step between a round and the next: stores what that begins with."""
    low, high, held, floor = range_of(search, first, bound, peak, vocab)
    fewer = field_of(search, FEWER, first, 0).to(tl.int32)
    above = field_of(search, ABOVE, first, 0)
    needed = field_of(search, NEEDED, first, k.to(tl.int64))
    following = kind
    if kind < GATHER:
        counts, weights = row_weights(search, slices)
        begins = begins_search(held, vocab)
        whole = tl.sum(tl.where(begins, weights, 0), 0)
        by_share = (kind == MASS) & (held > vocab)
        needed = tl.where(by_share, share_of(p, whole), needed)
        enough = (weights >= needed) | begins
        pivot = tl.where(begins, low, pivots_of(low, high))
        low, high = narrowed(low, high, pivot, enough)
        held = tl.min(tl.where(enough, counts, held), 0).to(tl.int32)
        fewer = tl.max(tl.where(enough, fewer, counts), 0).to(tl.int32)
        above = tl.max(tl.where(enough, above, weights), 0)
        following = tl.where(held - fewer <= FEW, kind + GATHER, kind)
    elif kind < KEEP:
        count = tl.load(search + GATHERED, cache_modifier=".cg")
        by_mass = kind == GATHER + MASS
        low = least_gathered(candidates, count, needed - above, low, high, peak, beta, by_mass)
        high = low + 1
    if low + 1 >= high:  # found
        again = use_p & ((kind == COUNT) | (kind == GATHER + COUNT))
        following = tl.where(again, MASS, KEEP).to(tl.int64)
        high = ordered(peak) + 1
        held = vocab + 1
        fewer = tl.zeros([], tl.int32)
        above = tl.zeros([], tl.int64)
        floor = low
    if kind == KEEP:
        following = tl.full([], ENDED, tl.int64)
    tl.store(search + KIND, following)
    tl.store(search + LOW, low.to(tl.int64))
    tl.store(search + HIGH, high.to(tl.int64))
    tl.store(search + HELD, held.to(tl.int64))
    tl.store(search + FEWER, fewer.to(tl.int64))
    tl.store(search + ABOVE, above)
    tl.store(search + NEEDED, needed)
    tl.store(search + FLOOR, floor.to(tl.int64))
    tl.store(search + GATHERED, tl.zeros([], tl.int64))


@triton.jit
def sweep_slice(
    work, row, search, keys, first, kind, bound, log_min_p, peak, beta, vocab, tiles, part, slices,
    variant: tl.constexpr,
):  # fmt: skip
    """A slice of a round."""
    low, high, held, floor = range_of(search, first, bound, peak, vocab)
    each = tl.cdiv(tiles, slices)
    begin = part * each
    end = tl.minimum(begin + each, tiles)
    if kind == KEEP:
        masses = work.masses + row.to(tl.int64) * tiles
        store_masses(masses, keys, low, log_min_p, peak, beta, begin, end, vocab, variant)
    elif kind >= GATHER:
        candidates = work.candidates + row.to(tl.int64) * tl.minimum(vocab, CANDIDATES)
        gather(search, candidates, keys, low, high, begin, end, vocab, variant)
    else:
        pivot = tl.where(begins_search(held, vocab), floor, pivots_of(low, high))
        if kind == COUNT:
            counts, weights = weights_from(
                keys, pivot, peak, beta, begin, end, vocab, False, variant
            )
            store_weights(search, part, counts, weights)
        else:
            counts, weights = weights_from(
                keys, pivot, peak, beta, begin, end, vocab, True, variant
            )
            store_weights(search, part, counts, weights)


@triton.jit
def search_row(
    work, row, keys, bound, k, use_k, p, use_p, log_min_p, peak, beta, vocab, tiles, slices,
    variant: tl.constexpr,
):  # fmt: skip
    """Do slices of the row's rounds until none is left. No key below `bound` is kept.

    Returns whether this program is to draw, whether the search went well, and the least order that
    is kept. If it did not go well, each program that has waited in vain, for seconds, makes the row
    invalid; one that went on so late may still draw it.
    """
    search = search_of(work, row)
    candidates = work.candidates + row.to(tl.int64) * tl.minimum(vocab, CANDIDATES)
    first_kind = tl.where(use_k, COUNT, tl.where(use_p, MASS, KEEP))
    draws = tl.full([], False, tl.int1)
    well = tl.full([], True, tl.int1)
    going = tl.full([], True, tl.int1)
    while going:
        ticket = tl.atomic_add(search + TICKETS, tl.full([], 1, tl.int64), sem="acq_rel")
        done = ticket // slices
        first = done == 0
        well = wait_for(search + DONE, done)
        kind = field_of(search, KIND, first, first_kind)
        going = well & (kind != ENDED)
        draws = draws | (well == 0)
        if going:
            part = (ticket % slices).to(tl.int32)
            sweep_slice(
                work, row, search, keys, first, kind, bound, log_min_p, peak, beta, vocab, tiles,
                part, slices, variant,
            )  # fmt: skip
            tl.debug_barrier()
            arrived = tl.atomic_add(search + ARRIVALS, tl.full([], 1, tl.int64), sem="acq_rel")
            if arrived % slices == slices - 1:
                tl.debug_barrier()
                step(search, candidates, first, kind, bound, k, p, use_p, peak, beta, vocab, slices)
                draws = kind == KEEP
                following = tl.where(draws, MORE_THAN_TICKETS, done + 1)
                tl.debug_barrier()
                tl.atomic_xchg(search + DONE, following, sem="release")
    tl.debug_barrier()
    return draws, well, tl.load(search + LOW, cache_modifier=".cg").to(tl.int32)
