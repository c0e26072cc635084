"""Published decoding methods as arguments of the op: which call expresses which paper.

    mod_fused.sample(**recipes.dexperts(base, expert, anti, alpha=2.0), seed=7, position=0)

All are instances of reverse KL: pi*(s) is proportional to pi_ref(s)^(1 - sum w) prod pi_i(s)^w_i,
or, without a reference, to prod pi_i(s)^w_i. The table gives the weights w. A recipe only names
arguments: it copies and computes no logits.

| call | pi*(s) is proportional to | reference, [w] | paper |
|---|---|---|---|
| `dexperts` | base (expert / anti)^alpha | base, [alpha, -alpha] | arXiv 2105.03023 |
| `proxy_tuning` | base (tuned / untuned)^alpha | base, [alpha, -alpha] | arXiv 2401.08565 |
| `contrastive_decoding` | expert / amateur | none, [1, -1] | arXiv 2210.15097 |
| same with `beta` | expert^(1 + beta) / amateur^beta | none, [1 + beta, -beta] | arXiv 2309.09117 |
| `classifier_free_guidance` | uncond (cond / uncond)^gamma | uncond, [gamma] | arXiv 2306.17806 |
| `realignment` (DeRa) | sft (aligned / sft)^lam | sft, [lam] | arXiv 2402.02992 |
| `genarm` | base prod_i reward_i^(a_i / beta) | none, [1, a_i / beta] | arXiv 2410.08193 |

The papers add raw logits and the op adds log-probabilities: the two differ by a constant that
normalising removes. A token with a logit of -inf in a tensor of non-zero weight gets probability 0.
That holds for a negative weight too, where the printed formulas have no value.

Pass further arguments of `mod_fused.sample` beside a recipe. Replace its "weights" by [B, M] for
strengths that differ from row to row. Give a recipe models in place of logits, and `for_generate`
turns it into arguments of `generate`.

`soup` is what mixing is compared with: one model, merged from the parameters of several.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from .call.fields import number

__all__ = [
    "classifier_free_guidance",
    "contrastive_decoding",
    "dexperts",
    "for_generate",
    "genarm",
    "proxy_tuning",
    "realignment",
    "soup",
]


def dexperts(base: Any, expert: Any, anti: Any, *, alpha: float) -> dict[str, Any]:
    """DExperts (arXiv 2105.03023): softmax(z + alpha (z_expert - z_anti)).

    The authors' code also cuts the base model's logits by top-p beforehand, which is no part of the
    formula: give such a cut as `mask`, or use `plausibility`.

    Args:
        base: logits [B, V] of the model that is steered.
        expert: logits [B, V] of a model of the wanted text.
        anti: logits [B, V] of a model of the unwanted text.
        alpha: steering strength, positive.

    Returns:
        Arguments of `mod_fused.sample` and `mod_fused.log_probs`.

    Raises:
        TypeError, ValueError: if alpha is not a positive number. Logits are checked by the op.
    """
    alpha = _positive("alpha", alpha)
    return {"ref_logits": base, "policy_logits": [expert, anti], "weights": [alpha, -alpha]}


def proxy_tuning(base: Any, tuned: Any, untuned: Any, *, alpha: float = 1.0) -> dict[str, Any]:
    """Proxy-tuning (arXiv 2401.08565): softmax(s_base + alpha (s_tuned - s_untuned)), alpha = 1 in
    its main formula.

    Emulated fine-tuning (arXiv 2310.12962) is the same next-token formula with alpha = 1: base is
    the large pretrained model and tuned, untuned are small (up-scaling), or the other way round
    (down-scaling). The authors' filters of unlikely tokens are not
    part of this recipe.

    Args:
        base: logits [B, V] of the model to be tuned by proxy.
        tuned: logits [B, V] of a (small) tuned model.
        untuned: logits [B, V] of the model that it was tuned from.
        alpha: how much of the difference to apply, positive.

    Returns, Raises:
        As `dexperts`.
    """
    return dexperts(base, tuned, untuned, alpha=alpha)


def contrastive_decoding(
    expert: Any,
    amateur: Any,
    *,
    alpha: float = 0.1,
    beta: float | None = None,
    amateur_temperature: float = 1.0,
) -> dict[str, Any]:
    """Contrastive decoding: the original score, or with beta its reformulation in logits.

        arXiv 2210.15097:  log p_expert(s) - log p_amateur(s)
        arXiv 2309.09117:  (1 + beta) z_expert(s) - beta z_amateur(s)

    on the tokens with p_expert(s) >= alpha max p_expert, -inf elsewhere. The first is the
    limit of the second, divided by beta, as beta grows. `temperature=0` takes the token
    of the best score. The first paper searches with beams over whole responses, which a token-wise
    op does not.

    Args:
        expert: logits [B, V] of the large model.
        amateur: logits [B, V] of the small model.
        alpha: plausibility constraint, in (0, 1].
        beta: weight of the amateur, not negative; None for the original score.
        amateur_temperature: the amateur's logits are divided by it before their softmax, positive.

    Returns:
        Arguments of `mod_fused.sample` and `mod_fused.log_probs`.

    Raises:
        TypeError, ValueError: for numbers outside these ranges. Logits are checked by the op.
    """
    alpha = _positive("alpha", alpha, most=1.0)
    if beta is None:
        weights = [1.0, -1.0]
    else:
        beta = _not_negative("beta", beta)
        weights = [1.0 + beta, -beta]
    return {
        "ref_logits": None,
        "policy_logits": [expert, amateur],
        "weights": weights,
        "logit_scales": [1.0, 1.0 / _positive("amateur_temperature", amateur_temperature)],
        "plausibility": alpha,
        "plausibility_tensor": 1,
    }


def classifier_free_guidance(
    unconditional: Any, conditional: Any, *, gamma: float
) -> dict[str, Any]:
    """Classifier-free guidance of language models (arXiv 2306.17806):

        log P(s) + gamma (log P(s | c) - log P(s))

    Both are the same model: once after the prompt, once without it or after a negative prompt. In
    `generate` use `Ensemble([model, model])` and a list of prompts for each.

    Args:
        unconditional: logits [B, V] without the prompt, or after a negative prompt.
        conditional: logits [B, V] after the prompt.
        gamma: guidance strength, not negative: 0 ignores the prompt, 1 is the model as it is.

    Returns, Raises:
        As `dexperts`, for gamma.
    """
    gamma = _not_negative("gamma", gamma)
    return {"ref_logits": unconditional, "policy_logits": [conditional], "weights": [gamma]}


def realignment(sft: Any, aligned: Any, *, lam: float) -> dict[str, Any]:
    """Decoding-time realignment, DeRa (arXiv 2402.02992): softmax(lam h_aligned + (1 - lam) h_sft).

    From a model aligned with KL strength beta it approximates, token by token, the model that
    strength beta / lam would have given.

    Args:
        sft: logits [B, V] of the reference of the alignment.
        aligned: logits [B, V] of the model aligned with KL strength beta.
        lam: not negative: 0 is the reference, 1 the aligned model, above 1 extrapolates.

    Returns, Raises:
        As `dexperts`, for lam.
    """
    lam = _not_negative("lam", lam)
    return {"ref_logits": sft, "policy_logits": [aligned], "weights": [lam]}


def genarm(
    base: Any,
    reward_models: Sequence[Any],
    *,
    beta: float = 1.0,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """GenARM (arXiv 2410.08193): log pi_base(s) + (1 / beta) sum_i a_i log pi_r_i(s).

    The base is a policy of weight 1 and there is no reference: weights need not sum to one.

    Args:
        base: logits [B, V] of the frozen model.
        reward_models: logits [B, V] of one autoregressive reward model per objective, at most 7.
        beta: strength of the KL regularisation, positive.
        weights: a_i, the weights of the objectives; None means ones.

    Returns:
        Arguments of `mod_fused.sample` and `mod_fused.log_probs`.

    Raises:
        TypeError, ValueError: if beta is not a positive number, or there is not one weight per
            reward model. Logits are checked by the op.
    """
    beta = _positive("beta", beta)
    weights = [1.0] * len(reward_models) if weights is None else weights
    if len(weights) != len(reward_models):
        raise ValueError(
            f"weights must have one number per reward model ({len(reward_models)}), "
            f"got {len(weights)}"
        )
    return {
        "ref_logits": None,
        "policy_logits": [base, *reward_models],
        "weights": [1.0, *(number("weights", a) / beta for a in weights)],
    }


def for_generate(recipe: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Split a recipe of models into what `Ensemble` takes and what `generate` takes.

        models, options = recipes.for_generate(recipes.dexperts(base, expert, anti, alpha=2.0))
        mod_fused.generate(Ensemble(models, tokenizer), prompts, **options)

    Args:
        recipe: the result of a function above that was given models in place of logits.

    Returns:
        The models [reference or None, policy 1, ...], and the options: weights, logit_scales and
        plausibility where the method has them.
    """
    options = dict(recipe)
    return [options.pop("ref_logits"), *options.pop("policy_logits")], options


