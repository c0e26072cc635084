"""The published systems of value-guided decoding, as keyword arguments of `mod_fused.generate`.

    generate(models, prompts, weights=[], **guidance.fudge(classifier))

To mix in policies, give `generate` their weights in place of the empty list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .guide import Guidance
from .scorers import Scorer

Weights = Sequence[float] | Sequence[Sequence[float]] | Tensor


def controlled_decoding(
    scorers: Sequence[Any], strengths: Weights, *, candidates: int | None = None
) -> dict[str, Any]:
    """Tokenwise control pi_ref(z) exp(sum_j lambda_j V_j(x, [y, z])) (arXiv 2310.17022).

    Args:
        scorers: J prefix scorers, dense unless candidates are given.
        strengths: lambda, [J] or [B, J], any sign; 0 is the reference.
        candidates: as in `Guidance`.
    """
    return {"value_fn": Guidance(scorers, candidates=candidates), "value_weights": strengths}


def fudge(
    classifier: Any, *, candidates: int | None = 200, strength: float = 1.0
) -> dict[str, Any]:
    """pi_ref(z) P(attribute | x, [y, z])^strength over the reference's top tokens (arXiv
    2104.05218).

    Args:
        classifier: a dense or scalar scorer whose output is the logit of the attribute.
        candidates: how many tokens to score; the paper takes 200. None scores all, with a dense
            classifier.
        strength: 1 is Bayes' rule.
    """
    guide = Guidance([Scorer(classifier, F.logsigmoid)], candidates=candidates)
    return {"value_fn": guide, "value_weights": [strength]}


def soft_values(
    scorers: Sequence[Any], strengths: Weights | None = None, *, candidates: int | None = None
) -> dict[str, Any]:
    """pi_ref(z) E[exp(beta r) | x, [y, z]]: token by token the policy over whole responses that is
    best for J = E[r] - KL / beta, ref(y) exp(beta r(y)) / Z (Q#, arXiv 2502.20548).

    The scorers are trained with `train_scorer(..., method="soft", beta=beta)`. One scorer at
    strength 1 is exact as far as its values are. These are not:

    - Another strength s is the best policy for neither beta nor s beta: E[exp(beta r)]^s is not
      E[exp(s beta r)] while the reward is uncertain. Train a scorer for each beta.
    - Several scorers add up beta_j r_j only where the rewards are independent given the prefix.
      For J of a weighted sum of rewards train one scorer on that sum.
    - `candidates` leave out the other tokens, which the values still count on.

    Args:
        scorers: J prefix scorers whose outputs are logits, dense unless candidates are given.
        strengths: [J] or [B, J]; None is 1 for each.
        candidates: as in `Guidance`.
    """
    guide = Guidance([Scorer(scorer, F.logsigmoid) for scorer in scorers], candidates=candidates)
    weights = [1.0] * len(scorers) if strengths is None else strengths
    return {"value_fn": guide, "value_weights": weights}


def args(reward_model: Any, *, weight: float, candidates: int | None = 10) -> dict[str, Any]:
    """ARGS (arXiv 2402.01694): log pi_ref(z) + w r(x, [y, z]) over the reference's top tokens.

    With `do_sample=False` this is its greedy form, which takes the largest; else the next token is
    drawn from the softmax, at `temperature`.

    Args:
        reward_model: a scalar or dense scorer whose output is the reward of the text so far.
        weight: w.
        candidates: how many tokens to score; the paper takes 10. None scores all, with a dense
            scorer.
    """
    return controlled_decoding([reward_model], [weight], candidates=candidates)


def rad(reward_model: Any, *, beta: float, candidates: int | None = 20) -> dict[str, Any]:
    """RAD (arXiv 2310.09520): softmax(z + beta r(x, [y, z])) over the reference's top tokens, r
    clamped to [0, 1].

    Args:
        reward_model: a scalar or dense scorer that reads from left to right; its output is the
            reward of the text so far.
        beta: the strength.
        candidates: how many tokens to score. None scores all, with a dense scorer.
    """
    scorer = Scorer(reward_model, lambda reward: reward.clamp(0.0, 1.0))
    return controlled_decoding([scorer], [beta], candidates=candidates)


def pad(
    reward_models: Sequence[Any],
    reward_reference: Any,
    weights: Sequence[float],
    *,
    beta: float,
    candidates: int | None = 10,
) -> dict[str, Any]:
    """PAD (arXiv 2410.04070): pi_ref(z) exp(beta r(z)) over the reference's top tokens, with the
    reward r(z) = sum_k w_k (log pi_k(z) - log pi_0(z)) of language models.

    The values are logits: what they lack to log-probabilities is the same for all tokens of a step
    and cancels. They are rewards of single tokens, so `num_candidates`, which takes the last value
    for that of the whole response, is refused.

    Args:
        reward_models: K causal language models pi_k, one for each preference.
        reward_reference: pi_0, the model that they were tuned from.
        weights: w, [K], of the person.
        beta: the strength.
        candidates: how many tokens to score; the paper takes 10. None scores all.

    Raises:
        ValueError: not one weight for each reward model.
    """
    if len(weights) != len(reward_models):
        raise ValueError(
            f"weights must have one number per reward model ({len(reward_models)}), "
            f"got {len(weights)}"
        )
    strengths = [beta * w for w in weights]
    guide = Guidance([*reward_models, reward_reference], candidates=candidates)
    guide.of_prefixes = False
    return {"value_fn": guide, "value_weights": [*strengths, -sum(strengths)]}


def mavis(
    scorers: Sequence[Any], weights: Weights, *, beta: float, candidates: int | None
) -> dict[str, Any]:
    """pi_ref(z) exp(beta sum_j w_j V_j(x, [y, z])) over the reference's top tokens (arXiv
    2508.13415).

    Args:
        scorers: J value models, one for each objective, trained with `train_mavis`.
        weights: w, [J] or [B, J], each on the simplex.
        beta: the strength with which the value models were trained, positive.
        candidates: how many tokens to score; None: all, for dense value models.

    Raises:
        ValueError: weights off the simplex, or beta not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    w = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if w.ndim not in (1, 2) or bool((w < 0).any()) or bool(((w.sum(-1) - 1).abs() > 1e-6).any()):
        raise ValueError(
            f"weights must be [J] or [B, J], not negative, with sums of 1; got {w.tolist()}"
        )
    return {
        "value_fn": Guidance(scorers, candidates=candidates),
        "value_weights": (beta * w).tolist(),
    }
