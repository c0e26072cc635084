"""From the masses of a row's tiles to a token: the two-level race (docs/concepts.md), the outputs.

A tile's mass is its part of the sum of pi*, up to a factor of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .elementary import exp, exponential
from .flat_rows import zero_counters
from .keys import end_keys, key_tile
from .normalizer import solved_masses
from .parameters import (
    good_mixture,
    good_parameters,
    inverse_temperature,
    masked_key,
    row_parameter,
    row_seed,
    temperature_of,
)
from .parts import by_tile, part_field, part_sums
from .sums import store_model_norms
from .tiles import level_of
from .workspace import (
    DRAW_PEAK,
    DRAW_SUM,
    KEY_PEAK,
    KEY_SUM,
    LEVEL,
    LOG_NORM,
    LOG_SUM,
    MIX_LOG_NORM,
    STATE_FIELDS,
    VALID,
)


@triton.jit
def race(mass, highest, cold, index, seed, position, STREAM: tl.constexpr):
    """The place where E / mass is least, the first of equal ones, and whether that is finite. At
    temperature 0 (`cold`) it is the first of the highest. A mass of 0 never wins. No winner's
    quotient overflows: the peak arrives before 45 and E is at least 2^-65, so that a winning tile
    weighs 2^-71 of the peak, its best token 2^-81."""
    arrival = exponential(seed, position, index, STREAM) / mass
    arrival = tl.where(mass > 0.0, arrival, INFINITY)
    arrival = tl.where(cold, tl.where(highest, 0.0, INFINITY), arrival)
    least, place = tl.min(arrival, 0, return_indices=True, return_indices_tie_break_left=True)
    return place, least < INFINITY


@triton.jit
def winner_tile(mass, temperature, peaks, peak, seed, position, variant: tl.constexpr):
    """The winning tile, and whether there is one. At temperature 0 it is the first tile that holds
    the largest key."""
    i = tl.arange(0, variant.tiles)
    cold = temperature == 0.0
    return race(mass, peaks == peak, cold, i, seed, position, 0)


@triton.jit
def winner_token(key, mass, tile, temperature, peak, seed, position):
    """The winning token of its tile, its key, and whether there is one."""
    i = tl.arange(0, TILE)
    cold = temperature == 0.0
    place, found = race(mass, key == peak, cold, tile * TILE + i, seed, position, 1)
    token_key = tl.sum(tl.where(i == place, key, 0.0), 0)
    return place + tile * TILE, token_key, found


@triton.jit
def store_draw(
    mixing,
    drawing,
    state,
    model_fields,
    row,
    token,
    logprob,
    valid,
    tiles,
    variant: tl.constexpr,
):
    """Store the outputs of a row."""
    MODELS: tl.constexpr = variant.models
    token = tl.where(valid, token, 0).to(tl.int64)
    tl.store(drawing.tokens + row, token)
    tl.store(drawing.logprobs + row, tl.where(valid, logprob, float("nan")).to(tl.float32))
    tl.store(drawing.valid + row, valid.to(tl.int8))
    if variant.model_logprobs:
        if not variant.sums:
            store_model_norms(state, model_fields, tiles, variant)
        for k in tl.static_range(MODELS):
            norm = tl.load(state + LOG_NORM + k)
            x = tl.load(mixing.logits[k] + row.to(tl.int64) * mixing.strides[k] + token).to(
                tl.float32
            )
            if mixing.scales is not None:
                x = x * mixing.scales[k]
            own = x.to(tl.float64) - level_of(norm) - tl.load(state + LOG_SUM + k)
            own = tl.where(valid, own, float("nan")).to(tl.float32)
            tl.store(drawing.model_logprobs + row.to(tl.int64) * MODELS + k, own)


@triton.jit
def store_invalid(mixing, drawing, work, begin, end, variant: tl.constexpr):
    """Make the rows from `begin` to before `end` invalid."""
    MODELS: tl.constexpr = variant.models
    nan = tl.full([], float("nan"), tl.float32)
    for i in range(begin, end):
        row = tl.zeros([], tl.int64) + i
        if variant.finish:
            for tile in range(0, tl.cdiv(mixing.vocab, TILE)):
                offsets = tile * TILE + tl.arange(0, TILE)
                keys = work.keys + row * mixing.vocab + offsets
                tl.store(keys, nan, mask=offsets < mixing.vocab)
        elif variant.draw:
            tl.store(drawing.tokens + row, 0)
            tl.store(drawing.logprobs + row, nan)
            tl.store(drawing.valid + row, 0)
            if variant.proposal_logprobs:
                tl.store(drawing.proposal_logprobs + row, nan)
            if variant.model_logprobs:
                for k in tl.static_range(MODELS):
                    tl.store(drawing.model_logprobs + row * MODELS + k, nan)
        else:
            tl.store(work.states + row * STATE_FIELDS + VALID, 0.0)


@triton.jit
def store_proposal(drawing, row, valid, token_key, peak, mass, temperature):
    """Store the log of the probability with which the token was drawn, from the masses of the
    row's tiles."""
    beta = inverse_temperature(temperature)
    log_mass = ((token_key - peak) * beta).to(tl.float64)
    proposal = tl.minimum(log_mass - tl.log(tl.sum(mass.to(tl.float64), 0)), 0.0)
    proposal = tl.where(temperature == 0.0, 0.0, proposal)
    proposal = tl.where(valid, proposal, float("nan")).to(tl.float32)
    tl.store(drawing.proposal_logprobs + row, proposal)


