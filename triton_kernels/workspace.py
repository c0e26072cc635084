"""The memory that the phases of a launch share: views of one buffer, which the launch allocates or
the caller gives.

A buffer begins with the counters, which are zero before and after every launch. The rest is written
before it is read, or what is read is not used. It begins at a byte that depends on the buffer's
size alone. So launches of different shapes may use a buffer one after another: none writes where
another has counters.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import TILE

ALIGNMENT = 256  # bytes: each part begins at a multiple
#: One byte in so many of a buffer is for counters: a row has 12 bytes of those, over 384 others.
COUNTER_SHARE = 32

# Fields of a row's state, float64.
LOG_NORM = tl.constexpr(0)  # [9], log-sum-exp of each model's logits
PEAK = tl.constexpr(9)  # [9]
SHIFT = tl.constexpr(18)  # [9], d = difference of the logits less their levels, plus this
LEAST = tl.constexpr(27)  # min Q over the support
BEST_TOKEN = tl.constexpr(28)  # s* = argmin Q, and pi_ref of it
BEST_MASS = tl.constexpr(29)
POINT = tl.constexpr(30)  # the next point to evaluate G at: t = shift(tau), or tau
LOWER = tl.constexpr(31)  # the bracket of the solution, in the same variable
UPPER = tl.constexpr(32)
SOLVED = tl.constexpr(33)
LEVEL = tl.constexpr(34)  # log pi* = (key - level) - log_norm
MIX_LOG_NORM = tl.constexpr(35)
VALID = tl.constexpr(36)
STEPS = tl.constexpr(37)  # evaluations of G so far, without the first
LOG_SUM = tl.constexpr(38)  # [9], LOG_NORM less the model's level
LOG_MASS = tl.constexpr(47)  # log m of the response so far, see own_mass.py
EVALUATED = tl.constexpr(48)  # the point of the last evaluation with a Stieltjes form, or moments'
STATE_FIELDS = tl.constexpr(49)

# Numbers of a part of a tile, float32: a record for each part of a row. It begins with two numbers
# for each model: the part's largest logit, and the sum of exp(logit - largest).
KEY_PEAK = tl.constexpr(0)
KEY_SUM = tl.constexpr(1)  # sum exp(key - peak); NaN where a tensor that counts is broken
DRAW_PEAK = tl.constexpr(2)  # the same two after mask and temperature
DRAW_SUM = tl.constexpr(3)
MASS = tl.constexpr(4)  # sum p; NaN where a value is broken. Later S1 of moments.py
FIRST = tl.constexpr(5)  # sum p Q. Later S2 of moments.py
BEST_P = tl.constexpr(6)  # p of the part's argmin Q
LEAST_Q = tl.constexpr(7)  # Q of it, float64 as two numbers
LEAST_REST = tl.constexpr(8)
WINNER = tl.constexpr(9)  # the token, the bits of an int32
S1 = tl.constexpr(10)  # sum p H, and S2 sum p (-H'); see `weighted_ratios`
S2 = tl.constexpr(11)
S3 = tl.constexpr(12)  # further moments of the first evaluation, see moments.py
S4 = tl.constexpr(13)
BIAS_PEAK = tl.constexpr(14)  # the largest bias of the tokens that are left, +inf if it is broken
PART_FIELDS = tl.constexpr(15)

#: Most keys that the filters hold in registers, to find the least that they keep.
CANDIDATES = tl.constexpr(4096)
PIVOTS = tl.constexpr(4)  # of a pass of a search, see thresholds.py
#: Most slices of a row that programs search together (flat_rows.py), and the fields of a search.
SLICES, SEARCH_FIELDS = tl.constexpr(32), tl.constexpr(12)
#: Numbers of a row's search: its fields, and two for each slice and pivot.
SEARCH_SIZE = tl.constexpr(SEARCH_FIELDS.value + 2 * SLICES.value * PIVOTS.value)
#: A cell is so many tokens of a tile, or more where a row would have more than MOST_CELLS.
SMALLEST_CELL, MOST_CELLS = 8, 16384


class Workspace(NamedTuple):
    """The parts, each flat."""

    states: Tensor  # float64 [B, STATE_FIELDS]
    fields: Tensor  # float32 [B, row_tiles(V) parts, 2 models + PART_FIELDS]
    keys: Tensor | None  # float32 [B, V]; without keys the next four are None too
    maxima: Tensor | None  # float32 [B, tiles, TILE / cell], the largest key of each cell
    candidates: Tensor | None  # int32 [B, min(V, CANDIDATES)]
    masses: Tensor | None  # int64 [B, tiles], what the filters keep, in fixed point
    searches: Tensor | None  # int64 [B, SEARCH_SIZE]
    tickets: Tensor  # int64 [1], the counters: see handoffs.py
    flags: Tensor  # int32 [B], how many phases of a row have ended
    arrivals: Tensor  # int64 [B], which chunks of the running phase are done


#: The most parts of a tile, see `parts_of_tile`.
MOST_PARTS = 8


def parts_of_tile(logit_bytes: int) -> int:
    """How many parts a tile has (parts.py)."""
    return TILE.value * min(logit_bytes, 4) // (32 * 16)


def record_size(models: int) -> int:
    """How many numbers a part's record has. It is odd: the compiler would give a thread two numbers
    of an even one to store, and pass them to other warps."""
    return 2 * models + PART_FIELDS.value


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes a microsecond."""
    return -(-a // b)


@cache
def row_tiles(vocab: int) -> int:
    """The number of a row's tiles, rounded up to a power of two."""
    return triton.next_power_of_2(cdiv(vocab, TILE.value))


@cache
def cell_size(vocab: int) -> int:
    """Tokens of a cell, a power of two."""
    return min(TILE.value, max(SMALLEST_CELL, row_tiles(vocab) * TILE.value // MOST_CELLS))


class _Layout(NamedTuple):
    """The parts of a buffer, one after the other."""

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]  # bytes of each part and of the gap behind it
    size: int  # bytes

    @classmethod
    def of(cls, *parts: tuple[torch.dtype, int]) -> _Layout:
        """The layout of parts, given as (dtype, number of elements)."""
        sizes: list[int] = []
        for dtype, count in parts:
            used = count * dtype.itemsize
            sizes += used, -used % ALIGNMENT
        return cls(tuple(dtype for dtype, _ in parts), tuple(sizes), sum(sizes))

    def views(self, buffer: Tensor, begin: int) -> list[Tensor]:
        """The parts in a buffer, from byte `begin` on."""
        rest = buffer.numel() - begin - self.size
        _, *pieces = buffer.split_with_sizes((begin, *self.sizes, rest))
        return [x.view(dtype) for x, dtype in zip(pieces[::2], self.dtypes, strict=False)]


@cache
def _counters(rows: int) -> _Layout:
    """tickets, flags, arrivals."""
    return _Layout.of((torch.int64, 1), (torch.int32, rows), (torch.int64, rows))


@cache
def _data(rows: int, vocab: int, models: int, keys: bool) -> _Layout:
    """states, fields; with `keys`, keys, maxima, candidates, masses, searches."""
    tiles = cdiv(vocab, TILE.value)
    numbers = row_tiles(vocab) * MOST_PARTS * record_size(models)
    return _Layout.of(
        (torch.float64, rows * STATE_FIELDS.value),
        (torch.float32, rows * numbers),
        *[
            (torch.float32, rows * vocab),
            (torch.float32, rows * tiles * (TILE.value // SMALLEST_CELL)),
            (torch.int32, rows * min(vocab, CANDIDATES.value)),
            (torch.int64, rows * tiles),
            (torch.int64, rows * SEARCH_SIZE.value),
        ]
        * keys,
    )


@cache
def workspace_bytes(rows: int, vocab: int, models: int, keys: bool) -> int:
    """Size of the buffer for launches of up to `rows` rows, `vocab` ids and `models` tensors of
    logits; `keys`: with room for the keys and what else the filters need."""
    # A unit is ALIGNMENT bytes of counters and COUNTER_SHARE - 1 times as many of data.
    data = cdiv(_data(rows, vocab, models, keys).size, (COUNTER_SHARE - 1) * ALIGNMENT)
    units = max(data, _counters(rows).size // ALIGNMENT)
    return units * COUNTER_SHARE * ALIGNMENT


def counter_bytes(buffer: Tensor) -> int:
    """How many bytes at the beginning of a buffer are for counters."""
    return buffer.numel() // (COUNTER_SHARE * ALIGNMENT) * ALIGNMENT


def make_workspace(
    like: Tensor, rows: int, vocab: int, models: int, keys: bool, buffer: Tensor | None
) -> Workspace:
    """A launch's workspace in `buffer`, a uint8 vector of at least `workspace_bytes` whose counters
    are zero, or in a new one on the device of `like`."""
    counters, data = _counters(rows), _data(rows, vocab, models, keys)
    if buffer is None:
        buffer = like.new_empty((workspace_bytes(rows, vocab, models, keys),), dtype=torch.uint8)
        buffer[: counters.size].zero_()
    begin = counter_bytes(buffer)
    states, fields, *rest = data.views(buffer, begin)
    tickets, flags, arrivals = counters.views(buffer, 0)
    rest = rest[:5] if keys else [None] * 5
    return Workspace(states, fields, *rest, tickets, flags, arrivals)
