"""The fused kernel: log-sum-exps, deficits, the search for tau, keys and the race in one launch.
docs/concepts.md explains the terms.

The work of a row is cut into *phases*, and each phase into *tasks* of `CHUNK` tiles. A program
claims a task by an atomic ticket. A task of a later phase waits for the earlier phase of its row.
The tasks of that phase have lower tickets, so they are already running: any number of programs
makes progress. The program that ends the last task of a phase also does the step between that phase
and the next. Rows form groups that fit the L2 cache. The phases of neighbouring groups interleave,
so that a later phase finds its logits in the cache and waits briefly.

    SUMS      log-sum-exps of the models            off reverse KL, and for plausibility
    DEFICITS  p, Q, and what the bracket needs      off reverse KL, exact normaliser
    EVALUATE  G and its slope at a point            the same, at most `EVALUATIONS` times
    KEYS      log pi* up to a constant              the only phase of most reverse KL; not `early`
    FINISH    log pi* itself                        for log_probs

A row that is not solved after its evaluations is solved by the program that ends the last of them.
With a Stieltjes form and nothing between pi* and the draw (`early`), the sums of the last
evaluation give the masses of the race: no KEYS phase sweeps the row again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bracket import deficits_of_tile, end_deficits
from .constants import TILE
from .draw import end_draw, store_invalid
from .handoffs import arrive, break_launch, claim, end_arrivals, reset, wait_for
from .keys import finish_tile, keys_of_tile
from .normalizer import end_evaluation, evaluation_of_tile
from .parts import row_fields
from .sums import end_sums, sums_of_tiles
from .workspace import SOLVED, STATE_FIELDS

MAX_EVALUATIONS = tl.constexpr(32)


# Arguments that change from call to call: specialising on them would compile the kernel again.
@triton.jit(do_not_specialize=["rows", "group", "seed", "position"])
def mixture_kernel(
    mixing,
    drawing,
    work,
    rows: tl.int32,
    group: tl.int32,
    seed: tl.int64,
    position: tl.int64,
    # Meta-parameters
    variant: tl.constexpr,
):
    """See the top of this file.

    Args:
        mixing, drawing, work: `Mixing` and `Drawing` of parameters.py, `Workspace` of
            workspace.py.
        rows: B.
        group: how many rows form a group.
        seed, position: the call's numbers, where they are not tensors.
        variant: the `Variant` of launch.py.
    """
    PHASES: tl.constexpr = variant.phases
    CHUNK: tl.constexpr = variant.chunk
    tiles = tl.cdiv(mixing.vocab, TILE)
    chunks = tl.cdiv(tiles, CHUNK)
    if PHASES == 1:
        run_task(
            mixing,
            drawing,
            work,
            tl.program_id(0) // chunks,
            tl.program_id(0) % chunks,
            0,
            0,
            tiles,
            chunks,
            seed,
            position,
            variant,
        )
    else:
        groups = tl.cdiv(rows, group)
        slot_tasks = group * chunks
        total = groups * PHASES * slot_tasks
        ticket, done = claim(work, 0)
        own = 0
        alone = 0
        while ticket < total:
            task = ticket.to(tl.int32)
            slot = task // slot_tasks
            inside = task % slot_tasks
            # Step s runs phase p on group s - p.
            s = 0
            active = 1
            most = tl.minimum(groups, PHASES)  # active groups between the ramps at both ends
            ramp = most * (most - 1) // 2
            if slot >= ramp:
                over = tl.minimum((slot - ramp) // most, tl.maximum(groups, PHASES) - most)
                s = most - 1 + over
                slot -= ramp + over * most
                active = most
            while slot >= active:
                slot -= active
                s += 1
                active = tl.minimum(s, PHASES - 1) - tl.maximum(s - groups + 1, 0) + 1
            phase = tl.minimum(s, PHASES - 1) - slot
            row = (s - phase) * group + inside // chunks
            if row < rows:
                ready = phase == 0
                if phase > 0:
                    ready = wait_for(work.flags + row, phase)
                if ready:
                    alone = run_task(
                        mixing,
                        drawing,
                        work,
                        row,
                        inside % chunks,
                        phase,
                        alone,
                        tiles,
                        chunks,
                        seed,
                        position,
                        variant,
                    )
                else:
                    alone = 0
                    break_launch(work)
            if alone == 0:
                ticket, done = claim(work, 1)
                own = 1
        # Each program claims one ticket too many. The last of these belongs to the last program.
        last = total + tl.num_programs(0) - 1
        if ticket >= last:
            if (ticket == last) & (done + own == total):
                reset(work, rows)
            else:
                break_launch(work)
                store_invalid(mixing, drawing, work, 0, rows, variant)


@triton.jit
def run_task(
    mixing,
    drawing,
    work,
    row,
    chunk,
    phase,
    alone,
    tiles,
    chunks,
    seed,
    position,
    variant: tl.constexpr,
):
    """Run one phase of one chunk of a row; if it is the phase's last chunk, end the phase too.

    Returns 0, or a positive number if the last evaluation has left the row unsolved. The caller
    passes that number back as `alone`: this program then evaluates the whole row by itself.
    """
    # With `early` the row is through where KEYS would begin.
    KEYS: tl.constexpr = variant.phases - 1 - variant.finish + variant.early
    state = work.states + row.to(tl.int64) * STATE_FIELDS
    model_fields = row_fields(work, row, variant)
    fields = model_fields + 2 * variant.models
    begin = chunk * variant.chunk
    end = tl.minimum(begin + variant.chunk, tiles)
    if variant.evaluations > 0:
        if alone > 0:
            begin = 0
            end = tiles
    skipped = tl.full([], False, tl.int1)  # whether this evaluates a row that is solved
    if variant.evaluations > 0:
        if (phase > 1) & (phase < KEYS):
            skipped = tl.load(state + SOLVED, cache_modifier=".cg") != 0.0
    # Each phase has a loop of its own, so that its loop constants take no registers in others.
    if variant.early == 0:
        if phase == KEYS:
            for tile in range(begin, end):
                keys_of_tile(
                    mixing, drawing, work, state, model_fields, fields, row, tile, tiles, variant
                )
    if variant.sums:
        if phase == 0:
            sums_of_tiles(mixing, model_fields, row, begin, end, variant)
    if variant.evaluations > 0:
        if phase == 1:
            for tile in range(begin, end):
                deficits_of_tile(mixing, state, fields, row, tile, tiles, variant)
        elif (phase > 1) & (phase < KEYS):
            if skipped == 0:
                for tile in range(begin, end):
                    evaluation_of_tile(mixing, state, fields, row, tile, variant)
    if variant.finish:
        if phase > KEYS:
            for tile in range(begin, end):
                finish_tile(mixing, work, state, row, tile)
    tl.debug_barrier()
    ended = tl.full([], False, tl.int1)
    good = tl.full([], True, tl.int1)
    if variant.evaluations > 0:
        ended = ended | (alone > 0)
    if (skipped == 0) & (ended == 0):
        before, good = arrive(work.arrivals + row, chunk, chunks)
        ended = before == chunks - 1
        if variant.phases == 1:
            if (before < 0) | (before >= chunks):
                store_invalid(mixing, drawing, work, row, row + 1, variant)
    left = 0
    if ended & (good == 0):
        if variant.phases == 1:
            store_invalid(mixing, drawing, work, row, row + 1, variant)
        else:
            break_launch(work)
    elif ended:
        following = phase + 1
        tl.debug_barrier()
        if variant.early == 0:
            if phase == KEYS:
                end_draw(
                    mixing, drawing, work, state, model_fields, fields, row, tiles, seed, position,
                    variant,
                )  # fmt: skip
        if variant.sums:
            if phase == 0:
                end_sums(mixing, state, model_fields, row, tiles, variant)
        if variant.evaluations > 0:
            if (phase > 0) & (phase < KEYS):
                if phase == 1:
                    end_deficits(mixing, state, fields, row, tiles, variant)
                else:
                    end_evaluation(mixing, state, fields, tiles, variant)
                tl.debug_barrier()
                if tl.load(state + SOLVED) != 0.0:
                    following = KEYS  # skip the other evaluations
                elif (phase == KEYS - 1) & (alone < MAX_EVALUATIONS):
                    left = alone + 1
                if variant.early:
                    drawn = (following == KEYS) & (left == 0)
                    if variant.root:
                        drawn &= phase > 1  # without moments the deficits solve no row
                    if drawn:
                        end_draw(
                            mixing, drawing, work, state, model_fields, fields, row, tiles, seed,
                            position, variant,
                        )  # fmt: skip
        tl.debug_barrier()
        if left == 0:
            end_arrivals(work.arrivals + row, chunks)
            if phase < variant.phases - 1:
                before = tl.atomic_xchg(work.flags + row, following, sem="release")
                if (phase == 0) & (before != 0):
                    break_launch(work)
    return left
