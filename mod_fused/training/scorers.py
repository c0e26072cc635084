"""Training of scorers for any Hugging Face reference and any reward of a prompt and a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.ensemble import Ensemble
from ..decoding.generate import generate
from ..decoding.sequences import Rollouts, take
from ..guidance.blockwise import Reward
from ..guidance.scorers import Scorer, outputs, prefix_values, taken
from ..torch_kernels.philox import split_mix
from .fitting import fit, shuffled
from .losses import attribute_loss, kl_returns, q_targets, value_loss

METHODS = ("cd_fudge", "cd_q", "fudge", "mavis")


def alone(model: Any, tokenizer: Any) -> Ensemble:
    """The model by itself, as an ensemble to draw from with weights [1]."""
    return Ensemble([None, model], [None, tokenizer])


def roll_out(
    ensemble: Ensemble,
    prompts: Sequence[str],
    *,
    weights: Any,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 512,
    **options: Any,
) -> tuple[Rollouts, list[str]]:
    """One response to each of the N prompts, drawn with `mod_fused.generate`.

    Args:
        ensemble, weights, max_new_tokens, **options: for `generate`.
        prompts: N strings.
        seed: prompt n has the row seed SplitMix64(seed + n), whatever batch_size is.
        batch_size: responses drawn at the same time.

    Returns:
        The sequences, left-padded, with the log-ratios of their tokens to the ensemble's first
        model, and the N responses as text.

    Raises:
        ValueError: a step of a response was invalid.
    """
    (ids, *_), (mask, *_) = ensemble.encode(list(prompts))
    mask = torch.ones_like(ids) if mask is None else mask
    seeds = split_mix(seed, len(ids), ids.device)
    width = ids.shape[1]
    tokens = F.pad(ids, (0, max_new_tokens), value=ensemble.pad_token_id)
    response = torch.zeros_like(tokens)
    log_ratios = torch.zeros(tokens.shape, dtype=torch.float32, device=ids.device)
    texts: list[str] = []
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        out = generate(
            ensemble,
            input_ids=ids[rows],
            attention_mask=mask[rows],
            weights=weights,
            max_new_tokens=max_new_tokens,
            seed=seeds[rows],
            return_model_logprobs=True,
            **options,
        )
        if not out.valid.all():
            bad = start + int((~out.valid).nonzero()[0])
            raise ValueError(f"the response to prompt {bad} has an invalid step")
        drawn = slice(width, width + out.tokens.shape[1])
        tokens[rows, drawn] = out.tokens
        place = torch.arange(out.tokens.shape[1], device=ids.device)
        response[rows, drawn] = (place < out.lengths[:, None]).long()
        assert out.model_logprobs is not None and out.texts is not None
        log_ratios[rows, drawn] = out.logprobs - out.model_logprobs[..., 0]
        texts += out.texts
    attention = torch.cat([mask, response[:, width:]], dim=1)
    return Rollouts(tokens, attention, response, log_ratios), texts


def rewards_of(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """reward(prompt, response) of every pair, float32 [N]."""
    pairs = zip(prompts, responses, strict=True)
    rewards = [float(reward(prompt, response)) for prompt, response in pairs]
    return torch.tensor(rewards, dtype=torch.float32, device="cpu")


def batch_loss(
    scorer: Any,
    rows: Rollouts,
    rewards: Tensor,
    *,
    method: str,
    reference: Any = None,
    beta: float | None = None,
) -> Tensor:
    """The loss of one batch of roll-outs, a scalar; arguments as in `fit_scorer`."""
    mask = rows.response_mask[:, 1:].float()
    if method == "cd_q":
        values = outputs(scorer, rows)[:, :-1].float()
        with torch.no_grad():
            ref_logprobs = outputs(reference, rows)[:, :-1].float().log_softmax(-1)
        width = min(values.shape[-1], ref_logprobs.shape[-1])  # one vocabulary may be padded
        targets = q_targets(values[..., :width], ref_logprobs[..., :width], rewards, mask)
        return value_loss(taken(values, rows.ids[:, 1:]), targets, mask)
    values = prefix_values(scorer, rows).float()
    if method == "fudge":
        return attribute_loss(values, rewards, mask)
    if method == "mavis":
        assert beta is not None
        rewards = kl_returns(rewards, rows.log_ratios[:, 1:], mask, beta)
    return value_loss(values, rewards, mask)


def fit_scorer(
    scorer: Any,
    rollouts: Rollouts,
    rewards: Tensor,
    *,
    method: str = "cd_fudge",
    reference: Any = None,
    beta: float | None = None,
    steps: int = 600,
    batch_size: int = 64,
    peak_lr: float = 1e-3,
    seed: int = 0,
    label: str | None = None,
) -> list[float]:
    """Fit a scorer to roll-outs, in place.

    Args:
        scorer: a causal language model (dense), or a token classifier with one label (scalar).
        rollouts: N responses of the reference; for MAVIS, of the policy to improve.
        rewards: float [N], their rewards; for FUDGE 1 for the attribute, else 0.
        method: "cd_fudge" or "cd_q" (arXiv 2310.17022; cd_q learns from its own values of longer
            prefixes and needs several times as many steps), "fudge" (arXiv 2104.05218: the output
            is the logit of the attribute, decode with logsigmoid), or "mavis" (arXiv 2508.13415).
        reference: the model that drew the roll-outs; cd_q takes expectations under it.
        beta: for mavis, the strength at which the scorer will be used.
        steps, batch_size, peak_lr: AdamW with warm-up and cosine decay.
        seed: of the order of the roll-outs.
        label: what to call the scorer when printing the loss; None prints nothing.

    Returns:
        The loss of every step.

    Raises:
        ValueError: an unknown method, a method without an argument that it needs, or rewards of a
            wrong shape.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "cd_q" and (reference is None or not Scorer(scorer).dense):
        raise ValueError("cd_q needs a reference and a dense scorer: it sums over next tokens")
    if (method == "mavis") != (beta is not None):
        raise ValueError(f"beta is for mavis, which needs it; got {beta} for {method}")
    if rewards.shape != (len(rollouts.ids),) or not bool(rewards.isfinite().all()):
        raise ValueError(
            f"rewards must be {len(rollouts.ids)} finite numbers, one per roll-out, "
            f"got shape {list(rewards.shape)}"
        )
    rewards = rewards.to(rollouts.ids.device)
    order = shuffled(len(rewards), steps * batch_size, seed).to(rewards.device)

    def loss_at(step: int) -> Tensor:
        index = order[step * batch_size : (step + 1) * batch_size]
        return batch_loss(
            scorer,
            take(rollouts, index),
            rewards[index],
            method=method,
            reference=reference,
            beta=beta,
        )

    return fit(scorer, steps, peak_lr, loss_at, label)


def train_scorer(
    scorer: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Reward,
    *,
    method: str = "cd_fudge",
    max_new_tokens: int = 64,
    seed: int = 0,
    **options: Any,
) -> list[float]:
    """Draw one response of the reference to each prompt, reward it, and fit the scorer in place.

    Args:
        scorer, method: see `fit_scorer`; for method "mavis" use `train_mavis`.
        reference, tokenizer: a causal language model of transformers, and its tokenizer.
        prompts: N strings; repeat one to draw several responses to it.
        reward: reward(prompt, response), any float.
        max_new_tokens: the longest response.
        seed: of the draws and of the order of training.
        **options: for `fit_scorer`.

    Returns:
        The loss of every step.
    """
    rollouts, texts = roll_out(
        alone(reference, tokenizer),
        prompts,
        weights=[1.0],
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    rewards = rewards_of(reward, prompts, texts)
    return fit_scorer(
        scorer, rollouts, rewards, method=method, reference=reference, seed=seed, **options
    )
