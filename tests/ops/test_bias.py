"""A bias on log pi*: against the float64 race on log pi* + bias, and against what equals it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DIVERGENCES,
    assert_proposal_logprobs_are_the_oracle_s,
    assert_tokens_are_the_oracle_s,
    logits,
    normal,
)

from mod_fused import reference

pytestmark = pytest.mark.sanitized

INF = math.inf
B, V = 20, 1500
WEIGHTS = [0.5, 0.25]
ASKED = {"return_proposal_logprobs": True, "return_model_logprobs": True}


def sparse(rows: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    """bias and bias_ids [rows, 40], some of them padding with a bias that nobody may read."""
    rng = np.random.default_rng(17)
    ids = torch.from_numpy(np.argsort(rng.random((rows, V)))[:, :40].copy())
    bias = 8.0 * normal(171, rows, 40)
    ids[:, 5::9], bias[:, 5::9] = -1, torch.nan
    return bias, ids


def dense(bias: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same bias [B, V], written token by token."""
    out = torch.zeros(ids.shape[0], V)
    for row, (own, tokens) in enumerate(zip(bias.tolist(), ids.tolist(), strict=True)):
        for x, token in zip(own, tokens, strict=True):
            if token >= 0:
                out[row, token] = x
    return out


#: Arguments of the call, and the bias [B, V] that they stand for.
FORMS: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "dense": ({"bias": 3.0 * normal(172, B, V)}, 3.0 * normal(172, B, V)),
    "half": ({"bias": normal(173, B, V).half()}, normal(173, B, V).half().float()),
    "shared": ({"bias": normal(174, V).bfloat16()}, normal(174, V).bfloat16().float().expand(B, V)),
    "sparse": (dict(zip(("bias", "bias_ids"), sparse(), strict=True)), dense(*sparse())),
    "sparse, shared": (
        {"bias": sparse()[0][0], "bias_ids": sparse()[1][0]},
        dense(*sparse())[:1].expand(B, V),
    ),
    "none listed": ({"bias": torch.empty(B, 0), "bias_ids": torch.empty(B, 0).long()},
                    torch.zeros(B, V)),
}  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "mask": normal(175, B, V) > -0.5},
    {"temperature": 1.5, "top_k": 100, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 0.9, "mask": normal(176, B, V) > 0.0},
    {"min_p": torch.linspace(0.0, 0.2, B)},
]
CASES = [
    (DIVERGENCES[i % len(DIVERGENCES)], form, setting)
    for i, (form, setting) in enumerate((f, s) for f in FORMS for s in SETTINGS)
]


@pytest.mark.parametrize(("divergence", "form", "setting"), CASES, ids=str)
def test_draws_equal_the_race_on_pi_star_with_the_bias(op, divergence, form, setting):
    given, bias = FORMS[form]
    ref, policies = logits(177, B, V, 2, kind="typical", excluded=0.1)
    log_p = reference.log_probs(ref, policies, WEIGHTS, divergence=divergence)
    seeds, positions = torch.arange(B) * 3 + 1, torch.arange(B) % 4
    drawn = op.sample(
        ref, policies, WEIGHTS, divergence=divergence, seed=seeds, position=positions,
        **given, **setting, **ASKED,
    )  # fmt: skip
    assert drawn.valid.all()
    filters = {**setting, "bias": bias}
    if setting.get("temperature") == 0.0:
        total = log_p + bias.double().numpy()
        assert drawn.tokens.tolist() == total.argmax(1).tolist()
    else:
        assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, positions, **filters)
    assert_proposal_logprobs_are_the_oracle_s(drawn, log_p, **filters)
    at = np.arange(B), drawn.tokens.numpy()
    assert np.abs(drawn.logprobs.numpy() - log_p[at]).max() <= 1e-4  # without the bias


