"""The launch between the mixture and the filters, where there is a bias: adds it to the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .keys import store_draw_sums, store_maxima
from .parts import part_field, places, row_fields
from .tiles import load_tile
from .workspace import BIAS_PEAK, LEVEL, STATE_FIELDS


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
    tiles = tl.cdiv(mixing.vocab, TILE)
    chunks = tl.cdiv(tiles, variant.chunk)
    row = tl.program_id(0) // chunks
    begin = tl.program_id(0) % chunks * variant.chunk
    fields = row_fields(work, row, variant) + 2 * variant.models
    keys = work.keys + row.to(tl.int64) * mixing.vocab
    biases = drawing.bias + row.to(tl.int64) * drawing.bias_stride
    level = tl.load(work.states + row.to(tl.int64) * STATE_FIELDS + LEVEL).to(tl.float32)
    highest = tl.max(part_field(fields, BIAS_PEAK, tiles, variant, float("-inf")), 0)
    readable = tl.abs(highest) < INFINITY
    for tile in range(begin, tl.minimum(begin + variant.chunk, tiles)):
        key = load_tile(keys, tile, mixing.vocab, float("-inf"), variant)
        bias = load_tile(biases, tile, mixing.vocab, 0.0, variant)
        # Both are measured from their largest, so that neither rounds the other away.
        total = (key - level) + (bias - highest)
        key = tl.where(key > -INFINITY, total, -INFINITY)
        offsets = tile * TILE + places(variant)
        tl.store(keys + offsets, key, mask=offsets < mixing.vocab)
        store_maxima(work, key, row, tile, tiles, variant)
        store_draw_sums(drawing, fields, tl.where(readable, key, INFINITY), row, tile, variant)
