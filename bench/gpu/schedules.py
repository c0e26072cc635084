"""Other ways to run the phases of a row, to be timed beside the shipped one on a GPU.

Each takes what a call launches (`launch.sample_launches`) and returns what to launch in its place,
with the same inputs and outputs. They are experiments: what wins on a GPU moves into the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from mod_fused.triton_kernels import launch
from mod_fused.triton_kernels.configurations import processors
from mod_fused.triton_kernels.launching import Launch
from mod_fused.triton_kernels.mixture import MAX_EVALUATIONS, run_task, wait_for
from mod_fused.triton_kernels.phases import (
    end_draw,
    end_evaluation,
    store_deficit_keys,
    store_deficits,
    store_evaluation,
    sums_of_tile,
)
from mod_fused.triton_kernels.solver import TILE_FIELDS, end_deficits, end_sums
from mod_fused.triton_kernels.tiles import SOLVED, STATE_FIELDS, TILE, deficit_tile

from . import moments

#: Programs that a multiprocessor holds at once: 128 threads with up to 168 registers each.
RESIDENT_PROGRAMS = 3

#: What to launch in place of a call's first launch; None where there is no such form of the call.
Schedule = Callable[[Launch], Sequence[Launch] | None]


class Inapplicable(Exception):
    """A schedule has no form of the call."""


# What changes from call to call is not specialised on: it would compile the kernel again.
@triton.jit(do_not_specialize=["seed", "position"])
def phase_kernel(m, r, w, seed: tl.int64, position: tl.int64, PHASE: tl.constexpr, C: tl.constexpr):
    """One phase of all rows, a program for each of their chunks; no program waits for another."""
    phase = tl.full([], PHASE, tl.int32)  # folded all the same
    tiles = tl.cdiv(m.vocab, TILE)
    chunks = tl.cdiv(tiles, C.chunk)
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    again = tl.full([], 0, tl.int32)
    again += run_task(m, r, w, row, chunk, phase, 0, tiles, chunks, seed, position, C)
    if PHASE == C.phases - 2 - C.finish:  # the last evaluation
        while again > 0:
            again = run_task(m, r, w, row, chunk, phase, again, tiles, chunks, seed, position, C)


@triton.jit
def last_to_arrive(w, row, tiles):
    tl.debug_barrier()
    return tl.atomic_add(w.arrivals + row, 1, sem="acq_rel") == tiles - 1


@triton.jit
def let_go(w, row, value):
    """The row's programs go on when its flag has this value."""
    tl.debug_barrier()
    tl.atomic_xchg(w.arrivals + row, 0, sem="relaxed")
    tl.atomic_xchg(w.flags + row, value, sem="release")


@triton.jit(do_not_specialize=["seed", "position"])
def resident_kernel(m, r, w, seed: tl.int64, position: tl.int64, C: tl.constexpr):
    """A program for each tile, which stays with it through all phases: the deficits are made once
    and stay in registers. All programs have to run at once. A row is evaluated until it is solved,
    by all of its programs."""
    MODEL_FIELDS: tl.constexpr = 2 * C.models
    FIELDS: tl.constexpr = TILE_FIELDS + 2 * C.models
    tiles = tl.cdiv(m.vocab, TILE)
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    state = w.states + row.to(tl.int64) * STATE_FIELDS
    model_fields = w.fields + row.to(tl.int64) * FIELDS * C.tiles
    fields = model_fields + MODEL_FIELDS * C.tiles
    sums_of_tile(m, model_fields, row, tile, C)
    if last_to_arrive(w, row, tiles):
        tl.debug_barrier()
        end_sums(m, state, model_fields, row, tiles, C)
        let_go(w, row, 1)
    wait_for(w.flags + row, 1)
    log_ref, q, broken = deficit_tile(m, state, row, tile, C)
    store_deficits(m, w, fields, log_ref, q, broken, row, tile, tiles, C)
    if last_to_arrive(w, row, tiles):
        tl.debug_barrier()
        end_deficits(m, w, state, fields, row, tiles, C)
        let_go(w, row, 2)
    wait_for(w.flags + row, 2)
    over = 2
    while (over < MAX_EVALUATIONS) & (tl.load(state + SOLVED, cache_modifier=".cg") == 0.0):
        store_evaluation(m, state, fields, log_ref, q, tile, C)
        over += 1
        if last_to_arrive(w, row, tiles):
            tl.debug_barrier()
            end_evaluation(m, state, fields, tiles, C)
            let_go(w, row, over)
        wait_for(w.flags + row, over)
    store_deficit_keys(m, r, w, state, fields, log_ref, q, broken, row, tile, C)
    if last_to_arrive(w, row, tiles):
        tl.debug_barrier()
        end_draw(m, r, state, model_fields, fields, row, tiles, seed, position, C)
        let_go(w, row, 0)


class Cooperative(Launch):
    """A launch that fails where its programs cannot all run at once."""

    def options(self, amd: bool, warp_size: int) -> dict[str, Any]:
        return super().options(amd, warp_size) | {"launch_cooperative_grid": True}


