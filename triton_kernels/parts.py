"""Numbers of the parts of a tile: their sums, and their records in the workspace.

A *part* of a tile, 256 tokens of 16-bit logits or 128 of float32, is what a warp of 32 threads
reads by loads of 16 bytes. With at most 128 threads a program's sums of a part need no other warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .elementary import exp


@triton.jit
def places(variant: tl.constexpr):
    """The places of a tile's tokens in it, int32 [parts, tokens of a part]."""
    PART: tl.constexpr = TILE // variant.parts
    return tl.arange(0, variant.parts)[:, None] * PART + tl.arange(0, PART)[None, :]


@triton.jit
def part_sums(x):
    """The sums [n] of parts [n, 2^k]: pairs of neighbours, then pairs of these. The order does not
    depend on how many threads there are, so that no bit of a result does."""
    PARTS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    if SIZE == 1:
        return tl.reshape(x, [PARTS])
    else:
        return part_sums(tl.sum(tl.reshape(x, [PARTS, SIZE // 2, 2]), 2))


@triton.jit
def two_sums(a, b):
    """The sums of two vectors by one reduction: its steps wait for all warps."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def four_sums(a, b, c, d):
    """The sums of four vectors by one reduction."""
    left, right = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0))
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    return first, second, third, fourth


@triton.jit
def row_fields(work, row, variant: tl.constexpr):
    """A row's records."""
    return work.fields + row.to(tl.int64) * (variant.tiles * variant.parts * variant.record)


@triton.jit
def store_parts(fields, first: tl.constexpr, tile, numbers, variant: tl.constexpr):
    """Store numbers of a tile's parts, a tuple of [parts] of 32 bits, in the fields from `first`
    on. Each lane of a warp stores one of them: so its own part's need not go to other warps."""
    COUNT: tl.constexpr = len(numbers)
    lane = tl.arange(0, 32)[None, :]
    part = tile * variant.parts + tl.arange(0, variant.parts)[:, None]
    x = numbers[0].to(tl.int32, bitcast=True)[:, None]
    for k in tl.static_range(1, COUNT):
        x = tl.where(lane == k, numbers[k].to(tl.int32, bitcast=True)[:, None], x)
    bits = (
        fields.to(tl.pointer_type(tl.int32), bitcast=True) + part * variant.record + (first + lane)
    )
    tl.store(bits, x, mask=lane < COUNT)


@triton.jit
def part_field(fields, field, tiles, variant: tl.constexpr, OTHER: tl.constexpr):
    """A number per part of a row."""
    i = tl.arange(0, variant.tiles * variant.parts)
    own = fields + i * variant.record + field
    return tl.load(own, mask=i < tiles * variant.parts, other=OTHER, cache_modifier=".cg")


@triton.jit
def by_tile(x, variant: tl.constexpr):
    """A number per part of a row as [tiles, parts]."""
    return tl.reshape(x, [variant.tiles, variant.parts])


@triton.jit
def log_sum_exp(fields, field, tiles, variant: tl.constexpr):
    """The max and log-sum-exp of a row, from its parts' (max, sum exp(. - max)) in the fields
    `field` and `field + 1`; NaN if a sum is NaN."""
    peaks = part_field(fields, field, tiles, variant, float("-inf"))
    sums = part_field(fields, field + 1, tiles, variant, 0.0)
    peak = tl.max(peaks, 0)
    scaled = exp(peaks - tl.where(peak == -INFINITY, 0.0, peak))
    parts = tl.where(peaks == -INFINITY, 0.0, scaled).to(tl.float64) * sums.to(tl.float64)
    return peak.to(tl.float64), tl.log(tl.sum(parts, 0)) + peak
