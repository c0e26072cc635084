"""From log pi* to a token in torch: the filters, and the two-level exponential race (design §3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call.arguments import DrawArguments
from . import philox
from .filters import biased, kept, scaled_key, unpacked
from .mixture import Mixture
from .parameters import row_scalar
from .philox import TILE
from .vocabulary import Vocabulary


class Draw(NamedTuple):
    """A token a row, and the distribution that it was drawn from."""

    token: Tensor  # int64 [b]
    valid: Tensor  # bool [b]: the row's parameters are good and it has a token left
    scaled: Tensor  # float32 [b, T * TILE], log of the mass of tokens that the filters leave
    log_total: Tensor  # float64 [b], log of all mass that they leave
    greedy: Tensor  # bool [b]: temperature 0, the most likely token


def draw(
    drawing: DrawArguments, rows: slice, batch: int, mixture: Mixture, vocabulary: Vocabulary
) -> Draw:
    """Draw one token a row.

    Args:
        drawing: the op's arguments.
        rows: which rows of the batch these are.
        batch: B, the number of rows of the whole batch.
        mixture: of these rows.
    """
    key = mixture.key
    device = key.device

    temperature = row_scalar(drawing.temperature, rows, device, torch.float32)
    top_k = row_scalar(drawing.top_k, rows, device, torch.int64)
    top_p = row_scalar(drawing.top_p, rows, device, torch.float64)
    min_p = row_scalar(drawing.min_p, rows, device, torch.float32)
    position = row_scalar(drawing.position, rows, device, torch.int64)
    valid = (temperature >= 0) & temperature.isfinite() & (top_k >= 0)
    valid = valid & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)

    if drawing.mask is not None:
        mask = unpacked(drawing.mask[rows], vocabulary.count)
        key = torch.where(vocabulary.tiled(mask, False), key, -torch.inf)
    if drawing.bias is not None:
        bias = vocabulary.tiled(drawing.bias[rows], 0.0)
        key, readable = biased(key, bias, mixture.level, vocabulary)
        valid = valid & readable
    flat = key.flatten(1)
    highest, first = flat.max(1)  # the first of equal keys
    changed = drawing.mask is not None or drawing.bias is not None
    peak = vocabulary.largest(highest) if changed else mixture.level
    valid = valid & peak.isfinite()

    scaled = scaled_key(flat, peak, temperature)
    keep = kept(drawing, flat, scaled, top_k, top_p, min_p, vocabulary)
    mass = torch.where(keep, torch.exp(scaled), 0.0).unflatten(1, (-1, TILE))
    by_tile = vocabulary.tile_sums(mass.sum(-1))

    seed = drawing.seed
    seeds = seed if isinstance(seed, Tensor) else philox.split_mix(seed, batch, device)
    arrival, token = _race(mass, by_tile, seeds[rows], position, vocabulary)
    greedy = temperature == 0
    arrival = torch.where(greedy, -highest, arrival)
    token = torch.where(greedy, first + vocabulary.first_tile * TILE, token)
    _, token = vocabulary.least(arrival, token)
    return Draw(token, valid, scaled, by_tile.double().sum(-1).log(), greedy)


def _race(
    mass: Tensor, by_tile: Tensor, seed: Tensor, position: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """argmin of E / mass over tiles, then over the tokens of the winner that are here.

    Args:
        mass: float32 [b, T, TILE] of the tokens here.
        by_tile: float32 [b, all T] of all tiles.

    Returns:
        The winner's E / mass, float32 [b], +inf where none is here, and its id, int64 [b].
    """
    tiles = torch.arange(by_tile.shape[1], dtype=torch.int64, device=mass.device)[None]
    tile = _quotients(philox.exponential(seed, position, tiles, 0), by_tile).argmin(1)
    at, count = tile - vocabulary.first_tile, mass.shape[1]
    place = at.clamp(0, count - 1)[:, None, None].expand(-1, 1, TILE)
    inside = mass.gather(1, place).squeeze(1)
    inside = torch.where(((at >= 0) & (at < count))[:, None], inside, 0.0)
    ids = tile[:, None] * TILE + torch.arange(TILE, dtype=torch.int64, device=mass.device)
    arrival, first = _quotients(philox.exponential(seed, position, ids, 1), inside).min(1)
    return arrival, tile * TILE + first


def _quotients(arrival: Tensor, mass: Tensor) -> Tensor:
    """arrival / mass, [b, K]. A mass of 0 never wins, not even against a quotient that
    overflows."""
    quotient = (arrival / mass).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(mass > 0, quotient, torch.inf)
