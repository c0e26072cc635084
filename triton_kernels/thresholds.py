"""The least key such that it and all larger ones weigh enough, of keys in registers; what programs
count and store that look for it among the keys of a row.

A key's *order* is the integer with its place among the floats. Between two orders, `low` and
`high`, lies the one that is looked for; *pivots* cut what is between into equal parts, and the
weights of the keys from each pivot on say which part to go on with. Sums of integers do not depend
on the order of the keys. *Lanes* are the keys of a row that a program reads at once; a sweep over
the row adds up in each lane, and sums the lanes in the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .elementary import exp
from .workspace import PIVOTS

FIXED_POINT = tl.constexpr(1099511627776.0)  # 2^40: masses are summed as integers of this unit
NARROWEST, NARROW = tl.constexpr(1e-6), tl.constexpr(1024.0)  # ranges of keys
STORED = tl.constexpr(2048)  # how many keys are stored at once, where some of them are
LEAST_ORDER = tl.constexpr(-2139095040)  # of the least finite key


@triton.jit
def ordered(x):
    """An int32 with the order of the floats; equal for -0 and +0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def fixed_mass(key, peak, beta):
    """exp(beta (key - peak)) in fixed point, int64."""
    return (exp((key - peak) * beta) * FIXED_POINT).to(tl.int64)


@triton.jit
def share_of(share, total):
    """What top-p needs of a fixed-point total."""
    return tl.ceil(share * total.to(tl.float64)).to(tl.int64)


@triton.jit
def pivots_of(low, high):
    """Orders between `low` and `high` that cut what is between into parts, int32 [PIVOTS]: equal
    parts of the keys' range or, where that is wide or next to nothing, of the orders, half of which
    are next to 0."""
    i = tl.arange(0, PIVOTS) + 1
    least = unordered(low)
    width = unordered(high) - least
    unit = (high.to(tl.int64) - low) // (PIVOTS + 1) + 1
    pivot = (low + i * unit).to(tl.int32)
    # Programs that compute the same pivots must round alike: a sum might be fused or not.
    even = ordered(tl.fma(width, i.to(tl.float32) * (1.0 / (PIVOTS + 1)), least))
    pivot = tl.where((width > NARROWEST) & (width < NARROW), even, pivot)
    return tl.minimum(tl.maximum(pivot, low + 1), high - 1)


@triton.jit
def narrowed(low, high, pivot, enough):
    """The part to go on with: the keys from `low` on weigh enough, those from `high` on do not."""
    return tl.max(tl.where(enough, pivot, low), 0), tl.min(tl.where(enough, high, pivot), 0)


@triton.jit
def least_order(order, weight, needed, low, high):
    """The largest order in [low, high) such that the keys [1, N] from it on weigh `needed`; one
    that is below all keys if there is none."""
    while low + 1 < high:
        pivot = pivots_of(low, high)
        total = tl.sum(tl.where(order >= pivot[:, None], weight, 0), 1)
        low, high = narrowed(low, high, pivot, total >= needed)
        # Go on from key to key: a few are left where there are many orders.
        inside = (order >= low) & (order < high)
        least = tl.min(tl.min(tl.where(inside, order, high - 1), 1), 0)
        high = tl.max(tl.max(tl.where(inside, order, low), 1), 0) + 1
        low = least
    return low


@triton.jit
def lane_keys(keys, begin, end, n, vocab, variant: tl.constexpr):
    """The keys of the lanes [1, LANES] in the n-th pass over the tiles from `begin` to before
    `end`: some columns of as many tiles as `swept` says; -inf beyond the last."""
    COLUMNS: tl.constexpr = variant.filter_block // variant.swept
    PASSES: tl.constexpr = TILE // COLUMNS
    lane = tl.arange(0, variant.filter_block)[None, :]
    n = n + tl.zeros([], tl.int32)
    tile = begin + n // PASSES * variant.swept + lane // COLUMNS
    offsets = tile * TILE + n % PASSES * COLUMNS + lane % COLUMNS
    there = (tile < end) & (offsets < vocab)
    return tl.load(keys + offsets, mask=there, other=-INFINITY, cache_modifier=".cg")


@triton.jit
def weights_from(
    keys, pivot, peak, beta, begin, end, vocab, MASS: tl.constexpr, variant: tl.constexpr
):
    """How many keys of the tiles from `begin` to before `end` there are from each pivot [P] on,
    int32 [P]; and what they weigh, int64 [P]: their number or, with MASS, their mass."""
    LANES: tl.constexpr = variant.filter_block
    PASSES: tl.constexpr = TILE // (variant.filter_block // variant.swept)
    count = tl.zeros([pivot.shape[0], LANES], tl.int32)
    mass = tl.zeros([pivot.shape[0], LANES], tl.int64)
    following = lane_keys(keys, begin, end, 0, vocab, variant)
    for n in range(tl.cdiv(end - begin, variant.swept) * PASSES):
        key = following
        following = lane_keys(keys, begin, end, n + 1, vocab, variant)
        reached = ordered(key) >= pivot[:, None]
        count += reached.to(tl.int32)
        if MASS:
            mass += tl.where(reached, fixed_mass(key, peak, beta), 0)
    count = tl.sum(count, 1)
    if MASS:
        return count, tl.sum(mass, 1)
    else:
        return count, count.to(tl.int64)


@triton.jit
def load_one_by_one(keys, begin, size, LANES: tl.constexpr):
    """LANES keys, each lane's in a load of its own: then stores need no other layout."""
    i = begin + tl.max_contiguous(tl.arange(0, LANES), 1)
    return i, tl.load(keys + i, mask=i < size, other=-INFINITY, cache_modifier=".cg")


@triton.jit
def store_inside(keys, candidates, at, begin, size, low, high, LANES: tl.constexpr):
    """Store the numbers of those of LANES keys that are in [low, high), lane by lane `at` an index;
    returns the following index of each lane."""
    i, key = load_one_by_one(keys, begin, size, LANES)
    order = ordered(key)
    inside = (order >= low) & (order < high)
    tl.store(candidates + at, i, mask=inside)
    return at + inside.to(tl.int32)
