"""Training of scorers for any Hugging Face reference and any reward of a prompt and a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoding.sequences import Rollouts, take
from ..guidance.scorers import Scorer, outputs, prefix_values, taken
from .early_stopping import EarlyStopping, quarter_correlations
from .fitting import fit, shuffled
from .losses import attribute_loss, check_td_lambda, kl_returns, q_targets, soft_labels, value_loss
from .rollouts import Reward, alone, rewards_of, roll_out

METHODS = ("cd_fudge", "cd_q", "fudge", "soft", "mavis")
CHECK_EVERY = 25  # steps between two checks on held-out roll-outs
TD_LAMBDA = 0.9


class Fit(NamedTuple):
    """What a training did.

    Attributes:
        losses: the loss of every step.
        correlations: with held-out roll-outs, (number of steps, correlation of the values with the
            targets in each quarter of the responses) of every check; else empty.
        best: the number of steps whose parameters the scorer has.
    """

    losses: list[float]
    correlations: list[tuple[int, list[float]]]
    best: int


@dataclass(frozen=True)
class Task:
    """What a scorer learns from roll-outs: a method and what it needs, as in `fit_scorer`."""

    method: str = "cd_fudge"
    reference: Any = None
    beta: float | None = None
    td_lambda: float = TD_LAMBDA
    highest: float = 0.0  # for soft, the largest reward

    def check(self, scorer: Any) -> None:
        """Raises ValueError for an unknown method, or one without an argument that it needs."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "cd_q" and (self.reference is None or not Scorer(scorer).dense):
            raise ValueError("cd_q needs a reference and a dense scorer: it sums over next tokens")
        check_td_lambda(self.td_lambda)
        if (self.method in ("soft", "mavis")) != (self.beta is not None):
            raise ValueError(
                f"beta is for soft and mavis, which need it; got {self.beta} for {self.method}"
            )

    def targets(self, rows: Rollouts, rewards: Tensor) -> Tensor:
        """What the outputs are regressed on, [N] or [N, L-1]; for cd_q where lambda is 1."""
        if self.method == "soft":
            assert self.beta is not None
            return soft_labels(rewards, self.beta, self.highest)
        if self.method == "mavis":
            assert self.beta is not None
            mask = rows.response_mask[:, 1:]
            return kl_returns(rewards, rows.log_ratios[:, 1:], mask, self.beta)
        return rewards

    def loss(self, scorer: Any, rows: Rollouts, rewards: Tensor) -> Tensor:
        """The loss of one batch of roll-outs, a scalar."""
        mask = rows.response_mask[:, 1:].float()
        if self.method == "cd_q":
            values = outputs(scorer, rows)[:, :-1].float()
            with torch.no_grad():
                ref_logprobs = outputs(self.reference, rows)[:, :-1].float().log_softmax(-1)
            width = min(values.shape[-1], ref_logprobs.shape[-1])  # one vocabulary may be padded
            targets = q_targets(
                values[..., :width], ref_logprobs[..., :width], rewards, mask, self.td_lambda
            )
            return value_loss(taken(values, rows.ids[:, 1:]), targets, mask)
        values = prefix_values(scorer, rows).float()
        loss = attribute_loss if self.method in ("fudge", "soft") else value_loss
        return loss(values, self.targets(rows, rewards), mask)

    @torch.no_grad()
    def correlations(
        self, scorer: Any, rollouts: Rollouts, rewards: Tensor, batch_size: int
    ) -> list[float]:
        """`quarter_correlations` of what the scorer predicts, a probability for fudge and soft,
        and the targets."""
        targets = self.targets(rollouts, rewards)
        if targets.ndim == 1:
            targets = targets[:, None].expand(-1, rollouts.ids.shape[1] - 1)
        parts = torch.arange(len(rewards), device=targets.device).split(batch_size)
        rows = (Rollouts(*(tensor[index] for tensor in rollouts)) for index in parts)
        values = torch.cat([prefix_values(scorer, part).float() for part in rows])
        if self.method in ("fudge", "soft"):
            values = values.sigmoid()
        return quarter_correlations(values, targets, rollouts.response_mask[:, 1:])


def _checked(rewards: Tensor, rollouts: Rollouts, what: str) -> Tensor:
    """The rewards, where the roll-outs are."""
    count = len(rollouts.ids)
    if rewards.shape != (count,) or not bool(rewards.isfinite().all()):
        raise ValueError(
            f"{what} must be {count} finite numbers, one per roll-out, "
            f"got shape {list(rewards.shape)}"
        )
    return rewards.to(rollouts.ids.device)