@triton.jit
def summed_masses(fields, tiles, beta, valid, variant: tl.constexpr):
    """The masses and the peaks of a row's tiles, the row's peak, and whether that is finite where
    the row is `valid`."""
    if variant.mask or variant.tempered or variant.bias:
        peaks = part_field(fields, DRAW_PEAK, tiles, variant, float("-inf"))
        sums = part_field(fields, DRAW_SUM, tiles, variant, 0.0)
    else:
        peaks = part_field(fields, KEY_PEAK, tiles, variant, float("-inf"))
        sums = part_field(fields, KEY_SUM, tiles, variant, 0.0)
    peak = tl.max(peaks, 0)
    valid = valid & (tl.abs(peak) < INFINITY)
    peak = tl.where(valid, peak, 0.0)
    mass = tl.where(peaks == -INFINITY, 0.0, sums * exp((peaks - peak) * beta))
    mass = part_sums(by_tile(mass, variant))
    return mass, tl.max(by_tile(peaks, variant), 1), peak, valid


@triton.jit
def draw(
    mixing, drawing, state, model_fields, fields, row, tiles, seed, position, variant: tl.constexpr
):
    """The race of a row whose keys are summed, or, with `early`, whose last evaluation has ended;
    without filters."""
    temperature = temperature_of(drawing, row)
    beta = inverse_temperature(temperature)
    valid = good_parameters(mixing, drawing, row, variant)
    if variant.early:
        # These sum to one within the solver's tolerance; 0 is the level of all keys.
        mass = solved_masses(mixing, state, fields, tiles, variant)
        peaks = tl.zeros_like(mass)
        peak = tl.zeros([], tl.float32)
        level = tl.zeros([], tl.float64)
        norm = tl.log(tl.sum(mass.to(tl.float64), 0))
        valid &= (tl.abs(norm) < INFINITY) & (tl.load(state + VALID) > 0.0)
    else:
        level, norm, good = end_keys(state, fields, tiles, variant)
        valid &= good > 0.0
        mass, peaks, peak, valid = summed_masses(fields, tiles, beta, valid, variant)
    own_seed = row_seed(drawing, seed, row)
    own_position = row_parameter(
        position, drawing.position_pointer, drawing.position_stride, row, tl.int64
    )
    tile, found = winner_tile(mass, temperature, peaks, peak, own_seed, own_position, variant)
    tile = tl.where(valid & found, tile, 0)
    key = key_tile(mixing, state, model_fields, row, tile, tiles, variant)
    key = masked_key(mixing, drawing, key, row, tile * TILE + tl.arange(0, TILE), variant)
    token, token_key, inside = winner_token(
        key, exp((key - peak) * beta), tile, temperature, peak, own_seed, own_position
    )
    valid = valid & found & inside
    # The key and the norm are rounded separately: keep the log-probability at most 0.
    logprob = tl.minimum(token_key - level - norm, 0.0)
    store_draw(mixing, drawing, state, model_fields, row, token, logprob, valid, tiles, variant)
    if variant.proposal_logprobs:
        store_proposal(drawing, row, valid, token_key, peak, mass, temperature)


@triton.jit
def end_draw(
    mixing, drawing, work, state, model_fields, fields, row, tiles, seed, position,
    variant: tl.constexpr,
):  # fmt: skip
    """Draw the token, or store the state that `filter_kernel` needs."""
    if variant.draw:
        draw(mixing, drawing, state, model_fields, fields, row, tiles, seed, position, variant)
    else:
        level, norm, valid = end_keys(state, fields, tiles, variant)
        valid = tl.where(good_mixture(mixing, row, variant), valid, 0.0)
        tl.store(state + LEVEL, level)
        tl.store(state + MIX_LOG_NORM, norm)
        tl.store(state + VALID, valid)
        if not variant.finish:
            zero_counters(work, row)
