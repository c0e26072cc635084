"""How the programs of a launch hand work to each other, by counters in the workspace: tickets,
arrivals and flags.

The counters are zero before and after a launch. If they are not, because the workspace was never
zeroed, or a launch on it was stopped or overlapped another, no program waits for ever: the launch
is *broken*. All its rows are invalid, and so are those of later launches until
`mod_fused.reset_workspace`. A launch of one phase counts arrivals alone: it sees a workspace that
was not zeroed, but not every launch that was stopped or overlapped. The search of a flat row has
counters of its own, which the launch before it zeroes (flat_rows.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from .constants import TILE

#: A bit of the tickets of a broken launch: more than a launch has tasks.
BROKEN = tl.constexpr(1 << 30)
LOW = tl.constexpr(0xFFFFFFFF)  # the lower half of a counter that holds two numbers
#: How often a program looks whether a phase has ended: for seconds, much longer than one takes. In
#: the interpreter a look takes as long as a thousand on a GPU.
MOST_LOOKS = tl.constexpr(1 << 12 if knobs.runtime.interpret else 1 << 23)


@triton.jit
def claim(work, done: tl.constexpr):
    """The next ticket, and how many tasks other programs have reported as done. `done`: how many
    this program has done since it last claimed one."""
    seen = tl.atomic_add(work.tickets, tl.full([], 1 + (done << 32), tl.int64), sem="acq_rel")
    return seen & LOW, (seen >> 32).to(tl.int32)


@triton.jit
def break_launch(work):
    """Leave no tickets, of this launch and of later ones."""
    tl.atomic_or(work.tickets, tl.full([], BROKEN, tl.int64), sem="relaxed")


@triton.jit
def wait_for(flag, value):
    """Wait until the row's earlier phase has ended; return whether it has."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    looks = 0
    while (seen < value) & (looks < MOST_LOOKS):
        seen = tl.atomic_add(flag, 0, sem="acquire")
        looks += 1
    tl.debug_barrier()
    return seen >= value


@triton.jit
def arrivals_of(chunks):
    """What the arrivals of a row hold when all chunks of a phase are done: how many, and in the
    upper half the sum of their numbers, counted from 1."""
    count = chunks.to(tl.int64)
    return count + ((count * (count + 1) // 2) << 32)


@triton.jit
def arrive(arrivals, chunk, chunks):
    """Count a chunk of a phase as done. Returns how many were before, and whether just the others
    were, if it is the last."""
    own = 1 + ((chunk + 1).to(tl.int64) << 32)
    seen = tl.atomic_add(arrivals, own, sem="acq_rel")
    return (seen & LOW).to(tl.int32), seen + own == arrivals_of(chunks)


@triton.jit
def end_arrivals(arrivals, chunks):
    """Leave the arrivals to the next phase. A subtraction: what does not belong here stays, and is
    seen later."""
    tl.atomic_add(arrivals, -arrivals_of(chunks), sem="relaxed")


@triton.jit
def reset(work, rows):
    """Zero the counters, which no other program uses any more; the arrivals are zero already."""
    tl.atomic_xchg(work.tickets, tl.zeros([], tl.int64), sem="relaxed")
    for begin in range(0, rows, TILE):
        i = begin + tl.arange(0, TILE)
        tl.store(work.flags + i, 0, mask=i < rows)
