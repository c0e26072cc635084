"""From log pi* to a token in torch: the filters, and the two-level exponential race (design §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.arguments import DrawArguments
from . import philox
from .filters import allowed, biased, kept, scaled_key
from .parameters import row_scalar
from .philox import TILE


def draw(
    drawing: DrawArguments, rows: slice, batch: int, key: Tensor, level: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row.

    Args:
        drawing: the op's arguments.
        rows: which rows of the batch these are.
        batch: B, the number of rows of the whole batch.
        key: float32 [b, T, TILE], log pi* up to a constant of the row, -inf where it is 0.
        level: float32 [b], the largest key.
        vocab_size: V; entries from V on are padding.

    Returns:
        token ids int64 [b]; float32 [b], the log of the probability with which each was drawn; and
        bool [b]: whether the row's parameters are good and it has a token left.
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
        key = torch.where(allowed(drawing.mask[rows], key, vocab_size), key, -torch.inf)
    if drawing.bias is not None:
        key, readable = biased(key, drawing.bias[rows], level)
        valid = valid & readable
    flat = key.flatten(1)
    peak, greedy = flat.max(1)  # the first of equal keys
    valid = valid & peak.isfinite()

    scaled = scaled_key(flat, peak, temperature)
    keep = kept(drawing, flat, peak, scaled, temperature, top_k, top_p, min_p)
    mass = torch.where(keep, torch.exp(scaled), 0.0).unflatten(1, (-1, TILE))

    seed = drawing.seed
    seeds = seed if isinstance(seed, Tensor) else philox.split_mix(seed, batch, device)
    token = _race(mass[..., :vocab_size], seeds[rows], position)
    token = torch.where(temperature == 0, greedy, token)
    log_mass = scaled.gather(1, token[:, None]).squeeze(1)
    proposal = (log_mass - mass.sum(-1).double().sum(-1).log()).clamp(max=0.0)
    return token, torch.where(temperature == 0, 0.0, proposal).float(), valid


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
