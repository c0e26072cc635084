"""Mask, bias, temperature, top-k, top-p and min-p in torch (design §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.arguments import DrawArguments

_FIXED_POINT = float(1 << 40)


def scaled_key(key: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """(key - peak) / T, -inf kept; rows of temperature 0 are left as they are, nobody draws from
    them."""
    divisor = torch.where(temperature > 0, temperature, 1.0)
    scaled = (key - peak[:, None]) / divisor[:, None]
    return torch.where(key == -torch.inf, -torch.inf, scaled)


def allowed(mask: Tensor, key: Tensor, vocab_size: int) -> Tensor:
    """The mask as bool, shaped like the key; bit s % 32 of word s // 32 where it is packed."""
    if mask.dtype == torch.int32:
        bits = torch.arange(32, dtype=torch.int32, device=mask.device)
        mask = ((mask[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]
    padding = key.shape[1] * key.shape[2] - vocab_size
    return torch.nn.functional.pad(mask, (0, padding)).view_as(key)


def biased(key: Tensor, bias: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """key + bias up to a constant of the row, and which rows [b] of the bias are readable.

    `key` is [b, T, TILE], -inf where a token is excluded; `bias` [b, V]; `level` [b], the row's
    largest key without the mask.
    """
    padded = torch.nn.functional.pad(bias.float(), (0, key[0].numel() - bias.shape[1]))
    padded, left = padded.view_as(key), key > -torch.inf
    highest = torch.where(left, padded, -torch.inf).amax((-2, -1), keepdim=True)
    # Both are measured from their largest, so that neither rounds the other away.
    total = (key - level[:, None, None]) + (padded - highest)
    return torch.where(left, total, -torch.inf), (bias < torch.inf).all(1)


def kept(
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
            mass = (torch.exp(scaled_key(ranked, peak, temperature)) * _FIXED_POINT).long()
            mass = torch.where(ranked >= kth, mass, 0)
            above = mass.cumsum(1) - mass
            threshold = torch.ceil(top_p * mass.sum(1).double()).long()
            count = (above < threshold[:, None]).sum(1, keepdim=True)
            last = ranked.gather(1, (count - 1).clamp(min=0))
            keep = keep & ((key >= last) | (top_p >= 1)[:, None])
    return keep & (scaled >= torch.log(min_p)[:, None])
