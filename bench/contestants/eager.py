"""Plain eager torch, as the formula is usually coded: f' and its inverse on full tensors, and the
normaliser by bisection.

Off reverse KL this is inaccurate in float32, because Z lies within rounding of a pole of the
inverse. It is here for its time; the runner reports its distance from the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BISECTIONS = 32


def _lambert(y: Tensor) -> Tensor:
    """x with log x - 1/x + 1 = y, by Newton on v = 1/x in logarithms: v + log v = 1 - y."""
    z = 1.0 - y
    log_v = torch.where(z > 1.0, z.clamp(min=1.0).log(), z)
    for _ in range(3):
        v = log_v.exp()
        log_v = log_v - (v + log_v - z) / (1.0 + v)
    return torch.exp(-log_v)


def slopes(divergence: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """f' and its inverse, both elementwise on ratios."""
    if divergence == "forward_kl":
        return (lambda x: -1.0 / x), (lambda y: -1.0 / y)
    if divergence == "jsd":
        return (
            lambda x: math.log(2.0) + torch.log(x / (1.0 + x)),
            lambda y: 1.0 / (2.0 * torch.exp(-y) - 1.0),
        )
    if divergence.startswith("alpha:"):
        a = float(divergence.removeprefix("alpha:"))
        return (lambda x: (1.0 - x**-a) / a), (lambda y: (1.0 - a * y) ** (-1.0 / a))
    if divergence == "jeffrey":
        return (lambda x: torch.log(x) - 1.0 / x + 1.0), _lambert
    raise ValueError(f"no f' for divergence {divergence!r}")


def probabilities(logits: Sequence[Tensor], weights: Sequence[float], divergence: str) -> Tensor:
    """pi* of logits [B, V] (reference first): float32 [B, V]."""
    log_ref, *log_policies = [torch.log_softmax(x.float(), -1) for x in logits]
    if divergence == "reverse_kl":
        total = (1.0 - sum(weights)) * log_ref
        for w, log_policy in zip(weights, log_policies, strict=True):
            total = total + w * log_policy
        return torch.softmax(total, -1)
    slope, inverse = slopes(divergence)
    ref = log_ref.exp()
    u = torch.zeros_like(ref)
    for w, log_policy in zip(weights, log_policies, strict=True):
        u = u + w * slope(torch.exp(log_policy - log_ref))
    peak, best = u.max(-1, keepdim=True)
    low = peak - slope(1.0 / ref.gather(-1, best))  # the best token's probability is 1
    high = peak - slope(torch.ones_like(peak))  # at high every ratio is at most 1
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        over = (ref * inverse(u - middle)).sum(-1, keepdim=True) > 1.0
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    mass = ref * inverse(u - high)
    return mass / mass.sum(-1, keepdim=True)


def sample(
    logits: Sequence[Tensor], weights: Sequence[float], divergence: str
) -> tuple[Tensor, Tensor]:
    """A token of each row [B] and its log-probability [B]."""
    probs = probabilities(logits, weights, divergence)
    token = torch.multinomial(probs, 1)
    return token.squeeze(-1), probs.gather(-1, token).log().squeeze(-1)
