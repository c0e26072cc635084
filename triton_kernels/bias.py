"""The launch between the mixture and the filters, where there is a bias: adds it to the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .elementary import exp
from .keys import store_maxima
from .parameters import inverse_temperature, temperature_of
from .tiles import load_tile
from .workspace import (
    BIAS_PEAK,
    DRAW_PEAK,
    DRAW_SUM,
    LEVEL,
    STATE_FIELDS,
    TILE_FIELDS,
    tile_field,
)


@triton.jit
def bias_kernel(
    mixing,
    drawing,
    work,
    # Meta-parameters
    variant: tl.constexpr,
):
    """Add the bias, up to a constant of the row, to the masked keys of some tiles. The peak of the
    tiles is +inf, which makes the row invalid, where the bias holds NaN or +inf or leaves no
    token."""
    FIELDS: tl.constexpr = TILE_FIELDS + 2 * variant.models
    tiles = tl.cdiv(mixing.vocab, TILE)
    chunks = tl.cdiv(tiles, variant.chunk)
    row = tl.program_id(0) // chunks
    begin = tl.program_id(0) % chunks * variant.chunk
    fields = work.fields + (row.to(tl.int64) * FIELDS + 2 * variant.models) * variant.tiles
    keys = work.keys + row.to(tl.int64) * mixing.vocab
    biases = drawing.bias + row.to(tl.int64) * drawing.bias_stride
    beta = inverse_temperature(temperature_of(drawing, row))
    level = tl.load(work.states + row.to(tl.int64) * STATE_FIELDS + LEVEL).to(tl.float32)
    highest = tl.max(tile_field(fields, BIAS_PEAK, tiles, variant, float("-inf")), 0)
    readable = tl.abs(highest) < INFINITY
    for tile in range(begin, tl.minimum(begin + variant.chunk, tiles)):
        key = load_tile(keys, tile, mixing.vocab, float("-inf"))
        bias = load_tile(biases, tile, mixing.vocab, 0.0)
        # Both are measured from their largest, so that neither rounds the other away.
        total = (key - level) + (bias - highest)
        key = tl.where(key > -INFINITY, total, -INFINITY)
        key = tl.where(readable, key, -INFINITY)
        offsets = tile * TILE + tl.arange(0, TILE)
        tl.store(keys + offsets, key, mask=offsets < mixing.vocab)
        store_maxima(work, key, row, tile, tiles, variant)
        peak = tl.max(key, 0)
        below = key - tl.where(peak == -INFINITY, 0.0, peak)
        tl.store(fields + DRAW_PEAK * variant.tiles + tile, tl.where(readable, peak, INFINITY))
        tl.store(fields + DRAW_SUM * variant.tiles + tile, tl.sum(exp(below * beta), 0))