def registers(most: int) -> Schedule:
    """At most so many registers a thread, which decides how many programs run at once."""

    class Limited(Launch):
        def options(self, amd: bool, warp_size: int) -> dict[str, Any]:
            options = super().options(amd, warp_size)
            return options | {"maxnreg": most} if "maxnreg" in options else options

    def change(shipped: Launch) -> list[Launch] | None:
        limited = Limited(*shipped)
        same = limited.options(False, 32) == shipped.options(False, 32)
        return None if same else [limited]

    return change


def _chunks(shipped: Launch) -> int:
    """Tasks of a row in one phase."""
    tiles = triton.cdiv(shipped.arguments[0].vocab, TILE.value)
    return triton.cdiv(tiles, shipped.variant.chunk)


def launch_per_phase(shipped: Launch) -> list[Launch] | None:
    """A launch for each phase: the stream does the waiting."""
    variant = shipped.variant
    if variant.evaluations == 0:
        return None
    m, r, w, rows, _, seed, position = shipped.arguments
    grid = (rows * _chunks(shipped),)
    return [
        Launch(phase_kernel, grid, (m, r, w, seed, position, k), variant, shipped.threads)
        for k in range(variant.phases)
    ]


def resident(shipped: Launch) -> list[Launch] | None:
    """One launch whose programs keep the deficits of their tile in registers."""
    m, r, w, rows, _, seed, position = shipped.arguments
    variant = shipped.variant._replace(chunk=1)
    programs = rows * triton.cdiv(m.vocab, TILE.value)
    room = RESIDENT_PROGRAMS * processors(m.logits[0].device)
    if variant.evaluations == 0 or variant.finish or programs > room:
        return None
    arguments = (m, r, w, seed, position)
    return [Cooperative(resident_kernel, (programs,), arguments, variant, 128)]


def evaluations(count: int) -> Schedule:
    """`count` evaluations spread over the GPU; rows that need more finish on one program."""

    def change(shipped: Launch) -> list[Launch] | None:
        variant = shipped.variant
        if variant.evaluations in (0, count):
            return None
        phases = variant.phases - variant.evaluations + count
        return [shipped._replace(variant=variant._replace(evaluations=count, phases=phases))]

    return change


def rows_in_flight(factor: float) -> Schedule:
    """Larger or smaller groups of rows, whose phases are interleaved with those of the next."""

    def change(shipped: Launch) -> list[Launch] | None:
        m, r, w, rows, group, seed, position = shipped.arguments
        other = max(1, min(rows, int(factor * group)))
        if other == group or shipped.variant.phases == 1:
            return None
        return [shipped._replace(arguments=(m, r, w, rows, other, seed, position))]

    return change


def programs(factor: float) -> Schedule:
    """More or fewer programs for the same tasks."""

    def change(shipped: Launch) -> list[Launch] | None:
        tasks = shipped.arguments[3] * _chunks(shipped)
        grid = max(1, min(tasks, int(factor * shipped.grid[0])))
        if shipped.variant.phases == 1 or grid == shipped.grid[0]:
            return None
        return [shipped._replace(grid=(grid,))]

    return change


def chunk(tiles: int) -> Schedule:
    """Tasks of so many tiles."""

    def change(shipped: Launch) -> list[Launch] | None:
        if tiles == shipped.variant.chunk:
            return None
        other = shipped._replace(variant=shipped.variant._replace(chunk=tiles))
        tasks = shipped.arguments[3] * _chunks(other)
        # Alone, one program a task; else as many programs as were there, or as there are tasks.
        grid = tasks if shipped.variant.phases == 1 else min(tasks, shipped.grid[0])
        return [other._replace(grid=(grid,))]

    return change


def shipped(launched: Launch) -> list[Launch]:
    """As it is."""
    return [launched]


SCHEDULES: dict[str, Schedule] = {
    "shipped": shipped,
    "a launch per phase": launch_per_phase,
    "resident": resident,
    "moments, a launch per phase": moments.launches,
    **{f"{n} evaluations": evaluations(n) for n in (1, 2, 3, 5)},
    **{f"rows in flight x {f:g}": rows_in_flight(f) for f in (0.25, 0.5, 2, 4)},
    **{f"programs x {f:g}": programs(f) for f in (0.5, 2)},
    **{f"registers {n}": registers(n) for n in (128, 255)},
    **{f"chunk {n}": chunk(n) for n in (1, 2, 4, 8)},
}


@contextmanager
def using(name: str) -> Iterator[list[Launch]]:
    """Within it `mod_fused.sample` on Triton launches what this schedule makes of a call; yields
    the launches of the last one. A call that the schedule has no form of raises `Inapplicable`."""
    original, last = launch.sample_launches, []

    def replaced(*arguments: Any) -> Any:
        (first, *others), bad = original(*arguments)
        instead = SCHEDULES[name](first)
        if instead is None:
            raise Inapplicable(name)
        last[:] = [*instead, *others]
        return list(last), bad

    launch.sample_launches = replaced
    try:
        yield last
    finally:
        launch.sample_launches = original
