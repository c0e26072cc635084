"""The losses and targets of scorers: pure functions of tensors.

There are N responses of at most T tokens. y^t is the response's first t tokens, t = 1..T; column
t - 1 of a tensor [N, T] belongs to it. `mask` [N, T] says how much each prefix counts: 0 behind the
end of the response, 1 (or the response's weight) before. Every loss is a sum divided by N.
"""

from __future__ import annotations

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


def q_targets(values: Tensor, ref_logprobs: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """The targets of CD-Q (arXiv 2310.17022), without gradient.

        target_t = sum_z pi_ref(z | x, y^t) V(x, [y^t, z]),    the reward where the response ends

    Args:
        values: float [N, T, V], V(x, [y^(t-1), z]) in column t - 1.
        ref_logprobs: float [N, T, V], log pi_ref(z | x, y^(t-1)) in column t - 1.
        rewards: float [N].
        mask: [N, T]; a response ends where it turns 0.

    Returns:
        [N, T].
    """
    expected = (ref_logprobs.exp() * values).sum(-1)  # (N, T): under y^(t-1)
    following = F.pad(expected[:, 1:], (0, 1))
    goes_on = F.pad(mask[:, 1:], (0, 1)) != 0
    return torch.where(goes_on, following, rewards[:, None]).detach()


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
        labels: [N], 1 for responses with the attribute, 0 for the others (or a probability).
        mask: [N, T].
    """
    targets = labels.to(logits.dtype)[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (mask * losses).sum() / len(logits)
