"""The vocabulary that a row sums, compares and picks over: all of it here, or a shard of it, with
the other shards in other processes.

A row of a process is laid out in whole tiles, [b, T, TILE]. Tiles begin at multiples of 1024 of the
ids of all shards, so that a border between two shards may cut a tile: both hold it, each with its
own columns in it. What crosses processes is a number for each row, or for each tile of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .philox import TILE


class Vocabulary:
    """V token ids, all in this process. There is nothing to combine."""

    start = 0  # id of the first column here
    first_tile = 0  # id of the first tile here
    waits = False  # whether the host may wait for the device

    def __init__(self, size: int) -> None:
        self.size = self.count = self.chunk_width = size  # V, columns here, most in any process

    def tiled(self, x: Tensor, fill: float) -> Tensor:
        """The columns of [b, >= count] as [b, T, TILE], `fill` around them."""
        before = self.start % TILE
        whole = max(before + self.count, 1)
        after = whole + -whole % TILE - before - self.count
        padded = torch.nn.functional.pad(x[:, : self.count], (before, after), value=fill)
        return padded.unflatten(1, (-1, TILE))

    def untiled(self, x: Tensor) -> Tensor:
        """The inverse of `tiled`: [b, T, TILE] -> [b, count]."""
        before = self.start % TILE
        return x.flatten(1)[:, before : before + self.count]

    def add(self, x: Tensor) -> Tensor:
        """The sum over the processes, of integers of any shape."""
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest over the processes, of numbers of any shape; NaN if one is NaN."""
        return x

    def least(self, x: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
        """The least x [b] over the processes, the first of equals, and the `of` [b] of the process
        that has it."""
        return (x, *of)

    def tile_sums(self, x: Tensor) -> Tensor:
        """Sums by tile, float [b, T here] -> [b, all T]."""
        return x

    def tile_log_sums(self, peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sums by tile: `sums` of exp(x - peak), float [n, b, T here] each -> [n, b, all T]. A
        peak that is not finite has its sum taken from 0."""
        return peaks, sums

    def pick(self, rows: Sequence[Tensor], token: Tensor) -> list[Tensor]:
        """Rows [b, T * TILE] at one id a row, [b]; `token` int64 [b]."""
        at = (token - self.first_tile * TILE).clamp(0, rows[0].shape[1] - 1)[:, None]
        return [x.gather(1, at).squeeze(1) for x in rows]


#: Of rows that are all here: what is combined does not ask how long they are.
WHOLE = Vocabulary(0)


class VocabularyShard(Vocabulary):
    """A shard of a vocabulary whose shards are in several processes, in the order of their ranks.

    Each method that combines is one collective. All processes compute its result from the same
    numbers in the same order.

    Args:
        size: V, the ids of all shards together.
        widths: columns of each rank's tensors. Ids from V on are padding.
        rank: this process.
        gather: [...] of this process -> [ranks, ...] of all, in the order of their ranks.
        device: where the rows are.
    """

    waits = True

    def __init__(
        self,
        size: int,
        widths: Sequence[int],
        rank: int,
        gather: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        starts = [sum(widths[:r]) for r in range(len(widths))]
        counts = [max(0, min(w, size - s)) for w, s in zip(widths, starts, strict=True)]
        self.size, self.count, self.start = size, counts[rank], starts[rank]
        self.first_tile, self.chunk_width = self.start // TILE, max(widths) + TILE
        self._starts, self.gather = starts, gather
        # Which entries of the gathered tiles belong to a tile of the vocabulary.
        spans = [
            range(s // TILE, (s + c - 1) // TILE + 1) if c else range(0)
            for s, c in zip(starts, counts, strict=True)
        ]
        self._widest = max(1, *map(len, spans))
        owners: list[list[int]] = [[] for _ in range(-(-size // TILE))]
        for r, span in enumerate(spans):
            for tile in span:
                owners[tile].append(r * self._widest + tile - span.start)
        self._places = [
            (
                torch.tensor([at[min(s, len(at) - 1)] for at in owners], device=device),
                torch.tensor([s < len(at) for at in owners], device=device),
            )
            for s in range(max(map(len, owners)))
        ]

    def add(self, x: Tensor) -> Tensor:
        return self.gather(x).sum(0)

    def largest(self, x: Tensor) -> Tensor:
        return self.gather(x).amax(0)

    def least(self, x: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
        every = self._gathered(x, *of)
        return self._of_rank(every, every[..., 0].argmin(0), x, *of)

    def tile_sums(self, x: Tensor) -> Tensor:
        (total, _), *others = self._by_tile(x)
        for part, here in others:
            total = total + torch.where(here, part, 0.0)
        return total

    def tile_log_sums(self, peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._by_tile(torch.stack([peaks, sums]))
        (peak, total), _ = parts[0]
        if len(parts) == 1:
            return peak, total
        for (other, _), here in parts[1:]:
            peak = torch.maximum(peak, torch.where(here, other, -torch.inf))
        level = torch.where(peak.isfinite(), peak, 0.0)
        total = torch.zeros_like(total)
        for (other, part), here in parts:
            total = total + torch.where(here, part * torch.exp(other - level), 0.0)
        return peak, total

    def pick(self, rows: Sequence[Tensor], token: Tensor) -> list[Tensor]:
        own = super().pick(rows, token)
        owner = torch.zeros_like(token)
        for start in self._starts[1:]:
            owner = owner + (token >= start)
        return list(self._of_rank(self._gathered(*own), owner, *own))

    def _by_tile(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """x [..., T here] of all ranks, by tile: the first, second, ... rank's [..., all T] that
        has columns of a tile, and which tiles have so many, bool [all T]."""
        missing = self._widest - x.shape[-1]
        padded = torch.nn.functional.pad(x, (0, missing))
        every = self.gather(padded).movedim(0, -2).flatten(-2)
        return [(every.index_select(-1, at), here) for at, here in self._places]

    def _gathered(self, *fields: Tensor) -> Tensor:
        """Fields [b], float32, float64 or ids, as float64 [ranks, b, fields]: they fit."""
        return self.gather(torch.stack([x.double() for x in fields], -1))

    @staticmethod
    def _of_rank(every: Tensor, rank: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        """Each row's fields of one rank [b]."""
        at = rank[None, :, None].expand(1, -1, every.shape[2])
        chosen = every.gather(0, at)[0].unbind(-1)
        return tuple(x.to(y.dtype) for x, y in zip(chosen, like, strict=True))
