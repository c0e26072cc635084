"""MAVIS (arXiv 2508.13415): a value model for each objective, improved under its own policy.

The policy pi is proportional to pi_ref exp(beta V) over the reference's most likely tokens. Each
iteration draws roll-outs of the current policy and fits V to the returns of their prefixes: the
reward less KL / zeta, the KL spent after the prefix (`losses.kl_returns`). With zeta = beta this is
soft policy iteration: with an exact V no iteration lowers J = E[r] - KL(pi || pi_ref) / beta, and
the limit is the best policy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoding.ensemble import Ensemble
from ..decoding.sequences import Rollouts
from ..guidance.guide import Guidance
from .rollouts import Reward, rewards_of, roll_out
from .scorers import fit_scorer


class Iteration(NamedTuple):
    """Statistics of the roll-outs of one policy, as means over prompts.

    Attributes:
        reward: mean reward.
        kl: mean of log pi - log pi_ref of whole responses, in nats: an estimate of KL(pi || ref).
        objective: J = reward - kl / beta, what the iterations raise.
        error: standard error of the objective.
    """

    reward: float
    kl: float
    objective: float
    error: float


class History(NamedTuple):
    """What `train_mavis` did.

    Attributes:
        iterations: of each policy, the reference's (restricted to the candidates) first.
        best: which of them the scorer makes; at least 1.
        stopped: why the iterations ended: "no rise", or "iterations", their upper bound.
    """

    iterations: list[Iteration]
    best: int
    stopped: str


def _standard_error(values: Tensor) -> float:
    """Of the mean of values [N]; NaN for fewer than two."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def train_mavis(
    scorer: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Reward,
    *,
    beta: float,
    zeta: float | None = None,
    iterations: int = 8,
    candidates: int | None = None,
    branches: int = 1,
    block_length: int | None = None,
    held_out_prompts: Sequence[str] = (),
    max_new_tokens: int = 64,
    seed: int = 0,
    **options: Any,
) -> History:
    """Fit a value model to the reference's roll-outs, then to those of its own tilted policies,
    until J = E[r] - KL / beta no longer rises by more than its standard error.

    Args:
        scorer: a dense or scalar scorer, trained in place.
        reference, tokenizer: a causal language model of transformers, and its tokenizer.
        prompts: N strings, to which each policy responds.
        reward: reward(prompt, response), any float.
        beta: strength of the tilt in nats per unit of reward, positive; decode with the same.
        zeta: strength in the value: what follows a prefix is worth its reward less KL / zeta.
            None: beta. Infinity counts no KL.
        iterations: how often to draw and fit at most; 1 is the value of the reference alone.
        candidates: K, as in `Guidance`; a scalar scorer needs it.
        branches, block_length: roll-outs are trees that branch after each block, see
            `rollouts.roll_out`; 1 draws one response to each prompt.
        held_out_prompts: other prompts, to which each policy responds for the early stopping of
            its fit, see `fit_scorer`; none: each fit takes all its steps.
        max_new_tokens: the longest response.
        seed: of the draws and of the order of training.
        **options: for `training.scorers.fit_scorer`.

    Returns:
        The statistics of each policy, with the reason why there are no more. The scorer is that of
        the best policy.

    Raises:
        ValueError: beta is not positive and finite, zeta is not positive, or iterations is
            below 1.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    zeta = beta if zeta is None else zeta
    if not zeta > 0:
        raise ValueError(f"zeta must be positive, got {zeta}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    models = Ensemble([reference], [tokenizer])

    def drawn(texts: Sequence[str], strength: float, seed: int) -> tuple[Rollouts, Tensor]:
        rollouts, responses = roll_out(
            models, texts, weights=[], value_fn=Guidance([scorer], candidates=candidates),
            value_weights=[strength], branches=branches, block_length=block_length,
            max_new_tokens=max_new_tokens, seed=seed,
        )  # fmt: skip
        copies = len(responses) // max(1, len(texts))
        asked = [text for text in texts for _ in range(copies)]
        return rollouts, rewards_of(reward, asked, responses)

    history: list[Iteration] = []
    best, stopped, highest, kept = 1, "iterations", torch.empty(0), scorer.state_dict()
    for iteration in range(iterations + 1):
        scorer.eval()
        strength = beta if iteration else 0.0
        rollouts, rewards = drawn(prompts, strength, seed + iteration)
        kl = rollouts.log_ratios.sum(1).cpu()
        worth = (rewards - kl / beta).view(len(prompts), -1).mean(1)  # a tree's leaves as one
        means = rewards.mean().item(), kl.mean().item(), worth.mean().item()
        history.append(Iteration(*means, _standard_error(worth)))
        if iteration > 1:
            gain = worth - highest  # to the same prompts
            if float(gain.mean()) <= _standard_error(gain):
                stopped = "no rise"
                break
        best, highest, kept = max(1, iteration), worth, copy.deepcopy(scorer.state_dict())
        if iteration < iterations:
            if held_out_prompts:
                options["held_out"] = drawn(held_out_prompts, strength, seed - 1 - iteration)
            fit_scorer(
                scorer, rollouts, rewards, method="mavis", beta=zeta, seed=seed + iteration,
                **options,
            )  # fmt: skip
    scorer.load_state_dict(kept)
    return History(history, best, stopped)
