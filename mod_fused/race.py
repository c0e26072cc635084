"""From log pi* to a token in torch: mask, temperature, filters, and the two-level exponential race
(design §3, §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox
from .arguments import DrawArguments
from .rows import row_scalar

#: Tile of the race in token ids; part of the definition of the random numbers.
TILE = 1024
_FIXED_POINT = float(1 << 40)


def draw(
    drawing: DrawArguments, rows: slice, batch: int, key: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        drawing: the op's arguments.
        rows: which rows of the batch these are.
        batch: B, the number of rows of the whole batch.
        key: float32 [b, T, TILE], log pi* up to a constant of the row, -inf where it is 0.
        vocab_size: V; entries from V on are padding.

    Returns:
        token ids int64 [b], and bool [b]: whether the row's parameters are good and it has a token
        left.
    """
    device = key.device

    temperature = row_scalar(drawing.temperature, rows, device, torch.float32)
    top_k = row_scalar(drawing.top_k, rows, device, torch.int64)
    top_p = row_scalar(drawing.top_p, rows, device, torch.float64)
    min_p = row_scalar(drawing.min_p, rows, device, torch.float32)
    position = row_scalar(drawing.position, rows, device, torch.int64)
    valid = (temperature >= 0) & temperature.isfinite() & (top_k >= 0)
    valid = valid & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)

    if drawing.mask is not None:
        key = torch.where(_allowed(drawing.mask[rows], key, vocab_size), key, -torch.inf)
    flat = key.flatten(1)
    peak, greedy = flat.max(1)  # the first of equal keys
    valid = valid & peak.isfinite()

    scaled = _scale(flat, peak, temperature)
    keep = _keep(drawing, flat, peak, scaled, temperature, top_k, top_p, min_p)
    mass = torch.where(keep, torch.exp(scaled), 0.0).unflatten(1, (-1, TILE))

    seed = drawing.seed
    seeds = seed if isinstance(seed, Tensor) else philox.split_mix(seed, batch, device)
    token = _race(mass[..., :vocab_size], seeds[rows], position)
    return torch.where(temperature == 0, greedy, token), valid


def _scale(key: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """(key - peak) / T, -inf kept; rows of temperature 0 are left as they are, nobody draws from
    them."""
    divisor = torch.where(temperature > 0, temperature, 1.0)
    scaled = (key - peak[:, None]) / divisor[:, None]
    return torch.where(key == -torch.inf, -torch.inf, scaled)


def _allowed(mask: Tensor, key: Tensor, vocab_size: int) -> Tensor:
    """The mask as bool, shaped like the key; bit s % 32 of word s // 32 where it is packed."""
    if mask.dtype == torch.int32:
        bits = torch.arange(32, dtype=torch.int32, device=mask.device)
        mask = ((mask[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]
    padding = key.shape[1] * key.shape[2] - vocab_size
    return torch.nn.functional.pad(mask, (0, padding)).view_as(key)


def _keep(
    drawing: DrawArguments,
    key: Tensor,
    peak: Tensor,
    scaled: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """What top-k, then top-p, then min-p leave of each row: bool [b, T * TILE]."""
    keep = torch.ones_like(key, dtype=torch.bool)
    use_top_k, use_top_p, _ = drawing.filters()
    if use_top_k or use_top_p:
        ranked = key.sort(descending=True).values
        kth = ranked.gather(1, (top_k.clamp(1, key.shape[1]) - 1)[:, None])
        kth = torch.where(top_k[:, None] > 0, kth, -torch.inf)
        keep = key >= kth
        if use_top_p:
            # int64 sums do not depend on their order, so every backend cuts at the same token.
            mass = (torch.exp(_scale(ranked, peak, temperature)) * _FIXED_POINT).long()
            mass = torch.where(ranked >= kth, mass, 0)
            above = mass.cumsum(1) - mass
            threshold = torch.ceil(top_p * mass.sum(1).double()).long()
            count = (above < threshold[:, None]).sum(1, keepdim=True)
            last = ranked.gather(1, (count - 1).clamp(min=0))
            keep = keep & ((key >= last) | (top_p >= 1)[:, None])
    return keep & (scaled >= torch.log(min_p)[:, None])


def _race(mass: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """argmin of E / mass over tiles, then over the tokens of the winner: mass [b, T, TILE] -> ids
    [b]."""
    tiles = torch.arange(mass.shape[1], dtype=torch.int64, device=mass.device)[None]
    tile = _first(philox.exponential(seed, position, tiles, 0), mass.sum(-1))
    width = mass.shape[2]  # less than a tile only where the vocabulary is
    within = torch.arange(width, dtype=torch.int64, device=mass.device)[None]
    ids = tile[:, None] * TILE + within
    inside = mass.gather(1, tile[:, None, None].expand(-1, 1, width)).squeeze(1)
    return tile * TILE + _first(philox.exponential(seed, position, ids, 1), inside)


def _first(arrival: Tensor, mass: Tensor) -> Tensor:
    """argmin of arrival / mass, [b, K] -> [b]. A mass of 0 never wins, not even against a quotient
    that overflows."""
    quotient = (arrival / mass).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(mass > 0, quotient, torch.inf).argmin(1)
