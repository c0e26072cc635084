"""The fused kernel: log-sum-exps, deficits, the search for tau, keys and the race, one launch
(design §2, §3).

The work of a row is cut into tasks of `CHUNK` tiles and into phases. Programs claim tasks by an
atomic ticket; a task of a later phase waits for its row's earlier phase, whose tasks have lower
tickets and are therefore running already: nothing has to be co-resident, and any grid makes
progress. The program that ends a phase of a row does what comes between it and the next. Rows are
worked through in groups that fit the L2 cache, the phases of neighbouring groups interleaved, so
that what a later phase reads again is there and nobody waits long.

    SUMS      log-sum-exps of the models            off reverse KL, and for plausibility
    DEFICITS  p, Q, and what the bracket needs      off reverse KL, exact normaliser
    EVALUATE  G and its slope at a point            the same, at most `EVALUATIONS` times
    KEYS      log pi* up to a constant              always; alone it is the whole of reverse KL
    FINISH    log pi* itself                        for log_probs

A row that is not solved after its evaluations is solved by the program that ends the last of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .draw import (
    allowed,
    good_parameters,
    good_weights,
    inverse_temperature,
    row_parameter,
    row_seed,
    store_draw,
    temperature_of,
    winner_tile,
    winner_token,
)
from .solver import (
    BEST_P,
    DRAW_PEAK,
    DRAW_SUM,
    FIRST,
    KEY_PEAK,
    KEY_SUM,
    MASS,
    S1,
    S2,
    TILE_FIELDS,
    end_deficits,
    end_keys,
    end_sums,
    ratios,
    start_ratios,
    step_newton,
    step_stieltjes,
    tile_field,
)
from .tiles import (
    BEST_TOKEN,
    EXCLUDED,
    INFINITY,
    LEAST,
    LEVEL,
    MIX_LOG_NORM,
    POINT,
    SOLVED,
    STATE_FIELDS,
    TILE,
    VALID,
    deficit_tile,
    log_linear_tile,
    model_tile,
    reference_weight,
    store_model_sum,
    sum_exp,
)

MAX_EVALUATIONS = tl.constexpr(32)


@triton.jit
def evaluate_tile(m, state, row, tile, C: tl.constexpr):
    """sum p H and sum p (-H') of a tile at the row's point; a Stieltjes kernel's leave s* out: next
    to its pole the others would drown in their rounding."""
    log_ref, q, _ = deficit_tile(m, state, row, tile, C)
    distance = (q - tl.load(state + LEAST)).to(tl.float32)
    inside = q < EXCLUDED
    point = tl.load(state + POINT).to(tl.float32)
    if C.excess is not None:
        offsets = tile * TILE + tl.arange(0, TILE)
        inside &= offsets != tl.load(state + BEST_TOKEN).to(tl.int32)
        y = point + C.excess(tl.where(inside, distance, 0.0), m.alpha)
    else:
        y = point + tl.where(inside, distance, 0.0)
    h, slope = ratios(y, m, C)
    p = tl.where(inside, tl.exp(log_ref), 0.0)
    return tl.sum(p * h, 0), tl.sum(p * slope, 0)


@triton.jit
def key_tile(m, state, model_fields, row, tile, tiles, C: tl.constexpr):
    """log pi* up to a row's constant, -inf off the support, and where something is broken."""
    if C.general:
        log_ref, q, broken = deficit_tile(m, state, row, tile, C)
        inside = q < EXCLUDED
        if C.exact:
            point = tl.load(state + POINT).to(tl.float32)
            if C.unshift is not None:
                point = C.unshift(point, m.alpha)
            y = point + (q - tl.load(state + LEAST)).to(tl.float32)
        else:
            # Eq. 6 as printed: Z = 0, that is tau = c (1 - sum w) + min Q.
            y = (q + m.supremum * reference_weight(m, row, C)).to(tl.float32)
            if C.bounded:
                broken |= inside & ((y > 0.0) == 0)
        key = log_ref + C.log_ratio(tl.where(inside, y, 1.0), m.alpha)
        return tl.where(inside, key, -INFINITY), broken
    else:
        return log_linear_tile(m, state, model_fields, row, tile, tiles, C)


@triton.jit
def masked_key(r, m, key, row, tile, C: tl.constexpr):
    if C.mask:
        key = tl.where(allowed(r, m, row, tl.arange(0, TILE) + tile * TILE, C), key, -INFINITY)
    return key


@triton.jit
def sums_of_tile(m, model_fields, row, tile, C: tl.constexpr):
    MODELS: tl.constexpr = C.models
    for k in tl.static_range(MODELS):
        store_model_sum(model_tile(m, k, row, tile), k, model_fields, tile, C)


@triton.jit
def deficits_of_tile(m, w, state, fields, row, tile, tiles, C: tl.constexpr):
    log_ref, q, broken = deficit_tile(m, state, row, tile, C)
    inside = q < EXCLUDED
    i = tl.arange(0, TILE)
    p = tl.where(inside, tl.exp(log_ref), 0.0)
    least = tl.min(q, 0)
    best = tl.min(tl.where(inside & (q == least), i, TILE - 1), 0)
    tl.store(w.leasts + row.to(tl.int64) * tiles + tile, least.to(tl.float64))
    tl.store(w.winners + row.to(tl.int64) * tiles + tile, best + tile * TILE)
    tl.store(fields + BEST_P * C.tiles + tile, tl.sum(tl.where(i == best, p, 0.0), 0))
    tl.store(fields + MASS * C.tiles + tile, tl.sum(tl.where(broken, float("nan"), p), 0))
    first = tl.sum(tl.where(inside, p * q.to(tl.float32), 0.0), 0)
    tl.store(fields + FIRST * C.tiles + tile, first)
    h, slope = start_ratios(tl.where(inside, q, 1.0), m, row, C)
    if C.excess is not None:
        p = tl.where(i == best, 0.0, p)  # it may be s*
    tl.store(fields + S1 * C.tiles + tile, tl.sum(p * h, 0))
    tl.store(fields + S2 * C.tiles + tile, tl.sum(p * slope, 0))


@triton.jit
def evaluation_of_tile(m, state, fields, row, tile, tiles, C: tl.constexpr):
    s1, s2 = evaluate_tile(m, state, row, tile, C)
    tl.store(fields + S1 * C.tiles + tile, s1)
    tl.store(fields + S2 * C.tiles + tile, s2)


@triton.jit
def keys_of_tile(m, r, w, state, model_fields, fields, row, tile, tiles, C: tl.constexpr):
    key, broken = key_tile(m, state, model_fields, row, tile, tiles, C)
    peak = tl.max(key, 0)
    tl.store(fields + KEY_PEAK * C.tiles + tile, peak)
    tl.store(fields + KEY_SUM * C.tiles + tile, sum_exp(key, peak, broken))
    if C.mask or C.tempered:
        beta = inverse_temperature(temperature_of(r, row))
        key = masked_key(r, m, key, row, tile, C)
        peak = tl.max(key, 0)
        below = key - tl.where(peak == -INFINITY, 0.0, peak)
        tl.store(fields + DRAW_PEAK * C.tiles + tile, peak)
        tl.store(fields + DRAW_SUM * C.tiles + tile, tl.sum(tl.exp(below * beta), 0))
    if C.store_keys:
        offsets = tile * TILE + tl.arange(0, TILE)
        keys = w.keys + row.to(tl.int64) * m.vocab
        tl.store(keys + offsets, key, mask=offsets < m.vocab)


@triton.jit
def finish_tile(m, w, state, row, tile):
    """log pi* out of the keys, in place; NaN in an invalid row."""
    offsets = tile * TILE + tl.arange(0, TILE)
    keys = w.keys + row.to(tl.int64) * m.vocab + offsets
    key = tl.load(keys, mask=offsets < m.vocab, other=0.0, cache_modifier=".cg")
    result = (
        key - tl.load(state + LEVEL).to(tl.float32) - tl.load(state + MIX_LOG_NORM).to(tl.float32)
    )
    result = tl.where(tl.load(state + VALID) > 0.0, result, float("nan"))
    tl.store(keys, result, mask=offsets < m.vocab)


@triton.jit
def draw(m, r, state, model_fields, fields, row, tiles, seed, position, C: tl.constexpr):
    """The race of a row whose keys are summed, without filters."""
    level, norm, good = end_keys(state, fields, tiles, C)
    temperature = temperature_of(r, row)
    beta = inverse_temperature(temperature)
    if C.mask or C.tempered:
        peaks = tile_field(fields, DRAW_PEAK, tiles, C, float("-inf"))
        sums = tile_field(fields, DRAW_SUM, tiles, C, 0.0)
    else:
        peaks = tile_field(fields, KEY_PEAK, tiles, C, float("-inf"))
        sums = tile_field(fields, KEY_SUM, tiles, C, 0.0)
    peak = tl.max(peaks, 0)
    valid = (good > 0.0) & (tl.abs(peak) < INFINITY) & good_parameters(r, m, row, C)
    peak = tl.where(valid, peak, 0.0)
    mass = tl.where(peaks == -INFINITY, 0.0, sums * tl.exp((peaks - peak) * beta))
    own_seed = row_seed(r, seed, row)
    own_position = row_parameter(position, r.position_pointer, r.position_stride, row, tl.int64)
    tile, found = winner_tile(mass, temperature, peaks, peak, own_seed, own_position, C)
    tile = tl.where(valid & found, tile, 0)
    key, _ = key_tile(m, state, model_fields, row, tile, tiles, C)
    key = masked_key(r, m, key, row, tile, C)
    token, token_key, inside = winner_token(
        key, tl.exp((key - peak) * beta), tile, temperature, peak, own_seed, own_position
    )
    valid = valid & found & inside
    store_draw(r, m, state, model_fields, row, token, token_key - level - norm, valid, tiles, C)


@triton.jit
def end_evaluation(m, state, fields, tiles, C: tl.constexpr):
    """The step after an evaluation."""
    if tl.load(state + SOLVED) == 0.0:
        s1 = tl.sum(tile_field(fields, S1, tiles, C, 0.0).to(tl.float64), 0)
        s2 = tl.sum(tile_field(fields, S2, tiles, C, 0.0).to(tl.float64), 0)
        if C.excess is not None:
            step_stieltjes(m, state, s1, s2, C)
        else:
            step_newton(m, state, s1, s2, C)


@triton.jit
def wait_for(flag, value):
    """Until the row's earlier phase is over."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    while seen < value:
        seen = tl.atomic_add(flag, 0, sem="acquire")
    tl.debug_barrier()


# What changes from call to call is not specialised on: it would compile the kernel again.
@triton.jit(do_not_specialize=["rows", "group", "seed", "position"])
def mixture_kernel(
    m, r, w, rows: tl.int32, group: tl.int32, seed: tl.int64, position: tl.int64, C: tl.constexpr
):
    """See the head of this file.

    Args:
        m, r, w: `Mixing` and `Drawing` of parameters.py, `Workspace` of workspace.py.
        rows: B.
        group: rows whose phases are interleaved with those of the next.
        seed, position: of the launch, where they are no tensors.
        C: the `Variant`.
    """
    PHASES: tl.constexpr = C.phases
    CHUNK: tl.constexpr = C.chunk
    tiles = tl.cdiv(m.vocab, TILE)
    chunks = tl.cdiv(tiles, CHUNK)
    if PHASES == 1:
        run_task(
            m,
            r,
            w,
            tl.program_id(0) // chunks,
            tl.program_id(0) % chunks,
            0,
            0,
            tiles,
            chunks,
            seed,
            position,
            C,
        )
    else:
        groups = tl.cdiv(rows, group)
        slot_tasks = group * chunks
        total = groups * PHASES * slot_tasks
        ticket = tl.atomic_add(w.tickets, 1, sem="relaxed")
        alone = 0
        while ticket < total:
            slot = ticket // slot_tasks
            inside = ticket % slot_tasks
            # Step s runs phase p on group s - p.
            s = 0
            active = 1
            while slot >= active:
                slot -= active
                s += 1
                active = tl.minimum(s, PHASES - 1) - tl.maximum(s - groups + 1, 0) + 1
            phase = tl.minimum(s, PHASES - 1) - slot
            row = (s - phase) * group + inside // chunks
            if row < rows:
                if phase > 0:
                    wait_for(w.flags + row, phase)
                chunk = inside % chunks
                alone = run_task(
                    m, r, w, row, chunk, phase, alone, tiles, chunks, seed, position, C
                )
            if alone == 0:
                ticket = tl.atomic_add(w.tickets, 1, sem="relaxed")
        # The last program out leaves the counters as it found them.
        leaving = tl.atomic_add(w.tickets + 1, 1, sem="acq_rel")
        if leaving == tl.num_programs(0) - 1:
            tl.atomic_xchg(w.tickets, 0, sem="relaxed")
            tl.atomic_xchg(w.tickets + 1, 0, sem="relaxed")


@triton.jit
def run_task(m, r, w, row, chunk, phase, alone, tiles, chunks, seed, position, C: tl.constexpr):
    """One phase of one chunk of a row, and what ends the phase if it is the row's last chunk. A
    row that the last evaluation leaves unsolved is returned to: the result is not 0 then, and is
    `alone` of the next call, which evaluates the whole row."""
    PHASES: tl.constexpr = C.phases
    KEYS: tl.constexpr = C.phases - 1 - C.finish
    MODEL_FIELDS: tl.constexpr = 2 * C.models
    FIELDS: tl.constexpr = TILE_FIELDS + 2 * C.models
    state = w.states + row.to(tl.int64) * STATE_FIELDS
    model_fields = w.fields + row.to(tl.int64) * FIELDS * C.tiles
    fields = model_fields + MODEL_FIELDS * C.tiles
    begin = chunk * C.chunk
    end = tl.minimum(begin + C.chunk, tiles)
    if C.evaluations > 0:
        if alone > 0:
            begin = 0
            end = tiles
    # A loop per phase: what one loop keeps in registers for all tiles is not kept in another.
    if phase == KEYS:
        for tile in range(begin, end):
            keys_of_tile(m, r, w, state, model_fields, fields, row, tile, tiles, C)
    if C.sums:
        if phase == 0:
            for tile in range(begin, end):
                sums_of_tile(m, model_fields, row, tile, C)
    if C.evaluations > 0:
        if phase == 1:
            for tile in range(begin, end):
                deficits_of_tile(m, w, state, fields, row, tile, tiles, C)
        elif (phase > 1) & (phase < KEYS):
            if tl.load(state + SOLVED, cache_modifier=".cg") == 0.0:
                for tile in range(begin, end):
                    evaluation_of_tile(m, state, fields, row, tile, tiles, C)
    if C.finish:
        if phase > KEYS:
            for tile in range(begin, end):
                finish_tile(m, w, state, row, tile)
    tl.debug_barrier()
    arrived = chunks - 1
    if alone == 0:
        arrived = tl.atomic_add(w.arrivals + row, 1, sem="acq_rel")
    again = 0
    if arrived == chunks - 1:
        tl.debug_barrier()
        if phase == KEYS:
            if C.draw:
                draw(m, r, state, model_fields, fields, row, tiles, seed, position, C)
            else:
                level, norm, valid = end_keys(state, fields, tiles, C)
                valid = tl.where(good_weights(m, row, C), valid, 0.0)
                tl.store(state + LEVEL, level)
                tl.store(state + MIX_LOG_NORM, norm)
                tl.store(state + VALID, valid)
        if C.sums:
            if phase == 0:
                end_sums(m, state, model_fields, row, tiles, C)
        if C.evaluations > 0:
            if phase == 1:
                end_deficits(m, w, state, fields, row, tiles, C)
            elif (phase > 1) & (phase < KEYS):
                end_evaluation(m, state, fields, tiles, C)
                tl.debug_barrier()
                if (phase == KEYS - 1) & (alone < MAX_EVALUATIONS):
                    again = tl.where(tl.load(state + SOLVED) == 0.0, alone + 1, 0)
        tl.debug_barrier()
        if again == 0:
            # Counters are left as they were found.
            tl.atomic_xchg(w.arrivals + row, 0, sem="relaxed")
            tl.atomic_xchg(w.flags + row, (phase + 1) % PHASES, sem="release")
    return again