@pytest.mark.parametrize("offset", [-1e30, -1e4, 100.0, 1e30, 3.4e38])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.slow
def test_an_equal_bias_of_all_tokens_changes_nothing_however_large(op, divergence, offset):
    ref, policies = logits(178, B, V, 2, kind="typical")
    for filters in ({}, {"temperature": 0.0}, {"top_k": 30, "top_p": 0.9}):
        options = {"divergence": divergence, "seed": torch.arange(B), **filters, **ASKED}
        plain = op.sample(ref, policies, WEIGHTS, **options)
        drawn = op.sample(ref, policies, WEIGHTS, bias=torch.full((V,), offset), **options)
        assert torch.equal(drawn.tokens, plain.tokens)
        # One draw stores the key that it drew from, the other computes it again.
        assert (drawn.logprobs - plain.logprobs).abs().max() <= 2e-5
        assert (drawn.proposal_logprobs - plain.proposal_logprobs).abs().max() <= 2e-5
        assert torch.equal(drawn.model_logprobs, plain.model_logprobs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.slow
def test_minus_infinity_or_a_least_float_is_a_mask(op, divergence):
    ref, policies = logits(179, B, V, 2, kind="typical")
    mask = normal(180, B, V) > 1.0
    options = {"divergence": divergence, "seed": torch.arange(B), **ASKED}
    for filters in ({}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}):
        masked = op.sample(ref, policies, WEIGHTS, mask=mask, **filters, **options)
        for excluded in (-INF, -1e9, torch.finfo(torch.float32).min):
            bias = torch.where(mask, 0.0, excluded)
            drawn = op.sample(ref, policies, WEIGHTS, bias=bias, **filters, **options)
            assert torch.equal(drawn.tokens, masked.tokens)
            assert (drawn.proposal_logprobs - masked.proposal_logprobs).abs().max() <= 2e-5


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.slow
def test_a_huge_bias_draws_its_tokens_always_and_by_pi_star_among_them(op, divergence):
    ref, (policy,) = logits(181, 1, V, 1, kind="mild")
    rows = 600
    args = ref.expand(rows, -1), [policy.expand(rows, -1)], [0.5]
    log_p = reference.log_probs(ref, [policy], [0.5], divergence=divergence)[0]
    options = {"divergence": divergence, "seed": torch.arange(rows), **ASKED}
    for lift in (1e30, 3e38):
        one = op.sample(*args, bias=torch.where(torch.arange(V) == 7, lift, 0.0), **options)
        assert (one.tokens == 7).all() and (one.proposal_logprobs == 0.0).all()
        assert np.abs(one.logprobs.numpy() - log_p[7]).max() <= 2e-5
    chosen = [int(np.argmax(log_p)), 3, 1200]
    bias = torch.zeros(V)
    bias[chosen] = 1e30
    some = op.sample(*args, bias=bias, **options)
    p = np.exp(log_p[chosen]) / np.exp(log_p[chosen]).sum()
    counts = [int((some.tokens == token).sum()) for token in chosen]
    assert sum(counts) == rows
    # Pearson's statistic with 2 degrees of freedom: exp(-x / 2) is its tail, 1e-6 at 27.6.
    assert (((counts - rows * p) ** 2) / (rows * p)).sum() <= 27.6
    for token, share in zip(chosen, p, strict=True):
        got = some.proposal_logprobs[some.tokens == token]
        assert ((got - math.log(share)).abs() <= 2e-5).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.slow
def test_a_bias_brings_no_excluded_token_back_and_disturbs_no_other(op, divergence):
    ref, policies = logits(182, B, V, 2, kind="typical")
    mask = torch.ones(B, V, dtype=torch.bool)
    ref[:, 40], policies[0][:, 41], mask[:, 42] = -INF, -INF, False
    log_p = reference.log_probs(ref, policies, WEIGHTS, divergence=divergence)
    bias, seeds = normal(183, B, V), torch.arange(B)
    bias[:, 40], bias[:, 41], bias[:, 42] = 1e30, 3.4e38, 1e30
    for filters in ({}, {"temperature": 0.7, "top_k": 400}):
        drawn = op.sample(
            ref, policies, WEIGHTS, divergence=divergence, seed=seeds, bias=bias, mask=mask,
            **filters, **ASKED,
        )  # fmt: skip
        filters = {**filters, "bias": bias, "mask": mask}
        assert drawn.valid.all()
        assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, [0] * B, **filters)
        assert_proposal_logprobs_are_the_oracle_s(drawn, log_p, **filters)


def test_a_large_bias_rounds_no_log_probability_away(op):
    # Beside 1e4 float32 would round log pi* to 1e-3.
    ref, policies = logits(184, B, V, 2, kind="mild")
    log_p = reference.log_probs(ref, policies, WEIGHTS)
    lifted = torch.arange(V) % 2 == 0
    bias = torch.where(lifted, 1e4 + normal(185, V).round(), 0.0)
    drawn = op.sample(ref, policies, WEIGHTS, bias=bias, seed=torch.arange(B), **ASKED)
    assert lifted[drawn.tokens].all()
    at = np.arange(B), drawn.tokens.numpy()
    assert np.abs(drawn.logprobs.numpy() - log_p[at]).max() <= 2e-5
    assert_proposal_logprobs_are_the_oracle_s(drawn, log_p, bound=2e-5, bias=bias.expand(B, V))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_greedy_ties_with_a_bias_go_to_the_lowest_id(op, divergence):
    ref = torch.full((3, 2600), -2.0)
    bias = torch.zeros(3, 2600)
    bias[:, [17, 1030, 2599]] = 2.5
    bias[1, 17], bias[2, 17], bias[2, 1030] = 2.25, -INF, 2.25
    drawn = op.sample(
        ref, [ref.clone()], [0.5], divergence=divergence, bias=bias, temperature=0.0, seed=1
    )
    assert drawn.tokens.tolist() == [17, 1030, 2599]


def test_a_row_with_a_bias_is_the_same_alone_and_in_a_batch(op):
    ref, policies = logits(186, 7, V, 2, kind="typical")
    bias, seeds, positions = normal(187, 7, V), torch.arange(7) + 3, torch.arange(7) % 3
    bias[1, 5], bias[2], bias[3, 8] = torch.nan, 1e30, 1e30
    ids = torch.arange(7)[:, None] * 5 + torch.arange(4)
    ids[4, 1] = V
    for given in ({"bias": bias}, {"bias": bias[:, :4].nan_to_num(), "bias_ids": ids}):
        batch = op.sample(
            ref, policies, WEIGHTS, divergence="jsd", seed=seeds, position=positions, **given
        )
        broken = 4 if "bias_ids" in given else 1
        assert batch.valid.tolist() == [b != broken for b in range(7)]
        for b in range(7):
            row = slice(b, b + 1)
            alone = op.sample(
                ref[row], [x[row] for x in policies], WEIGHTS, divergence="jsd", seed=seeds[row],
                position=positions[row], **{name: x[row] for name, x in given.items()},
            )  # fmt: skip
            assert torch.equal(alone.tokens, batch.tokens[row])
            assert torch.equal(alone.valid, batch.valid[row])
