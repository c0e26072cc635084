"""Estimates from scored answers, each with its 95% interval.

`interval` bootstraps over prompts; the answers to a prompt stay together. All methods are resampled
alike, so the interval of a difference is that of pairs. `over_seeds` gives intervals over
trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import logsumexp, softmax

from mod_fused.reference import f_of, optimum, slope_of, solve_log_ratios

Array = np.ndarray
RESAMPLES = 1000
REWARD_SCALE = 10.0  # `train.PREFERENCE_SCALE` / beta: f' per unit of reward


class Interval(NamedTuple):
    """An estimate with the ends of its 95% interval; in JSON a list."""

    value: float
    low: float
    high: float


def _rounded(*values: float) -> Interval:
    return Interval(*(round(float(x), 5) for x in values))


def interval(estimate: Callable[..., Array], *arrays: Array) -> Interval:
    """An estimate from means over prompts, with its bootstrap interval.

    `estimate` gets the means of `arrays` [N, ...], each as [R, ...], and returns [R].
    """
    n = len(arrays[0])
    drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    shares = np.stack([np.bincount(row, minlength=n) for row in drawn]) / n  # [RESAMPLES, N]
    shares = np.concatenate([np.full((1, n), 1 / n), shares])  # row 0: the sample itself
    value, *values = estimate(*(np.tensordot(shares, x, 1) for x in arrays))
    return _rounded(value, *np.quantile(values, [0.025, 0.975]))


def divergence_of_answers(divergence: str, d: Array) -> Array:
    """Terms whose mean over answers drawn from pi is D_f, also where pi lacks answers of pi_ref.

    They are (f(x) - f(0) (1 - x)) / x at d = log x = log(pi / pi_ref) in nats. Under reverse KL
    they are d, so that at the optimum 10 w r - D_f has no variance but that of the prompts; the
    terms of `reference.divergence_terms` have heavier tails as the KL grows, and miss what pi
    lacks.

    Raises:
        ValueError: f(0) is not finite or not known: reverse_kl and jsd have one.
    """
    if divergence == "reverse_kl":
        return d
    if divergence == "jsd":
        return d - (1.0 + np.exp(-d)) * np.logaddexp(0.0, d) + 2.0 * np.log(2.0)
    raise ValueError(f"divergence must be reverse_kl or jsd, got {divergence!r}")


def mean(x: Array) -> Interval:
    """The mean over prompts of x [N]."""
    return interval(lambda m: m, x)


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean over two or more trainings, with Student's 95% interval of it."""
    center, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return _rounded(center, center - half, center + half)


def lead_at_kl(
    lead: Callable[[Array, Array], Array], reward: Array, kl: Array, curve: Array, curve_kl: Array
) -> Interval | None:
    """`lead(reward, reward of the curve)` at the same mean KL, with its interval; reward and kl are
    [N], the curve's [N, S]. None where the curve's KL does not reach that far."""
    ends = curve_kl.mean(0)
    if not ends.min() <= kl.mean() <= ends.max():
        return None

    def estimate(own: Array, at: Array, rewards: Array, kls: Array) -> Array:
        order = np.argsort(kls, axis=1)  # the curve joins its S points linearly
        x, y = (np.take_along_axis(c, order, 1) for c in (kls, rewards))
        return lead(own, np.array([np.interp(*one) for one in zip(at, x, y, strict=True)]))

    return interval(estimate, reward, kl, curve, curve_kl)


def hypervolume(points: Array) -> float:
    """The area of the unit square below and left of at least one of the points [P, 2]."""
    area, floor = 0.0, 0.0
    for x, y in sorted(points.tolist(), reverse=True):  # from the largest x on
        if y > floor:
            area, floor = area + x * (y - floor), y
    return area


def best_of(rewards: Array, weights: Array, n: int) -> Array:
    """Mean rewards [N, 3] of the best by sum_i w_i r_i among n answers of a pool [N, K, 3].

    It averages over all subsets of n of the K answers. The k-th worst answer is the best one in the
    share C(k-1, n-1) / C(K, n) of them.
    """
    size = rewards.shape[1]
    order = np.argsort(rewards @ weights, axis=1, kind="stable")
    share = np.array([comb(k, n - 1) / comb(size, n) for k in range(size)])
    return np.einsum("k,nkm->nm", share, np.take_along_axis(rewards, order[..., None], axis=1))


