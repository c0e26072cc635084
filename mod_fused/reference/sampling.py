"""The float64 oracle for sampling: filters, Philox, and the two-level exponential race of
docs/concepts.md.

Plain numpy, one row at a time, no code shared with the backends. The tokens of `race` are the
golden ones: a backend may differ only where rounding decides between two near-equal arrivals.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .mixture import Array, log_softmax, to_float64

SCHEME_VERSION = 1  # raise it when a token changes for the same inputs
TILE = 1024
_WORD = 0xFFFFFFFF
_TWO_TO_64 = 1 << 64


def philox4x32(counter: Any, key: Any) -> tuple[int, int, int, int]:
    """Philox-4x32-10 (Salmon et al., SC11) on Python integers: 4 counter words, 2 key words."""
    c0, c1, c2, c3 = (int(c) for c in counter)
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def splitmix64(state: int) -> int:
    """One output of SplitMix64 from `state`, as a signed 64-bit integer."""
    z = (state + 0x9E3779B97F4A7C15) % _TWO_TO_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % _TWO_TO_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % _TWO_TO_64
    z = z ^ (z >> 31)
    return z - _TWO_TO_64 if z >> 63 else z


def row_seeds(seed: int, batch: int) -> list[int]:
    """The seeds of the rows of a batch that was given one integer seed."""
    return [splitmix64(seed + b) for b in range(batch)]


def philox4x32_words(seed: int, position: Any, index: Any, stream: int) -> tuple[Array, Array]:
    """The first two output words as uint64 arrays, for arrays of positions and indices at once
    (broadcast with each other); see `philox4x32`."""
    shift, word = np.uint64(32), np.uint64(_WORD)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    at, c2 = (np.asarray(x).astype(np.uint64) for x in (position, index))
    at, c2 = np.broadcast_arrays(at, c2)
    c0, c1, c3 = at & word, at >> shift, np.full(c2.shape, stream, dtype=np.uint64)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (b >> shift) ^ c1 ^ np.uint64(k0), b & word
        c2, c3 = (a >> shift) ^ c3 ^ np.uint64(k1), a & word
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1


def exponentials(seed: int, position: Any, index: Any, stream: int) -> Array:
    """Standard exponential variates E(seed, position, index, stream), float64, positive."""
    x0, x1 = philox4x32_words(seed, position, index, stream)
    v = x0 * 2.0**-32 + (x1 + 0.5) * 2.0**-64
    return -np.log1p(-np.minimum(v, 1.0 - 2.0**-53))


def arrivals(probabilities: Any, seed: int, position: int) -> tuple[Array, Array]:
    """The arrival times of the tiles, and of the tokens of the winning tile; +inf for mass 0."""
    p = to_float64(probabilities)
    tiles = [p[start : start + TILE] for start in range(0, len(p), TILE)]
    mass = np.array([tile.sum() for tile in tiles])
    with np.errstate(divide="ignore"):
        tile_times = exponentials(seed, position, np.arange(len(tiles)), stream=0) / mass
        winner = int(np.argmin(tile_times))
        ids = winner * TILE + np.arange(len(tiles[winner]))
        return tile_times, exponentials(seed, position, ids, stream=1) / tiles[winner]


def race(probabilities: Any, seed: int, position: int = 0) -> int:
    """The token drawn from `probabilities` [V], which may have any sum."""
    tile_times, token_times = arrivals(probabilities, seed, position)
    return int(np.argmin(tile_times)) * TILE + int(np.argmin(token_times))


def race_margin(probabilities: Any, seed: int, position: int = 0) -> float:
    """How close the race was: second over first arrival time, less 1, on the closer level."""
    ratios = [np.inf]
    for times in arrivals(probabilities, seed, position):
        if np.isfinite(times).sum() > 1:
            first, second = np.partition(times, 1)[:2]
            ratios.append(second / first)
    return float(min(ratios) - 1.0)


def unpack_mask(mask: Any, vocab: int) -> Array:
    """bool [V] of a bool [V] or packed int32 [ceil(V/32)] mask (bit s%32 of word s//32)."""
    mask = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask)
    if mask.dtype == bool:
        return mask
    words = mask.astype(np.int64) & _WORD
    ids = np.arange(vocab)
    return (words[ids // 32] >> (ids % 32)) & 1 == 1


def filtered_log_probs(
    log_probs: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Array:
    """log of the distribution that is drawn from, float64 [V], given log pi* [V] of one row.

    Mask, bias [V], temperature, top-k, top-p and min-p apply in this order, each to what the one
    before kept. Ties are kept together. Temperature 0 puts everything on the argmax, lowest id
    first. All NaN for an invalid row: NaN log pi*, NaN or +inf in the bias, nothing left after mask
    and bias, or a parameter out of range.
    """
    scores = to_float64(log_probs).copy()
    temperature, top_k = float(temperature), int(top_k or len(scores))
    top_p, min_p = float(1.0 if top_p is None else top_p), float(min_p or 0.0)
    parameters_ok = temperature >= 0 and top_k > 0 and 0 < top_p <= 1 and 0 <= min_p <= 1
    if mask is not None:
        scores[~unpack_mask(mask, len(scores))] = -np.inf
    if bias is not None:
        bias = to_float64(bias)
        parameters_ok &= bool((bias < np.inf).all())
        # A bias of 1e30 would round log pi* away: measure it from the largest that counts.
        left = (scores > -np.inf) & (bias > -np.inf)
        highest = bias[left].max() if left.any() else 0.0
        scores = np.where(left, scores + (np.where(left, bias, 0.0) - highest), -np.inf)
    if not parameters_ok or np.isnan(scores).any() or scores.max() == -np.inf:
        return np.full(len(scores), np.nan)
    if temperature == 0:
        greedy = np.full(len(scores), -np.inf)
        greedy[np.argmax(scores)] = 0.0
        return greedy
    # Subtract the maximum, no normaliser: at a high temperature that would absorb the differences.
    scores = (scores - scores.max()) / temperature
    kth_largest = np.sort(scores)[-min(top_k, len(scores))]
    scores[scores < kth_largest] = -np.inf
    if top_p < 1.0:
        p = np.exp(log_softmax(scores))
        order = np.argsort(-p, kind="stable")
        cumulative = np.concatenate([[0.0], np.cumsum(p[order])])
        first_of_ties = np.searchsorted(-p[order], -p[order], side="left")
        larger = np.empty_like(p)
        larger[order] = cumulative[first_of_ties]  # the mass of all strictly larger ones
        scores[larger >= top_p] = -np.inf
    if min_p > 0.0:
        scores[scores < np.log(min_p)] = -np.inf
    return log_softmax(scores)