def soup(models: Sequence[Any], weights: Sequence[float]) -> Any:
    """Rewarded Soups (arXiv 2306.04488): the model with the parameters

        ref + sum_i w_i (policy_i - ref)

    At sum w = 1 it is the weighted mean of the policies. Parameters of fewer than 32 bits are added
    in float32 and rounded once. Buffers are the reference's.

    Args:
        models: the reference, then the policies: modules of one class with the same parameters.
            Merge adapters into their models first.
        weights: one finite number for each policy.

    Returns:
        A new module, in the reference's dtypes and on its devices.

    Raises:
        TypeError: weights are not numbers, or parameters are no floating-point numbers.
        ValueError: there is no model, there is not one finite weight per policy, or a policy's
            class, parameters or their shapes are not those of the reference.
    """
    if not models:
        raise ValueError("models must be the reference and then the policies, got none")
    reference, *policies = models
    strengths = [number("weights", w) for w in weights]
    if len(strengths) != len(policies) or not all(map(math.isfinite, strengths)):
        raise ValueError(f"weights must be {len(policies)} finite numbers, got {strengths}")
    expected = _shapes(reference)
    for i, policy in enumerate(policies, 1):
        if type(policy) is not type(reference):
            kinds = type(reference).__name__, type(policy).__name__
            raise ValueError(f"models[{i}] must be a {kinds[0]} like the reference, got {kinds[1]}")
        differ = [name for name, _ in expected.items() ^ _shapes(policy).items()]
        if differ:
            raise ValueError(
                f"models[{i}] must have the names and shapes of the reference's parameters, "
                f"got another {min(differ)!r}"
            )
    merged = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if not parameter.is_floating_point():
                raise TypeError(f"{name} must be of floating-point numbers, got {parameter.dtype}")
            base = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            total = base.clone()
            for weight, policy in zip(strengths, policies, strict=True):
                total += weight * (policy.get_parameter(name).to(total) - base)
            parameter.copy_(total)
    return merged


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"models must be torch modules, got {type(model).__name__}")
    return {name: tuple(x.shape) for name, x in model.named_parameters()}


def _positive(name: str, x: object, most: float = math.inf) -> float:
    value = number(name, x)
    if not 0.0 < value <= most or math.isinf(value):
        expected = "positive and finite" if math.isinf(most) else f"in (0, {most:g}]"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def _not_negative(name: str, x: object) -> float:
    value = number(name, x)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return value
