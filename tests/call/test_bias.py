"""Biases that are refused, and biases that make a row invalid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import assert_only_these_rows_are_invalid, logits, normal

from mod_fused.call.bias import check_bias
from mod_fused.ops import sample

pytestmark = pytest.mark.sanitized

INF, NAN = math.inf, math.nan
B, V = 5, 1100


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_plus_infinity_and_nothing_left_invalidate_their_row_only(op, divergence, dtype):
    ref, policies = logits(85, B, V, 2, kind="typical")
    policies[0][4, : V // 2] = -INF
    bias = normal(86, B, V).to(dtype)
    clean = bias.clone()
    bias[0, 1099], bias[2, 0], bias[3] = NAN, INF, -INF
    bias[4, V // 2 :] = -INF  # what the support has left
    policies[0][0, 1099] = ref[2, 0] = -INF  # of an excluded token, too
    args, mixture = (ref, policies, [0.5, 0.25]), {"divergence": divergence}
    assert_only_these_rows_are_invalid(
        op, {0, 2, 3, 4}, args, args, {**mixture, "bias": clean}, **mixture, bias=bias
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_ids_out_of_range_or_twice_invalidate_their_row_only(op, divergence):
    ref, policies = logits(87, B, V, 2, kind="typical")
    bias = normal(88, B, 5)
    ids = torch.tensor([[0, V - 1, 7, -1, -1]] * B)
    clean = ids.clone()
    ids[1, 0], ids[2, 0], ids[3, 2] = V, -2, V - 1
    ids[4] = torch.tensor([2**62, -(2**63), 7, -1, -1])
    args, mixture = (ref, policies, [0.5, 0.25]), {"divergence": divergence, "bias": bias}
    assert_only_these_rows_are_invalid(
        op, {1, 2, 3, 4}, args, args, {**mixture, "bias_ids": clean}, **mixture, bias_ids=ids
    )


def test_a_nan_beyond_the_vocabulary_or_at_padding_is_not_looked_at(op):
    ref, policies = logits(89, B, V, 1)
    wide = torch.full((B, V + 3), NAN)
    wide[:, :V] = normal(90, B, V)
    drawn = op.sample(ref, policies, [0.5], bias=wide[:, :V], seed=1)
    assert drawn.valid.all()
    assert torch.equal(
        drawn.tokens, op.sample(ref, policies, [0.5], bias=normal(90, B, V), seed=1).tokens
    )
    padding = {"bias": torch.full((B, 3), NAN), "bias_ids": torch.full((B, 3), -1)}
    padded = op.sample(ref, policies, [0.5], seed=1, **padding)
    assert torch.equal(padded.tokens, op.sample(ref, policies, [0.5], seed=1).tokens)


def test_a_bias_is_detached_and_left_unchanged(op):
    ref, policies = logits(91, B, V, 1)
    ids = torch.arange(3).expand(B, 3)
    for options in ({"bias": normal(92, B, V)}, {"bias": normal(92, B, 3), "bias_ids": ids}):
        before = options["bias"].clone()
        options["bias"].requires_grad_(True)
        drawn = op.sample(ref, policies, [0.5], seed=1, **options)
        assert not drawn.logprobs.requires_grad
        assert torch.equal(options["bias"].detach(), before)


IDS = torch.zeros(B, 2, dtype=torch.int64)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "bias must be a tensor, got list", {"bias": [0.0] * V}),
    (TypeError, "bias must be a tensor, got float", {"bias": 1.0}),
    (TypeError, "bias must be float32", {"bias": torch.zeros(B, V).double()}),
    (TypeError, "bias must be float32", {"bias": torch.zeros(B, V).long()}),
    (ValueError, r"\[B, V\] = \[5, 1100\]", {"bias": torch.zeros(B, V - 1)}),
    (ValueError, r"\[V\] = \[1100\]", {"bias": torch.zeros(B)}),
    (ValueError, "bias must have shape", {"bias": torch.zeros(1, B, V)}),
    (ValueError, "contiguous in the last", {"bias": torch.zeros(V, B).t()}),
    (ValueError, "contiguous in the last", {"bias": torch.zeros(2 * V)[::2]}),
    (ValueError, "bias must be on cpu", {"bias": torch.zeros(B, V, device="meta")}),
    (ValueError, "bias_ids needs bias", {"bias_ids": IDS}),
    (TypeError, "bias_ids must be int64", {"bias": torch.zeros(B, 2), "bias_ids": IDS.int()}),
    (TypeError, "bias_ids must be a tensor", {"bias": torch.zeros(B, 2), "bias_ids": [[1, 2]] * B}),
    (ValueError, "bias_ids must have shape", {"bias": torch.zeros(B, 3), "bias_ids": IDS}),
    (ValueError, "bias_ids must have shape", {"bias": torch.zeros(2), "bias_ids": IDS}),
    (ValueError, "bias must have shape", {"bias": torch.zeros(B + 1, 2), "bias_ids": IDS}),
    (ValueError, "bias must have shape", {"bias": torch.tensor(1.0), "bias_ids": IDS}),
]


@pytest.mark.parametrize(("error", "message", "given"), REFUSED, ids=str)
def test_a_wrong_bias_is_refused_by_name(error, message, given):
    ref, policies = logits(93, B, V, 1)
    with pytest.raises(error, match=message):
        sample(ref, policies, [0.5], seed=1, **given)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17])
def test_the_dense_form_has_aligned_rows_and_the_listed_biases(vocab):
    ids = torch.tensor([[vocab - 1, -1], [-1, -1], [0, 0]])
    bias = torch.tensor([[2.0, 9.0], [9.0, 9.0], [1.0, 1.0]])
    made = check_bias(bias, ids, 3, vocab, torch.device("cpu"))
    assert made.shape == (3, vocab) and made.dtype == torch.float32 and made.stride(0) % 16 == 0
    assert made[0, vocab - 1] == 2.0 and made[0].sum() == 2.0 and (made[1] == 0.0).all()
    assert made[2].isnan().any()
