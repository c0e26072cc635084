"""From the costs of a kernel's parts to the time of a call on an H200. `predict.py` says what is
assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .predict_walk import L2, LATENCY, Cost, Phase

#: An H200 (SXM) at its highest clock, and the bandwidth of a copy on it.
PROCESSORS, GHZ, BYTES_PER_SECOND = 132, 1.98, 4.3e12
SCHEDULERS, REGISTERS, SHARED, WARPS, PROGRAMS = 4, 65536, 233472, 64, 32  # of a multiprocessor
HBM_BYTES = BYTES_PER_SECOND / (PROCESSORS * GHZ * 1e9)  # of a multiprocessor in a cycle

#: Claiming a task: a ticket, and a look at the row's flag.
CLAIM = 2 * (LATENCY["ATOMG"] + LATENCY["BAR"])
#: From the end of a phase until another program goes on: the flag is released, and half a look on
#: average passes before the look that sees it.
HANDOFF = LATENCY["MEMBAR"] + 1.5 * LATENCY["ATOMG"] + LATENCY["BAR"]
#: A task of an evaluation that is not needed: claimed, and the row's state read.
SKIPPED = CLAIM + L2
LAUNCH = 1.0 * GHZ * 1e3  # cycles between a kernel and the next


class Kernel(NamedTuple):
    """A compiled launch of `mixture_kernel`."""

    threads: int
    chunk: int  # tiles of a task
    programs: int  # that a multiprocessor holds
    phases: Sequence[Phase]  # those that run, in their order
    skipped: int  # further phases, evaluations that a solved row leaves out
    idle: Cost | None  # of a program without a task; None: programs do not claim tasks


class Selection(NamedTuple):
    """A compiled launch in which each program does a row, or a slice of one."""

    threads: int
    programs: int
    row: Cost


class Prediction(NamedTuple):
    """Times of a call in microseconds, and what bounds most of it."""

    us: float
    hbm_us: float
    issue_us: float
    bound: str  # latency, issue, HBM, chain (a single row) or filters


def resident(threads: int, registers: int, shared: int) -> int:
    """How many programs a multiprocessor holds, by registers, shared memory and warps."""
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return max(1, min(by_registers, SHARED // (shared + 1024), WARPS // warps, PROGRAMS))


def microseconds(cycles: float) -> float:
    """At the highest clock."""
    return cycles / (GHZ * 1e3)


def _chain(kernel: Kernel, tiles: int) -> float:
    """Cycles of one row, or of several that run side by side: its phases one after the other."""
    further = min(kernel.chunk, tiles) - 1
    cycles = sum(x.task.cycles + further * x.tile.cycles + x.end.cycles for x in kernel.phases)
    if kernel.idle is not None:
        handoffs = len(kernel.phases) + kernel.skipped - 1
        cycles += handoffs * HANDOFF + kernel.skipped * SKIPPED
        cycles += kernel.idle.cycles + LATENCY["ATOMG"]  # the ticket that fails
    return cycles


def _full(kernel: Kernel, rows: int, tiles: int, hbm: float) -> dict[str, float]:
    """Cycles of all rows on a GPU that is full, by what bounds them. `hbm` is the time to read the
    logits, for the first phase; later ones find them in the L2 cache."""
    tasks = rows * -(-tiles // kernel.chunk) / PROCESSORS  # of a phase, for a multiprocessor
    further = rows * tiles / PROCESSORS - tasks
    claim = CLAIM if kernel.idle is not None else 0.0
    warps = kernel.threads / 32 / SCHEDULERS
    found = {"latency": 0.0, "issue": 0.0, "HBM": 0.0}
    for n, phase in enumerate(kernel.phases):
        waits = (phase.task.cycles + claim) * tasks + phase.tile.cycles * further
        issued = phase.task.instructions * tasks + phase.tile.instructions * further
        bounds = {
            "latency": waits / kernel.programs,
            "issue": issued * warps,
            "HBM": 0.0 if n else hbm,
        }
        most = max(bounds, key=bounds.__getitem__)
        found[most] += bounds[most]
        found["latency"] += phase.end.cycles * rows / PROCESSORS / kernel.programs
    found["latency"] += kernel.skipped * SKIPPED * tasks / kernel.programs
    return found


def _selected(selection: Selection, rows: int) -> float:
    """Cycles of a launch whose programs each do a row, or a slice of one."""
    together = min(selection.programs, -(-rows // PROCESSORS))  # on one multiprocessor
    issued = selection.row.instructions * selection.threads / 32 / SCHEDULERS * together
    rounds = -(-rows // (PROCESSORS * together))
    return LAUNCH + rounds * max(selection.row.cycles, issued)


def predicted(
    kernel: Kernel, selections: Sequence[Selection], rows: int, vocab: int, row_bytes: int
) -> Prediction:
    """The time of a call with `rows` rows of `vocab` ids and `row_bytes` bytes of logits each."""
    tiles = -(-vocab // 1024)
    hbm = rows * row_bytes / (PROCESSORS * HBM_BYTES)
    bounds = _full(kernel, rows, tiles, hbm)
    chain, full = _chain(kernel, tiles), sum(bounds.values())
    cycles = max(chain, full + 0.5 * chain)
    bound = "chain" if chain > full else max(bounds, key=bounds.__getitem__)
    filters = sum(_selected(x, rows) for x in selections)
    if filters > cycles:
        bound = "filters"
    cycles += filters
    issued = sum(x.tile.instructions for x in kernel.phases) * tiles * kernel.threads
    issued += sum(x.row.instructions * x.threads for x in selections)
    issue = rows * issued / 32 / SCHEDULERS / PROCESSORS
    return Prediction(*map(microseconds, (cycles, hbm, issue)), bound)