def fit_scorer(
    scorer: Any,
    rollouts: Rollouts,
    rewards: Tensor,
    *,
    method: str = "cd_fudge",
    reference: Any = None,
    beta: float | None = None,
    td_lambda: float = TD_LAMBDA,
    held_out: tuple[Rollouts, Tensor] | None = None,
    check_every: int = CHECK_EVERY,
    patience: int = 4,
    steps: int = 600,
    batch_size: int = 64,
    peak_lr: float = 1e-3,
    seed: int = 0,
    label: str | None = None,
) -> Fit:
    """Fit a scorer to roll-outs, in place.

    Args:
        scorer: a causal language model (dense), or a token classifier with one label (scalar).
        rollouts: N responses of the reference; for MAVIS, of the policy to improve.
        rewards: float [N], their rewards; for FUDGE 1 for the attribute, else 0.
        method: what the scorer learns of each prefix:
            "cd_fudge": the mean reward of the responses through it (arXiv 2310.17022).
            "cd_q": the same, partly from its own values of longer prefixes (same paper).
            "fudge": the logit that they have the attribute; decode with `guidance.fudge` (arXiv
                2104.05218).
            "soft": the logit of E[exp(beta (r - max r))]; decode with `guidance.soft_values`, which
                is exact for J = E[r] - KL / beta (arXiv 2502.20548).
            "mavis": the mean reward less KL / beta of what follows (arXiv 2508.13415).
        reference: the model that drew the roll-outs; cd_q takes expectations under it.
        beta: for soft and mavis, the strength, in nats per unit of reward.
        td_lambda: for cd_q, see `losses.q_targets`: 0 learns from its own values alone, 1 is
            cd_fudge.
        held_out: roll-outs of other prompts and their rewards. Every `check_every` steps the values
            are correlated with their targets, by quarter of the response. Training ends when the
            mean of the four has not risen for `patience` checks; the scorer keeps the parameters
            of its best check. None: it trains for all steps.
        check_every, patience: see held_out.
        steps: the most steps.
        batch_size, peak_lr: AdamW with warm-up and cosine decay.
        seed: of the order of the roll-outs, and of dropout.
        label: what to call the scorer when printing the loss; None prints nothing.

    Returns:
        The losses, the correlations, and the step of the parameters.

    Raises:
        ValueError: an unknown method, a method without an argument that it needs, or rewards of a
            wrong shape. Or the values never predicted the held-out rewards better than chance, by
            more than two standard errors: no scorer is left untrained. Its parameters are then
            those that it came with.
    """
    rewards = _checked(rewards, rollouts, "rewards")
    highest = float(rewards.max()) if len(rewards) else 0.0
    task = Task(method, reference, beta, td_lambda, highest)
    task.check(scorer)
    task.targets(rollouts, rewards)  # refuses a beta that is not positive
    for name, value in (("steps", steps), ("check_every", check_every), ("patience", patience)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    stopping = None
    if held_out is not None:
        others, outcomes = held_out
        outcomes = _checked(outcomes, others, "held-out rewards")
        if not bool((outcomes != outcomes[:1]).any()):
            raise ValueError("held-out rewards are all equal: no value can predict them")
        stopping = EarlyStopping(
            scorer, lambda: task.correlations(scorer, others, outcomes, batch_size),
            len(outcomes), every=check_every, steps=steps, patience=patience,
        )  # fmt: skip
    order = shuffled(len(rewards), steps * batch_size, seed).to(rewards.device)

    def loss_at(step: int) -> Tensor:
        index = order[step * batch_size : (step + 1) * batch_size]
        return task.loss(scorer, take(rollouts, index), rewards[index])

    device = rewards.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of dropout
        stop_after = None if stopping is None else stopping.stop_after
        losses = fit(scorer, steps, peak_lr, loss_at, label, stop_after)
    if stopping is None:
        return Fit(losses, [], steps)
    stopping.finish()
    return Fit(losses, stopping.history, stopping.best)


def train_scorer(
    scorer: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Reward,
    *,
    method: str = "cd_fudge",
    held_out_prompts: Sequence[str] = (),
    max_new_tokens: int = 64,
    seed: int = 0,
    **options: Any,
) -> Fit:
    """Draw one response of the reference to each prompt, reward it, and fit the scorer in place.

    Args:
        scorer, method: see `fit_scorer`; for method "mavis" use `train_mavis`.
        reference, tokenizer: a causal language model of transformers, and its tokenizer.
        prompts: N strings; repeat one to draw several responses to it.
        reward: reward(prompt, response), any float.
        held_out_prompts: other prompts, for early stopping; none: training takes all its steps.
        max_new_tokens: the longest response.
        seed: of the draws and of the order of training.
        **options: for `fit_scorer`.

    Returns:
        As `fit_scorer`.
    """

    def drawn(texts: Sequence[str], seed: int) -> tuple[Rollouts, Tensor]:
        rollouts, responses = roll_out(
            alone(reference, tokenizer), texts, weights=[1.0], max_new_tokens=max_new_tokens,
            seed=seed,
        )  # fmt: skip
        return rollouts, rewards_of(reward, texts, responses)

    if held_out_prompts:
        options["held_out"] = drawn(held_out_prompts, seed + len(prompts))
    return fit_scorer(
        scorer, *drawn(prompts, seed), method=method, reference=reference, seed=seed, **options
    )
