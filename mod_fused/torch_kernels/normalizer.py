"""The normaliser of an f-divergence mixture, by bracketed Newton in float32 (design §2).

Everything here works on rows that have already been cut into tiles, shape [B, T, tile]: sums over a
row are sums of tile sums, so that a row's result does not depend on the batch that it sits in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergence import Divergence

MAX_EVALUATIONS = 32
#: Where rounding leaves log G: below it a step only moves tau inside its own rounding error.
TOLERANCE = 1e-6


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last two dimensions: [B, T, tile] -> [B]."""
    return x.sum(-1).sum(-1)


def row_logsumexp(x: Tensor) -> Tensor:
    """log sum exp over a row, float32 [B, T, tile] -> float64 [B]; -inf where every entry is -inf.

    The sum is taken in float32. What it is added to is not: at a peak of 1e4 float32 would lose it.
    """
    peak = x.amax((-2, -1))
    finite = torch.where(peak.isfinite(), peak, 0.0)
    log_sum = torch.log(row_sum(torch.exp(x - finite[:, None, None])))
    return finite.double() + log_sum.double()


def excess_deficit(deficit: Tensor, support: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D = Q - min Q over the support.

    Args:
        deficit: float32 or float64 [B, T, tile], Q; anything off the support.
        support: bool [B, T, tile].

    Returns:
        D, float32 [B, T, tile], 0 off the support; min Q, [B] in the dtype of Q, +inf where the
        support is empty; s*, int64 [B], the first index in the row that reaches it.
    """
    least, best = torch.where(support, deficit, torch.inf).flatten(1).min(-1)
    # Beyond 1e38 the ratio is 0 in float32 anyway, and tau + D must stay finite.
    excess = torch.where(support, deficit - least[:, None, None], 0.0).clamp(max=1e38)
    return excess.float(), least, best


def bracket(
    divergence: Divergence, log_ref: Tensor, excess: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    """The ends [B] between which tau lies, a little widened; see `solve`."""
    log_mass = row_logsumexp(log_ref).float()  # log P
    mean_excess = row_sum(torch.exp(log_ref) * excess) / torch.exp(log_mass)  # E[D]
    log_ref_best = log_ref.flatten(1).gather(1, best[:, None]).squeeze(1)

    upper = divergence.deficit(-log_mass)
    lower = torch.maximum(divergence.deficit(-log_ref_best), upper - mean_excess)
    # When all policies agree the two ends coincide up to rounding, in either order.
    return lower, torch.maximum(upper, lower)


def solve(
    divergence: Divergence,
    log_ref: Tensor,
    excess: Tensor,
    best: Tensor,
    record: dict[str, Any] | None = None,
) -> Tensor:
    """Find tau with G(tau) = sum_s pi_ref(s) H(tau + D(s)) = 1.

    G is convex and decreasing. Newton on q(log G(tau)), which is almost straight, climbs from the
    lower end of

        max(q(-lr(s*)), q(-log P) - E[D]) <= tau <= q(-log P),      s* = argmin Q,

    (one token alone may not exceed 1; Jensen) and a step that leaves the bracket becomes a
    bisection, geometric where tau is known to be positive.

    Args:
        divergence: one with a deficit form (not reverse KL).
        log_ref: float32 [B, T, tile], log pi_ref (normalised over the vocabulary), -inf off the
            support.
        excess: float32 [B, T, tile], D.
        best: int64 [B], s*.
        record: takes the bracket, and the evaluations of G of the slowest row.

    Returns:
        tau: float32 [B]; NaN or meaningless for rows without support.
    """
    lower, upper = bracket(divergence, log_ref, excess, best)
    if record is not None:
        record.update(lower=lower, upper=upper, evaluations=0)
    target = divergence.deficit(torch.zeros_like(lower))  # q at log G = 0
    tau = lower
    done = ~torch.isfinite(lower)
    for _ in range(MAX_EVALUATIONS):
        # On a GPU the test for an early end would wait for the device; there the loop runs its
        # course.
        if tau.device.type == "cpu" and bool(done.all()):
            break
        if record is not None:
            record["evaluations"] += 1
        q = tau[:, None, None] + excess
        log_g = row_logsumexp(log_ref + divergence.log_ratio(q)).float().clamp(-80.0, 80.0)
        log_minus_dg = row_logsumexp(log_ref + divergence.log_slope(q)).float()
        done = done | (log_g.abs() < TOLERANCE)
        lower = torch.where(log_g > 0, torch.maximum(lower, tau), lower)
        upper = torch.where(log_g > 0, upper, torch.minimum(upper, tau))
        q_g = divergence.deficit(log_g)
        newton = tau + (target - q_g) * torch.exp(divergence.log_slope(q_g) - log_minus_dg)
        middle = lower.sqrt() * upper.sqrt() if divergence.bounded else 0.5 * (lower + upper)
        step = torch.where((newton > lower) & (newton < upper), newton, middle)
        done = done | (step == tau) | (newton == tau)
        tau = torch.where(done, tau, step)
    return tau
