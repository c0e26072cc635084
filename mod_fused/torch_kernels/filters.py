"""Mask, bias, temperature, top-k, top-p and min-p in torch (design §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.arguments import DrawArguments
from .vocabulary import WHOLE, Vocabulary

_FIXED_POINT = float(1 << 40)
_DIGIT = 8  # bits
_RADIX = 1 << _DIGIT


def scaled_key(key: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """(key - peak) / T, -inf kept; rows of temperature 0 are left as they are, nobody draws from
    them."""
    divisor = torch.where(temperature > 0, temperature, 1.0)
    scaled = (key - peak[:, None]) / divisor[:, None]
    return torch.where(key == -torch.inf, -torch.inf, scaled)


def unpacked(mask: Tensor, vocab_size: int) -> Tensor:
    """A mask as bool [b, V]; bit s % 32 of word s // 32 where it is packed."""
    if mask.dtype != torch.int32:
        return mask
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]


def biased(
    key: Tensor, bias: Tensor, level: Tensor, vocabulary: Vocabulary = WHOLE
) -> tuple[Tensor, Tensor]:
    """key + bias up to a constant of the row, and which rows [b] of the bias are readable.

    `key` is [b, ...], -inf where a token is excluded; `bias` is shaped like it; `level` [b], the
    row's largest key without the mask.
    """
    bias, left = bias.float().flatten(1), key.flatten(1) > -torch.inf
    highest = torch.where(left, bias, -torch.inf).amax(1)
    highest = torch.where((bias < torch.inf).all(1), highest, torch.nan)
    highest = vocabulary.largest(highest)
    # Both are measured from their largest, so that neither rounds the other away.
    total = (key.flatten(1) - level[:, None]) + (bias - highest[:, None])
    return torch.where(left, total, -torch.inf).view_as(key), ~highest.isnan()


def kept(
    drawing: DrawArguments,
    key: Tensor,
    scaled: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """What top-k, then top-p, then min-p leave of each row: bool like `key` [b, N], and like
    `scaled`, the key less its peak over the temperature."""
    keep = torch.ones_like(key, dtype=torch.bool)
    use_top_k, use_top_p, _ = drawing.filters()
    if use_top_k:
        one = torch.ones((), dtype=torch.int64, device=key.device).expand_as(key)
        kth = _reaching(key, one, top_k.clamp(min=1), vocabulary)
        keep = (key >= kth[:, None]) | (top_k == 0)[:, None]
    if use_top_p:
        # int64 sums do not depend on their order, so every backend cuts at the same token.
        mass = (torch.exp(scaled) * _FIXED_POINT).long()
        mass = torch.where(keep, mass, 0)
        total = vocabulary.add(mass.sum(1))
        last = _reaching(key, mass, torch.ceil(top_p * total.double()).long(), vocabulary)
        keep = keep & ((key >= last[:, None]) | (top_p >= 1)[:, None])
    return keep & (scaled >= torch.log(min_p)[:, None])


def _reaching(key: Tensor, mass: Tensor, target: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The largest x [b] such that the keys from x up have a mass of at least `target` together; the
    least key where all of them have less.

    A search of x digit by digit, highest first, over sums that no order changes.

    Args:
        key: float32 [b, N].
        mass: int64 [b, N], not negative.
        target: int64 [b].
    """
    bits = (key + 0.0).view(torch.int32).long()  # -0.0 is 0.0
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31)  # in the keys' order
    found = torch.zeros_like(target)
    for shift in range(32 - _DIGIT, -1, -_DIGIT):
        digit = (rank >> shift) & (_RADIX - 1)
        alike = (rank >> shift >> _DIGIT) == found[:, None]
        by_digit = mass.new_zeros((len(key), _RADIX))
        by_digit = by_digit.scatter_add(1, digit, torch.where(alike, mass, 0))
        by_digit = vocabulary.add(by_digit)
        from_here = by_digit.flip(1).cumsum(1).flip(1)
        target = torch.minimum(target, from_here[:, 0])
        best = ((from_here >= target[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)
        target = target - (from_here - by_digit).gather(1, best).squeeze(1)
        found = found << _DIGIT | best.squeeze(1)
    bits = found - (1 << 31)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
