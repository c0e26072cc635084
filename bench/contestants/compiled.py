"""Our algorithm in plain torch for torch.compile: log-sum-exps, deficits, a fixed number of Newton
steps for tau, masses, and the race over tiles, then within the winning tile (docs/concepts.md)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mod_fused.divergence import Divergence, ReverseKL, get_divergence

from ..measure import Call
from ..problem import Problem

#: The backend of torch.compile; "eager" only traces, for the dry run of the GPU check.
COMPILER = os.environ.get("MOD_FUSED_BENCH_COMPILER", "inductor")
NEWTON_STEPS = 5
TILE = 256  # divides the usual vocabularies (32000, 128256, 262144), so that no row is padded


def _kernel(divergence: Divergence, tau: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """H(tau + D) and -H'(tau + D) in few operations. D is a token's excess, its deficit less the
    least one; for jsd `excess` is expm1(D)."""
    if divergence.name == "forward_kl":
        r = 1.0 / (tau + excess)
        return r, r * r
    if divergence.name == "jsd":  # 1 / expm1(tau + D) from e^-tau and expm1(D)
        r = torch.exp(-tau) / (excess - torch.expm1(-tau))
        return r, r + r * r
    if divergence.name == "alpha:0.5":
        r = 2.0 / (tau + excess)
        return r * r, r * r * r
    x = torch.exp(divergence.log_ratio(tau + excess))  # Jeffrey
    return x, x * x / (1.0 + x)


def masses(logits: Sequence[Tensor], weights: Sequence[float], divergence: Divergence) -> Tensor:
    """pi* up to a constant of the row, of logits [B, V] (reference first): float32 [B, V]."""
    ref, *policies = [x.float() for x in logits]
    if isinstance(divergence, ReverseKL):
        key = (1.0 - sum(weights)) * ref
        for w, x in zip(weights, policies, strict=True):
            key = key + w * x
        return torch.exp(key - key.amax(-1, keepdim=True))

    ref_norm = torch.logsumexp(ref, -1, keepdim=True)
    log_ref = ref - ref_norm
    deficit = torch.zeros_like(ref)
    for w, x in zip(weights, policies, strict=True):
        d = (x - ref) + (ref_norm - torch.logsumexp(x, -1, keepdim=True))
        deficit = deficit + w * divergence.deficit(d.clamp(min=-80.0) if divergence.clamped else d)
    least, best = deficit.min(-1, keepdim=True)
    excess = deficit - least
    p = torch.exp(log_ref)

    zero = torch.zeros_like(least)
    upper = divergence.deficit(zero)
    alone = divergence.deficit(-log_ref.gather(-1, best))
    tau = torch.maximum(alone, upper - (p * excess).sum(-1, keepdim=True))
    tau = tau * (1.0 - 1e-4) if divergence.bounded else tau - 1e-4
    if divergence.name == "jsd":
        excess = torch.expm1(excess.clamp(max=80.0))
    for _ in range(NEWTON_STEPS):  # Newton on q(log G), as in mod_fused.torch_kernels.normalizer
        h, slope = _kernel(divergence, tau, excess)
        log_g = (p * h).sum(-1, keepdim=True).log()
        q = divergence.deficit(log_g)
        step = (upper - q) * torch.exp(divergence.log_slope(q))
        tau = tau + step / (p * slope).sum(-1, keepdim=True)
    return p * _kernel(divergence, tau, excess)[0]


def tiled(mass: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row by the two-level race, and the mass of the row."""
    if mass.shape[1] % TILE:
        raise ValueError(f"expected a vocabulary divisible by {TILE}, got {mass.shape[1]}")
    tiles = mass.unflatten(1, (-1, TILE))
    sums = tiles.sum(-1)
    tile = (sums / torch.empty_like(sums).exponential_()).argmax(-1)
    inside = tiles.gather(1, tile[:, None, None].expand(-1, 1, TILE)).squeeze(1)
    within = (inside / torch.empty_like(inside).exponential_()).argmax(-1)
    return tile * TILE + within, sums.sum(-1)


def sampler(
    divergence: str,
) -> Callable[[Sequence[Tensor], Sequence[float]], tuple[Tensor, Tensor]]:
    """The function to compile: (logits, weights) -> the rows' tokens [B], log-probabilities [B]."""
    chosen = get_divergence(divergence)

    def sample(logits: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        mass = masses(logits, weights, chosen)
        token, total = tiled(mass)
        return token, torch.log(mass.gather(-1, token[:, None]).squeeze(-1) / total)

    return sample


_graph_of: tuple[object, ...] | None = None


@functools.cache
def _compiled(divergence: str) -> Callable[..., object]:
    return torch.compile(sampler(divergence), fullgraph=True, backend=COMPILER)


def build(problem: Problem, logits: list[Tensor]) -> Call:
    """The compiled call. One graph serves all vocabularies, and all batches above 1: it was
    measured to be as fast as one per shape."""
    global _graph_of
    graph = (problem.divergence, problem.dtype, problem.threads, problem.batch == 1)
    if graph != _graph_of:
        torch._dynamo.reset()
        _compiled.cache_clear()
        _graph_of = graph
    for x in logits:
        torch._dynamo.mark_dynamic(x, 1)
        if problem.batch > 1:
            torch._dynamo.mark_dynamic(x, 0)
    return functools.partial(_compiled(problem.divergence), logits, problem.weights)
