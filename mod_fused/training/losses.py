"""The losses and targets of scorers: pure functions of tensors.

There are N responses of at most T tokens. y^t is the response's first t tokens, t = 1..T; column
t - 1 of a tensor [N, T] belongs to it. `mask` [N, T] says how much each prefix counts: 0 behind the
end of the response, 1 (or the response's weight) before. Every loss is a sum divided by N.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def value_loss(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Regression of the value of every prefix.

        loss = 1/N sum_n sum_t mask 1/2 (V(x, y^t) - target_t)^2

    This is CD-FUDGE (Controlled Decoding, arXiv 2310.17022) where the target of all prefixes is the
    reward of the whole response: the minimum is then the mean reward of the roll-outs through a
    prefix. It is CD-Q with `q_targets`, MAVIS with `kl_returns`.

    Args:
        values: float [N, T].
        targets: float [N, T], or [N] for one per response; no gradient flows into them.
        mask: [N, T].

    Returns:
        Scalar.
    """
    if targets.ndim == 1:
        targets = targets[:, None]
    error = values - targets.detach()
    return 0.5 * (mask * error.square()).sum() / len(values)


def check_td_lambda(td_lambda: float) -> None:
    """Raises ValueError for a lambda outside [0, 1]."""
    if not 0 <= td_lambda <= 1:
        raise ValueError(f"td_lambda must be in [0, 1], got {td_lambda}")


def q_targets(
    values: Tensor, ref_logprobs: Tensor, rewards: Tensor, mask: Tensor, td_lambda: float = 0.0
) -> Tensor:
    """The targets of CD-Q (arXiv 2310.17022) as lambda-returns (TD(lambda)), without gradient.

        target_t = (1 - lambda) sum_z pi_ref(z | x, y^t) V(x, [y^t, z]) + lambda target_(t + 1),
        the reward where the response ends

    lambda = 0 is the paper's one-step target: the reward travels back by one token at a time.
    lambda = 1 is CD-FUDGE's, the reward. All have the same fixed point, for roll-outs of pi_ref.

    Args:
        values: float [N, T, V], V(x, [y^(t-1), z]) in column t - 1.
        ref_logprobs: float [N, T, V], log pi_ref(z | x, y^(t-1)) in column t - 1.
        rewards: float [N].
        mask: [N, T]; a response ends where it turns 0.
        td_lambda: lambda, in [0, 1].

    Returns:
        [N, T].

    Raises:
        ValueError: td_lambda is outside [0, 1].
    """
    check_td_lambda(td_lambda)
    expected = (ref_logprobs.exp() * values).sum(-1)  # (N, T): under y^(t-1)
    goes_on = mask[:, 1:] != 0
    target = rewards.to(expected.dtype)
    targets = [target]
    for t in reversed(range(mask.shape[1] - 1)):
        mixed = torch.lerp(expected[:, t + 1], target, td_lambda)
        target = torch.where(goes_on[:, t], mixed, rewards)
        targets.append(target)
    return torch.stack(targets[::-1], 1).detach()


def kl_returns(rewards: Tensor, log_ratios: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The return of every prefix under the KL-regularised objective E[r] - KL(pi || pi_ref) / beta
    (MAVIS, arXiv 2508.13415), from a roll-out of the policy pi itself.

        return_t = r(x, y) - 1/beta sum_(s > t) log(pi(y_s) / pi_ref(y_s))

    Its mean over roll-outs is Q of y^t. The next policy, proportional to pi_ref exp(beta Q), is at
    least as good.

    Args:
        rewards: float [N].
        log_ratios: float [N, T], log pi - log pi_ref of every token.
        mask: [N, T].
        beta: positive strength of the tilt.

    Returns:
        [N, T], meaningful where mask is not 0.

    Raises:
        ValueError: beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    counted = torch.where(mask != 0, log_ratios, 0.0)
    after = counted.flip(1).cumsum(1).flip(1) - counted
    return rewards[:, None] - after / beta


def attribute_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of every prefix against the attribute of its response (FUDGE, arXiv
    2104.05218): sigmoid(logit) learns the probability that a roll-out through the prefix has the
    attribute.

    Args:
        logits: float [N, T].
        labels: [N], 1 for responses with the attribute, 0 for the others (or a probability, such as
            `soft_labels`).
        mask: [N, T].
    """
    targets = labels.to(logits.dtype)[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (mask * losses).sum() / len(logits)


def soft_labels(rewards: Tensor, beta: float, highest: float) -> Tensor:
    """exp(beta (r - highest)): labels for `attribute_loss` that make it learn soft values.

    The least loss is then at sigmoid(logit) = E[exp(beta r) | x, y^t] / exp(beta highest), so that
    logsigmoid(logit) is beta V*, up to a constant: V* = 1/beta log E exp(beta r), the soft value
    (Q#, arXiv 2502.20548).

    Args:
        rewards: float [N].
        beta: positive and finite strength, in nats per unit of reward.
        highest: the largest reward.

    Returns:
        [N], at most 1 where no reward is above `highest`.

    Raises:
        ValueError: beta is not positive and finite.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    return (beta * (rewards - highest)).exp()
