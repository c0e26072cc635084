"""f-DPO of the embedded reference for a weighted reward under any of the five divergences.

The slope f' acts on the log-ratio d of the whole answer (arXiv 2309.16240). The optimum has
f'(pi/ref) = 10 r + const with r in [0, 1]. There -f' stays below about 11 and d above -2.4 (forward
KL), -2.3 (Jeffrey) and -3.6 (alpha 1/2). Smaller d occur only while the policy is far from the
optimum. There e^-d grows until it hides all other terms, and overflows at d = -90. Other
implementations clamp d, which stops the gradient. Here f' continues as its tangent below
`TANGENT_BELOW`: that moves no optimum, and every pair keeps a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mod_fused import world
from mod_fused.decoding.sequences import Sequences
from mod_fused.divergence import get_divergence
from mod_fused.training import embedded_policies as train

TANGENT_BELOW = -4.0  # nats


class Answers(NamedTuple):
    """Answers of the reference to train on, `train.GROUP` in a row to each prompt.

    Attributes:
        prompts, responses: N strings each.
        batch: their tokens.
        ref_logprobs: log pi_ref(response | prompt) in nats, [N] float32.
    """

    prompts: list[str]
    responses: list[str]
    batch: Sequences
    ref_logprobs: Tensor


def draw_answers(reference: Any, tokenizer: Any, n_prompts: int, seed: int) -> Answers:
    """`train.GROUP` answers to each of `n_prompts` training prompts, drawn from the reference."""
    chosen = world.prompts(n_prompts, seed, held_out=False)
    prompts = [prompt for prompt in chosen for _ in range(train.GROUP)]
    batch = train.sample(reference, tokenizer, prompts, seed)
    responses = train.response_texts(tokenizer, batch)
    return Answers(prompts, responses, batch, train.all_logprobs(reference, batch))


def slope(divergence: str) -> Callable[[Tensor], Tensor]:
    """f'(e^d) up to a constant as a function of d, and its tangent below `TANGENT_BELOW`."""
    if divergence == "reverse_kl":
        return lambda d: d
    deficit = get_divergence(divergence).deficit
    if not get_divergence(divergence).clamped:  # JSD's own f' is nearly linear there
        return lambda d: -deficit(d)
    with torch.enable_grad():
        corner = torch.tensor(TANGENT_BELOW, requires_grad=True)
        (gradient,) = torch.autograd.grad(-deficit(corner), corner)
    height = -deficit(corner.detach())

    def continued(d: Tensor) -> Tensor:
        below = height + gradient * (d - TANGENT_BELOW)
        # Clamp first: torch.where passes the NaN gradient of an overflow that it does not select.
        return torch.where(d < TANGENT_BELOW, below, -deficit(d.clamp(min=TANGENT_BELOW)))

    return continued


def mixed_rewards(answers: Answers, weights: Sequence[float]) -> Tensor:
    """sum_i w_i r_i of every answer, [N] float32; weights [3] as `world.OBJECTIVES` has them."""
    columns = [train.score(name, answers.prompts, answers.responses) for name in world.OBJECTIVES]
    return torch.tensor(weights) @ torch.stack(columns)


def least_loss(answers: Answers, weights: Sequence[float]) -> float:
    """`train.preference_loss` at the optimum of any divergence: the preferences' mean entropy."""
    rewards = mixed_rewards(answers, weights).view(-1, train.GROUP)
    return float(train.preference_loss(train.PREFERENCE_SCALE * rewards, rewards))


def train_policy(
    reference: Any,
    answers: Answers,
    weights: Sequence[float],
    divergence: str,
    steps: int,
    seed: int,
    label: str = "policy",
) -> tuple[Any, list[float]]:
    """A copy of the reference tuned for sum_i w_i r_i under `divergence`, and the losses.

    Weight 1 on one objective gives a policy to mix. Other weights [3] give the policy that mixing
    is compared with.
    """
    model = copy.deepcopy(reference)
    losses = train.train_policy(
        model,
        answers.batch,
        answers.ref_logprobs,
        mixed_rewards(answers, weights),
        steps,
        seed,
        label,
        slope=slope(divergence),
    )
    return model, losses
