"""MAVIS (arXiv 2508.13415): a value model for each objective, improved under its own policy.

The policy pi is proportional to pi_ref exp(beta V) over the reference's most likely tokens. Each
iteration draws roll-outs of the current policy and fits V to the returns of their prefixes: the
reward less the KL spent after the prefix (`losses.kl_returns`). This is soft policy iteration: with
an exact V no iteration lowers E[r] - KL(pi || pi_ref) / beta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..decoding.ensemble import Ensemble
from ..guidance.guide import Guidance
from .scorers import Reward, fit_scorer, rewards_of, roll_out


class Iteration(NamedTuple):
    """Statistics of the roll-outs of one policy, as means over prompts.

    Attributes:
        reward: mean reward.
        kl: mean of log pi - log pi_ref of whole responses, in nats: an estimate of KL(pi || ref).
        objective: reward - kl / beta, what the iterations raise.
        error: standard error of the objective.
    """

    reward: float
    kl: float
    objective: float
    error: float


def train_mavis(
    scorer: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Reward,
    *,
    beta: float,
    iterations: int = 3,
    candidates: int | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    **options: Any,
) -> list[Iteration]:
    """Fit a value model to the reference's roll-outs, then to those of its own tilted policies.

    Args:
        scorer: a dense or scalar scorer, trained in place.
        reference, tokenizer: a causal language model of transformers, and its tokenizer.
        prompts: N strings; each iteration draws one response to each.
        reward: reward(prompt, response), any float.
        beta: strength of the tilt, positive; decode with the same.
        iterations: how often to draw and fit; 1 is the value of the reference alone.
        candidates: K, as in `Guidance`; a scalar scorer needs it.
        max_new_tokens: the longest response.
        seed: of the draws and of the order of training.
        **options: for `training.scorers.fit_scorer`.

    Returns:
        An `Iteration` for each policy, the reference's (restricted to the candidates) first and the
        trained scorer's last: iterations + 1 of them.

    Raises:
        ValueError: beta is not positive and finite, or iterations is below 1.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    models = Ensemble([reference], [tokenizer])
    history: list[Iteration] = []
    for iteration in range(iterations + 1):
        scorer.eval()
        rollouts, texts = roll_out(
            models,
            prompts,
            weights=[],
            value_fn=Guidance([scorer], candidates=candidates),
            value_weights=[beta if iteration else 0.0],
            max_new_tokens=max_new_tokens,
            seed=seed + iteration,
        )
        rewards = rewards_of(reward, prompts, texts)
        kl = rollouts.log_ratios.sum(1).cpu()
        worth = rewards - kl / beta
        error = float(worth.std()) / math.sqrt(len(worth)) if len(worth) > 1 else math.nan
        means = rewards.mean().item(), kl.mean().item(), worth.mean().item()
        history.append(Iteration(*means, error))
        if iteration < iterations:
            fit_scorer(
                scorer, rollouts, rewards, method="mavis", beta=beta, seed=seed + iteration,
                **options,
            )  # fmt: skip
    return history
