"""Memory between the phases of a launch: views of one buffer, the launch's own or the caller's.

A buffer begins with the counters, which are zero before and after every launch; the rest is written
before it is read. Where the rest begins depends on the buffer's size alone, so that launches of
different shapes may share a buffer one after another: none writes where another counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .solver import TILE_FIELDS
from .tiles import STATE_FIELDS, TILE

ALIGNMENT = 256  # bytes, of each part
#: One part in so many of a buffer is for counters: 8 bytes a row, which has more than 256 others.
COUNTER_SHARE = 32


class Workspace(NamedTuple):
    """The parts, each flat."""

    states: Tensor  # float64 [B, STATE_FIELDS]
    fields: Tensor  # float32 [B, 2 models + TILE_FIELDS, row_tiles(V)]
    leasts: Tensor  # float64 [B, tiles]
    winners: Tensor  # int32 [B, tiles]
    keys: Tensor | None  # float32 [B, V]
    tickets: Tensor  # int32 [2]
    flags: Tensor  # int32 [B], phases a row has ended
    arrivals: Tensor  # int32 [B], chunks of the running phase that are done


def row_tiles(vocab: int) -> int:
    """A power of two, at least the row's tiles."""
    return triton.next_power_of_2(triton.cdiv(vocab, TILE.value))


class _Layout(NamedTuple):
    """Name to dtype, first byte and elements."""

    parts: Mapping[str, tuple[torch.dtype, int, int]]
    size: int  # bytes

    @classmethod
    def of(cls, counts: Mapping[str, tuple[torch.dtype, int]]) -> _Layout:
        """One part after the other."""
        parts, end = {}, 0
        for name, (dtype, count) in counts.items():
            parts[name] = dtype, end, count
            end += triton.cdiv(count * dtype.itemsize, ALIGNMENT) * ALIGNMENT
        return cls(parts, end)


@cache
def _counters(rows: int) -> _Layout:
    return _Layout.of(
        {
            "tickets": (torch.int32, 2),
            "flags": (torch.int32, rows),
            "arrivals": (torch.int32, rows),
        }
    )


@cache
def _data(rows: int, vocab: int, models: int, keys: bool) -> _Layout:
    tiles = triton.cdiv(vocab, TILE.value)
    fields = 2 * models + TILE_FIELDS.value
    return _Layout.of(
        {
            "states": (torch.float64, rows * STATE_FIELDS.value),
            "fields": (torch.float32, rows * fields * row_tiles(vocab)),
            "leasts": (torch.float64, rows * tiles),
            "winners": (torch.int32, rows * tiles),
        }
        | ({"keys": (torch.float32, rows * vocab)} if keys else {})
    )


def workspace_bytes(rows: int, vocab: int, models: int, keys: bool) -> int:
    """Size of the buffer for launches of up to `rows` rows, `vocab` ids and `models` tensors of
    logits; `keys`: with room for a key per token, as the filters need."""
    # Both parts of so many units: ALIGNMENT bytes of counters each, and the others of the share.
    data = triton.cdiv(_data(rows, vocab, models, keys).size, (COUNTER_SHARE - 1) * ALIGNMENT)
    units = max(data, _counters(rows).size // ALIGNMENT)
    return units * COUNTER_SHARE * ALIGNMENT


def make_workspace(
    like: Tensor, rows: int, vocab: int, models: int, keys: bool, buffer: Tensor | None
) -> Workspace:
    """A launch's workspace in `buffer`, a uint8 vector of at least `workspace_bytes` whose counters
    are zero, or in a new one on the device of `like`."""
    counters, data = _counters(rows), _data(rows, vocab, models, keys)
    if buffer is None:
        buffer = like.new_empty((workspace_bytes(rows, vocab, models, keys),), dtype=torch.uint8)
        buffer[: counters.size].zero_()
    units = buffer.numel() // (COUNTER_SHARE * ALIGNMENT)
    buffer = buffer[: units * COUNTER_SHARE * ALIGNMENT]
    typed = {dtype: buffer.view(dtype) for dtype in (torch.int32, torch.float32, torch.float64)}
    views: dict[str, Tensor | None] = {"keys": None}
    for layout, begin in ((counters, 0), (data, units * ALIGNMENT)):
        for name, (dtype, offset, count) in layout.parts.items():
            views[name] = typed[dtype].narrow(0, (begin + offset) // dtype.itemsize, count)
    return Workspace(**views)  # type: ignore[arg-type]
