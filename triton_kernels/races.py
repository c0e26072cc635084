"""The two-level race of a draw (docs/concepts.md): among the tiles of a row, and among the tokens
of the winning tile, part by part."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import INFINITY, TILE
from .elementary import exp, exponential
from .parameters import inverse_temperature, row_parameter, row_seed
from .parts import below, places, store_parts
from .workspace import RACE


@triton.jit
def noise_of(drawing, seed, position, row):
    """The seed and the position of a row."""
    own_position = row_parameter(
        position, drawing.position_pointer, drawing.position_stride, row, tl.int64
    )
    return row_seed(drawing, seed, row), own_position


@triton.jit
def winner_tile(mass, temperature, peaks, peak, seed, position, variant: tl.constexpr):
    """The tile where E / mass is least, the first of equal ones, and whether that is finite. At
    temperature 0 it is the first that holds the largest key. A mass of 0 never wins. No winner's
    quotient overflows: the peak arrives before 45 and E is at least 2^-65, so that a winning tile
    weighs 2^-71 of the peak, its best token 2^-81."""
    i = tl.arange(0, variant.tiles)
    arrival = exponential(seed, position, i, 0) / mass
    arrival = tl.where(mass > 0.0, arrival, INFINITY)
    first = tl.where(peaks == peak, 0.0, INFINITY)
    arrival = tl.where(temperature == 0.0, first, arrival)
    least, place = tl.min(arrival, 0, return_indices=True, return_indices_tie_break_left=True)
    return place, least < INFINITY


@triton.jit
def token_noise(seed, position, tile, variant: tl.constexpr):
    """E of the tokens of a tile, [parts, tokens of a part]."""
    return exponential(seed, position, places(variant) + tile * TILE, 1)


@triton.jit
def part_races(key, noise, temperature, variant: tl.constexpr):
    """The races of the tokens of each part of a tile: the least E / mass, on the scale of the
    part's peak, its token's place in the tile, its key, and the peak, [parts] each. +inf where a
    part has no token. At temperature 0 the first of the largest key has 0."""
    peak = tl.max(key, 1)
    there = key > -INFINITY
    mass = exp(below(key, peak) * inverse_temperature(temperature))
    arrival = tl.where(there & (mass > 0.0), noise / mass, INFINITY)
    first = tl.where(there & (key == peak[:, None]), 0.0, INFINITY)
    arrival = tl.where(temperature == 0.0, first, arrival)
    least, place = tl.min(arrival, 1, return_indices=True, return_indices_tie_break_left=True)
    PART: tl.constexpr = TILE // variant.parts
    chosen = tl.arange(0, PART)[None, :] == place[:, None]
    token_key = tl.sum(tl.where(chosen, key, 0.0), 1)
    return least, place + tl.arange(0, variant.parts) * PART, token_key, peak


@triton.jit
def winner_token(races, tile, temperature, variant: tl.constexpr):
    """The token that wins a tile, from the races of its parts, its key, and whether there is
    one."""
    arrival, place, key, peaks = races
    peak = tl.max(peaks, 0)
    scaled = (peaks - tl.where(peak == -INFINITY, 0.0, peak)) * inverse_temperature(temperature)
    mass = exp(scaled)
    arrival = tl.where((arrival < INFINITY) & (mass > 0.0), arrival / mass, INFINITY)
    cold = tl.where((peaks == peak) & (peaks > -INFINITY), 0.0, INFINITY)
    arrival = tl.where(temperature == 0.0, cold, arrival)
    least, part = tl.min(arrival, 0, return_indices=True, return_indices_tie_break_left=True)
    own = tl.arange(0, variant.parts) == part
    token = tl.sum(tl.where(own, place, 0), 0) + tile * TILE
    return token, tl.sum(tl.where(own, key, 0.0), 0), least < INFINITY


@triton.jit
def store_races(fields, races, tile, variant: tl.constexpr):
    """Store the races of a tile's parts."""
    arrival, place, key, peak = races
    store_parts(fields, RACE, tile, (arrival, place, key, peak), variant)


@triton.jit
def stored_races(fields, tile, variant: tl.constexpr):
    """What `store_races` has stored; a place is inside the tile whatever the memory holds."""
    part = tile * variant.parts + tl.arange(0, variant.parts)
    own = fields + part * variant.record + RACE
    arrival = tl.load(own, cache_modifier=".cg")
    place = tl.load(own + 1, cache_modifier=".cg").to(tl.int32, bitcast=True) & (TILE - 1)
    key = tl.load(own + 2, cache_modifier=".cg")
    return arrival, place, key, tl.load(own + 3, cache_modifier=".cg")