def best_of_kl(n: int, p: float | Array = 0.0) -> Array:
    """KL(best-of-n || reference) in nats, estimated from the probability p of what was chosen as
    arXiv 2401.01879 does. At p = 0 it is log n - (n-1)/n, the upper bound."""
    p = np.clip(p, 1e-12, 1.0 - 1e-12)
    missed = (1.0 - p) ** n  # the probability that none of n draws is this one
    rare = np.log(n) + (n - 1) * np.log1p(-p) - (n - 1) / n
    return missed * rare + (1.0 - missed) * np.log((1.0 - missed) / p)


def same_reward_n(reward: Array, best: Array, sizes: Sequence[int]) -> Interval | None:
    """The N at which best-of-N has the same mean reward, with its interval; reward is [N], that of
    best-of-n [N, S] for the S `sizes`. None beyond the largest size."""
    if reward.mean() > best.mean(0)[-1]:
        return None

    def estimate(own: Array, curve: Array) -> Array:
        rows = zip(own, curve, strict=True)
        return np.exp([np.interp(x, np.maximum.accumulate(y), np.log(sizes)) for x, y in rows])

    return interval(estimate, reward, best)


def reweighted(rewards: Array, weights: Array, divergence: str) -> tuple[Array, Array]:
    """The optimum for the mixed reward on a pool [N, K, 3]: its rewards [N, 3] and divergences [N].

    The pool stands for the reference, uniform on its K answers. No log-ratio can exceed log K nats,
    so the estimate errs towards less reward.
    """
    size = rewards.shape[1]
    log_ref = np.full(size, -np.log(size))
    tilts = REWARD_SCALE * (rewards @ weights)
    log_x = np.stack([optimum(divergence, log_ref, tilt) for tilt in tilts]) + np.log(size)
    return (np.exp(log_x)[..., None] * rewards).mean(1), f_of(divergence)(log_x).mean(1)


def resampling_weights(divergence: str, weights: Array, log_ratios: Array, kl: Array) -> Array:
    """The weights [n] of n answers to a prompt, towards the optimum of whole answers, by the
    oracle: what `generate(..., num_candidates=n)` chooses by.

    Args:
        divergence: a name.
        weights: [M], w.
        log_ratios: [n, M], log pi_i - log pi_ref of each answer.
        kl: [n], log q - log pi_ref, where q is what it was drawn from.
    """
    slope = slope_of(divergence)
    if slope is None:
        return softmax(log_ratios @ weights - kl)
    log_base = -kl - np.log(len(kl))
    u = slope.slope(np.maximum(log_ratios, -300.0)) @ weights  # no overflow; it weighs nothing
    return softmax(log_base + solve_log_ratios(log_base, u, slope))


def at_random(values: Array, log_ratios: Array, weights: Array) -> Array:
    """Means [3] of answering with policy i with probability w_i.

    Args:
        values: [M, N, 3], weighted reward, KL and J of each policy's own answers.
        log_ratios: [M, N, M], log pi_j - log pi_ref of these answers: they give the log-ratio of
            the answer to be drawn at all, which counts in place of the policy's own.
        weights: [M], w on the simplex.
    """
    with np.errstate(divide="ignore"):
        kl = logsumexp(np.log(weights) + log_ratios, axis=2)
    every = np.stack([values[..., 0], kl, REWARD_SCALE * values[..., 0] - kl], axis=2)
    return weights @ every.mean(1)


def routed(
    topics: Sequence[Any], known: Array, asked: Sequence[Any], values: Array, by: int
) -> Array:
    """Means [3] of answering each prompt with the model that was best on its topic.

    Args:
        topics: of the N prompts on which models are chosen.
        known: [models, N, 3], what `values` holds, of the answers to them.
        asked: the topics of the K prompts to answer; one that is not known has the best of all.
        values: [models, K, 3].
        by: the column to choose by.
    """
    chosen = []
    for topic in asked:
        same = [topic == t for t in topics]
        chosen.append(known[:, same if any(same) else slice(None), by].mean(1).argmax())
    return values[chosen, range(len(asked))].mean(0)
