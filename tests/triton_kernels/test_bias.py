"""The kernels' bias in the interpreter: rows of several filter blocks, every dtype, odd strides."""

from __future__ import annotations

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

import mod_fused
from mod_fused import reference

pytestmark = pytest.mark.interpreted

B, V = 3, 9300  # more than two blocks of 4096 tokens
ASKED = {"backend": "triton", "return_model_logprobs": True, "return_proposal_logprobs": True}
SETTINGS = (
    {},
    {"temperature": 0.0},
    {"mask": normal(213, B, V) > 0.0, "temperature": 0.8},
    {"top_k": 300, "top_p": 0.9, "min_p": 0.001},
    {"top_p": 0.8, "mask": normal(214, B, V) > 0.0},
)


@pytest.mark.parametrize(("divergence", "setting"), list(zip(DIVERGENCES, SETTINGS, strict=False)))
def test_draws_are_the_oracle_s_and_the_log_probabilities_those_of_pi_star(divergence, setting):
    ref, policies = logits(215, B, V, 2, kind="typical", excluded=0.05)
    bias = 4.0 * normal(216, B, V)
    bias[1, 17], bias[2, ::2] = 1e30, -torch.inf
    bias[0] = 1e6 + bias[0].round()  # beside it float32 rounds log pi* to 0.06
    log_p = reference.log_probs(ref, policies, [0.5, 0.4], divergence=divergence)
    for dtype in (torch.float32, torch.bfloat16):
        given = bias.clamp(max=1e30).to(dtype)
        odd = torch.full((B * (V + 13) + 7,), torch.nan, dtype=dtype)
        view = odd.as_strided((B, V), (V + 13, 1), 3).copy_(given)
        seeds = torch.arange(B) * 11
        drawn = mod_fused.sample(
            ref, policies, [0.5, 0.4], divergence=divergence, seed=seeds, bias=view,
            **setting, **ASKED,
        )  # fmt: skip
        assert drawn.valid.all()
        filters = {**setting, "bias": given.float()}
        if setting.get("temperature") == 0.0:
            total = log_p + given.double().numpy()
            assert drawn.tokens.tolist() == total.argmax(1).tolist()
        else:
            assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, [0] * B, **filters)
        assert_proposal_logprobs_are_the_oracle_s(drawn, log_p, **filters)
        at = np.arange(B), drawn.tokens.numpy()
        assert np.abs(drawn.logprobs.numpy() - log_p[at]).max() <= 1e-4


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_broken_bias_makes_its_row_invalid(divergence):
    ref, policies = logits(217, 5, V, 1, kind="typical")
    bias = normal(218, 5, V)
    bias[0, V - 1], bias[1, 0], bias[2], bias[3, 5000] = torch.nan, torch.inf, -torch.inf, 3e38
    options = {"divergence": divergence, "seed": torch.arange(5), **ASKED}
    drawn = mod_fused.sample(ref, policies, [0.5], bias=bias, **options)
    assert drawn.valid.tolist() == [False, False, False, True, True]
    assert drawn.tokens[:4].tolist() == [0, 0, 0, 5000]
    assert drawn.logprobs[:3].isnan().all() and drawn.proposal_logprobs[:3].isnan().all()
    ids = torch.tensor([[4, V - 1], [4, 4], [V, 4], [-1, -1], [-2, 4]])
    sparse = mod_fused.sample(ref, policies, [0.5], bias=bias[4, :2], bias_ids=ids[0], **options)
    assert sparse.valid.all()
    sparse = mod_fused.sample(
        ref, policies, [0.5], bias=bias[3:, :2].repeat(3, 1)[:5], bias_ids=ids, **options
    )
    assert sparse.valid.tolist() == [True, False, False, True, False]
