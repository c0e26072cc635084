"""Counter-based random numbers in torch: Philox-4x32-10, SplitMix64 and the exponential of design
§3.

Unsigned 32-bit words travel in int64 tensors. Products and sums of int64 wrap modulo 2^64, which is
what the two generators ask for; right shifts are arithmetic and therefore masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Raised whenever a seed would give other tokens than before.
SCHEME_VERSION = 1
#: Tile of the race in token ids; part of the definition of the random numbers.
TILE = 1024

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * multiplier, both below 2^32."""
    product = word * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011).

    Args:
        counter: four int64 tensors of values in [0, 2^32), broadcastable with each other and the
            key.
        key: two such tensors.

    Returns:
        Four int64 tensors of values in [0, 2^32), the output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def mix(state: Tensor) -> Tensor:
    """SplitMix64's output from each int64 `state`."""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return state ^ ((state >> 31) & (2**33 - 1))


def split_mix(seed: int, rows: int, device: torch.device) -> Tensor:
    """Row seeds of an integer seed: row b gets SplitMix64(seed + b), so that equal prompts differ.

    Args:
        seed: any integer in [-2^63, 2^64); only its 64 bits count.
        rows: number of rows B.
        device: where the result lives.

    Returns:
        int64 [B], the 64 bits of each row's seed.
    """
    return mix(torch.arange(rows, dtype=torch.int64, device=device) + _signed(seed))


def continuation_seeds(seeds: Tensor, count: int) -> Tensor:
    """Seeds of several continuations of each row: its own, then SplitMix64(SplitMix64(seed) + k).

    The inner scrambling keeps rows with neighbouring seeds from sharing one.

    Args:
        seeds: int64 [B].
        count: K, continuations of each row.

    Returns:
        int64 [B * K], those of row b from b * K on, k = 0 .. K - 1.
    """
    k = torch.arange(1, count, device=seeds.device)
    return torch.cat([seeds[:, None], mix(mix(seeds)[:, None] + k)], dim=1).flatten()


def exponential(seed: Tensor, position: Tensor, index: Tensor, stream: int) -> Tensor:
    """Standard exponentials E = -log1p(-v) that depend on (seed, position, index, stream) alone.

    v = (x + 0.5) 2^-64 for the 64-bit x of the first two Philox words. Small E decide a race, and
    there v is relatively exact in float32.

    Args:
        seed: int64 [B], all 64 bits count.
        position: int64 [B], all 64 bits count.
        index: int64 [B, K] or [1, K] of values in [0, 2^32): tile or token ids.
        stream: 0 for tiles, 1 for tokens.

    Returns:
        float32 [B, K], positive and finite.
    """
    seed, position = seed[:, None], position[:, None]
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    counter = (
        position & _MASK32,
        (position >> 32) & _MASK32,
        index,
        torch.full_like(index, stream),
    )
    high, low, _, _ = philox(counter, key)
    v = high.float() * 2.0**-32 + (low.float() + 0.5) * 2.0**-64
    # The clamp keeps E finite where v rounds to 1, so that a token alone in its tile can still win.
    return -torch.log1p(-v.clamp(max=1.0 - 2.0**-24))
