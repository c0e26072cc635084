"""The normaliser of an f-divergence mixture, by bracketed Newton in float32 (design §2).

Everything here works on rows that have already been cut into tiles, shape [B, T, tile]: sums over a
row are sums of tile sums, so that a row's result does not depend on the batch that it sits in. A
row may go on in other processes: `vocabulary` adds up what all have (vocabulary.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..divergence import Divergence
from .vocabulary import WHOLE, Vocabulary

MAX_EVALUATIONS = 32
#: Where rounding leaves log G: below it a step only moves tau inside its own rounding error.
TOLERANCE = 1e-6


def levels_and_log_sums(
    rows: Sequence[Tensor], vocabulary: Vocabulary = WHOLE
) -> tuple[list[Tensor], list[Tensor]]:
    """log sum exp over rows, in two parts: beside a level of 1e17 float64 would lose the other.

    Args:
        rows: n times float32 or float64 [B, T, tile], of one dtype.

    Returns:
        n levels [B], the rows' largest entries; n logs of the sums of exp(x - level), float64 [B].
        Of a row without a finite level the sum is taken from 0: -inf where every entry is -inf.
    """
    # Each tile from its own peak, so that processes exchange peaks and sums at the same time.
    peaks = torch.stack([x.amax(-1) for x in rows])
    bases = torch.where(peaks.isfinite(), peaks, 0.0)
    sums = [torch.exp(x - base[..., None]).sum(-1) for x, base in zip(rows, bases, strict=True)]
    peaks, totals = vocabulary.tile_log_sums(peaks, torch.stack(sums))
    levels = peaks.amax(-1)
    base = torch.where(levels.isfinite(), levels, 0.0)
    log_sums = torch.log((totals * torch.exp(peaks - base[..., None])).sum(-1)).double()
    return list(levels.unbind()), list(log_sums.unbind())


def row_logsumexps(rows: Sequence[Tensor], vocabulary: Vocabulary = WHOLE) -> list[Tensor]:
    """log sum exp over rows, n times [B, T, tile] -> n times float64 [B]; -inf where every entry is
    -inf.

    The sums have the rows' dtype. What they are added to has not: at a level of 1e4 float32 would
    lose them.
    """
    return [
        torch.where(level.isfinite(), level, 0.0).double() + log_sum
        for level, log_sum in zip(*levels_and_log_sums(rows, vocabulary), strict=True)
    ]


def excess_deficit(
    deficit: Tensor, log_ref: Tensor, support: Tensor, vocabulary: Vocabulary = WHOLE
) -> tuple[Tensor, Tensor, Tensor]:
    """D = Q - min Q over the support.

    Args:
        deficit: float32 or float64 [B, T, tile], Q; anything off the support.
        log_ref: float32 [B, T, tile], log pi_ref, -inf off the support.
        support: bool [B, T, tile].

    Returns:
        D, float32 [B, T, tile], 0 off the support; min Q, [B] in the dtype of Q, +inf where the
        support is empty; log pi_ref(s*), [B], of the first token s* of the row that reaches it.
    """
    least, best = torch.where(support, deficit, torch.inf).flatten(1).min(-1)
    log_ref_best = log_ref.flatten(1).gather(1, best[:, None]).squeeze(1)
    least, log_ref_best = vocabulary.least(least, log_ref_best)
    # Beyond 1e38 the ratio is 0 in float32 anyway, and tau + D must stay finite.
    excess = torch.where(support, deficit - least[:, None, None], 0.0).clamp(max=1e38)
    return excess.float(), least, log_ref_best


def bracket(
    divergence: Divergence,
    log_ref: Tensor,
    excess: Tensor,
    log_ref_best: Tensor,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor]:
    """The ends [B] between which tau lies, a little widened; see `solve`."""
    terms = log_ref, log_ref + torch.log(excess)
    log_mass, weighted = row_logsumexps(terms, vocabulary)
    mean_excess = torch.exp(weighted - log_mass).to(log_ref.dtype)  # E[D]
    log_mass = log_mass.float()  # log P

    upper = divergence.deficit(-log_mass)
    lower = torch.maximum(divergence.deficit(-log_ref_best), upper - mean_excess)
    # When all policies agree the two ends coincide up to rounding, in either order.
    return lower, torch.maximum(upper, lower)


def solve(
    divergence: Divergence,
    log_ref: Tensor,
    excess: Tensor,
    log_ref_best: Tensor,
    record: dict[str, Any] | None = None,
    vocabulary: Vocabulary = WHOLE,
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
        log_ref_best: float32 [B], log pi_ref(s*).
        record: takes the bracket, and the evaluations of G of the slowest row.

    Returns:
        tau: float32 [B]; NaN or meaningless for rows without support.
    """
    lower, upper = bracket(divergence, log_ref, excess, log_ref_best, vocabulary)
    if record is not None:
        record.update(lower=lower, upper=upper, evaluations=0)
    target = divergence.deficit(torch.zeros_like(lower))  # q at log G = 0
    tau = lower
    done = ~torch.isfinite(lower)
    for _ in range(MAX_EVALUATIONS):
        # On a GPU the test for an early end would wait for the device; there the loop runs its
        # course, unless every evaluation is a collective.
        if (vocabulary.waits or tau.device.type == "cpu") and bool(done.all()):
            break
        if record is not None:
            record["evaluations"] += 1
        q = tau[:, None, None] + excess
        terms = log_ref + divergence.log_ratio(q), log_ref + divergence.log_slope(q)
        log_g, log_minus_dg = (x.float() for x in row_logsumexps(terms, vocabulary))
        log_g = log_g.clamp(-80.0, 80.0)
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
