"""Odd and bad input: invalid rows disturb nobody, shapes of every kind work, errors say why."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    BARRIERS,
    DIVERGENCES,
    assert_only_these_rows_are_invalid,
    assert_tokens_are_the_oracle_s,
    check,
    logits,
    normal,
)

from mod_fused import reference
from mod_fused.call import checks
from mod_fused.call.checks import check_draw, check_mixture
from mod_fused.call.fields import row_parameter, weights_of
from mod_fused.ops import log_probs, sample

pytestmark = pytest.mark.sanitized

INF, NAN = math.inf, math.nan
B, V = 5, 1100  # of most inputs below


@pytest.fixture(params=DIVERGENCES)
def divergence(request):
    return request.param


def test_uninitialised_memory_is_poisoned_in_these_tests():
    assert torch.empty(7).isnan().all()
    assert (torch.empty(7, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_nan_and_plus_infinity_invalidate_their_row_only(op, divergence, poison):
    clean_ref, clean = logits(81, B, V, 2, kind="typical")
    ref, policies = clean_ref.clone(), [p.clone() for p in clean]
    values = normal(81, 1, B, V)
    ref[0, 1099], policies[0][2, 0], values[0, 3, 500] = poison, poison, poison
    policies[1][:, 7] = poison  # of weight 0: ignored entirely
    args, clean_args = (ref, policies, [0.5, 0.0]), (clean_ref, clean, [0.5, 0.0])
    clean_values = torch.where(values.isfinite(), values, 0.0)
    assert_only_these_rows_are_invalid(
        op, {0, 2, 3}, args, clean_args, {"divergence": divergence, "values": clean_values},
        divergence=divergence, values=values,
    )  # fmt: skip
    check(op, *args, divergence=divergence, values=values)


def test_rows_without_support_are_invalid(op, divergence):
    clean_ref, (clean,) = logits(82, B, V, 1, kind="typical")
    ref, policy = clean_ref.clone(), clean.clone()
    ref[1] = -INF
    policy[2] = -INF
    ref[4, ::2], policy[4, 1::2] = -INF, -INF
    args = (ref, [policy], [0.5])
    assert_only_these_rows_are_invalid(
        op, {1, 2, 4}, args, (clean_ref, [clean], [0.5]), divergence=divergence
    )
    check(op, *args, divergence=divergence)


def test_minus_infinity_in_both_or_at_negative_or_zero_weight(op, divergence):
    ref, policies = logits(83, B, V, 2, kind="typical")
    ref[:, 3] = policies[0][:, 3] = -INF  # -inf minus -inf
    policies[0][:, 4] = -INF  # negative weight: excluded, not infinitely likely
    policies[1][:, 5] = -INF  # zero weight: still allowed
    result = check(op, ref, policies, [-0.5, 0.0], divergence=divergence)
    assert (result[:, 3] == -INF).all() and (result[:, 4] == -INF).all()
    assert (result[:, 5] > -INF).all()
    drawn = op.sample(ref, policies, [-0.5, 0.0], divergence=divergence, seed=1)
    assert drawn.valid.all()


def test_rows_the_mask_empties_are_invalid(op, divergence):
    ref, policies = logits(84, B, V, 1, kind="typical", excluded=0.3)
    mask = torch.ones(B, V, dtype=torch.bool)
    mask[1] = False
    mask[3] = policies[0][3] == -INF  # only what the support excludes is allowed
    args = (ref, policies, [0.5])
    assert_only_these_rows_are_invalid(
        op, {1, 3}, args, args, {"divergence": divergence}, divergence=divergence, mask=mask
    )
    packed = torch.full((B, 35), -1, dtype=torch.int32)
    packed[2] = 0
    packed[2, 34] = -(2**12)  # V = 1100: only bits 0 to 11 of the last word are tokens
    assert_only_these_rows_are_invalid(
        op, {2}, args, args, {"divergence": divergence}, divergence=divergence, mask=packed
    )


def test_bad_candidate_ids_and_empty_candidate_sets(op, divergence):
    ref, policies = logits(85, B, V, 1, kind="typical")
    ids = torch.tensor([[1, 2, 1099]] * B)
    values = normal(85, 1, B, 3)
    clean = {"value_ids": ids, "values": values, "divergence": divergence}
    bad_ids, bad_values = ids.clone(), values.clone()
    bad_ids[0, 1], bad_ids[1, 1], bad_ids[2] = V, -2, -1
    bad_values[0, 3] = -INF
    args = (ref, policies, [0.5])
    bad = {"value_ids": bad_ids, "values": bad_values, "divergence": divergence}
    assert_only_these_rows_are_invalid(op, {0, 1, 2, 3}, args, args, clean, **bad)
    check(op, *args, **bad)


def test_plausibility_reads_the_tensor_it_names_even_at_weight_zero(op, divergence):
    ref, policies = logits(86, B, V, 2, kind="typical")
    clean = [p.clone() for p in policies]
    policies[1][2, 9], policies[1][4, 9] = NAN, INF
    kwargs = {"divergence": divergence, "plausibility": 0.01, "plausibility_tensor": 2}
    args = (ref, policies, [0.5, 0.0])
    assert_only_these_rows_are_invalid(op, {2, 4}, args, (ref, clean, [0.5, 0.0]), **kwargs)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", [-1.0, NAN]),
        ("top_p", [0.0, 1.5, -0.1, NAN]),
        ("min_p", [-0.1, 1.5, NAN]),
    ],
)
def test_bad_sampling_parameters_in_tensors_invalidate_their_row(op, name, bad):
    ref, policies = logits(87, B, V, 1, kind="typical")
    args = (ref, policies, [0.5])
    parameter = torch.full((B,), 0.5)
    parameter[1 : 1 + len(bad)] = torch.tensor(bad)
    rows = set(range(1, 1 + len(bad)))
    assert_only_these_rows_are_invalid(op, rows, args, args, {name: 0.5}, **{name: parameter})


def test_bad_weights_in_tensors_invalidate_their_row(op, divergence):
    ref, policies = logits(88, B, V, 2, kind="typical")
    values = normal(88, 1, B, V)
    weights = torch.full((B, 2), 0.5)
    weights[0, 1], weights[2, 0] = NAN, INF
    value_weights = torch.ones(B, 1)
    value_weights[4] = -INF
    assert_only_these_rows_are_invalid(
        op, {0, 2, 4}, (ref, policies, weights), (ref, policies, [0.5, 0.5]),
        {"divergence": divergence, "values": values},
        divergence=divergence, values=values, value_weights=value_weights,
    )  # fmt: skip


@pytest.mark.parametrize("divergence", BARRIERS)
def test_bad_prefixes_invalidate_their_row(op, divergence):
    ref, policies = logits(89, B, V, 1, kind="typical")
    prefix = torch.zeros(B, 2)
    prefix[0, 0], prefix[3, 1] = NAN, NAN
    args = (ref, policies, [0.5])
    assert_only_these_rows_are_invalid(
        op, {0, 3}, args, args, {"divergence": divergence},
        divergence=divergence, prefix_logprobs=prefix,
    )  # fmt: skip


def test_a_zero_weight_hides_whatever_its_tensor_and_prefix_hold(op, divergence):
    ref, policies = logits(93, B, V, 2, kind="typical")
    values, ids = normal(93, 2, B, 3), torch.tensor([[4, 5, 6]] * B)
    prefix = normal(94, B, 3)
    clean = op.log_probs(
        ref, policies[:1], [0.5], divergence=divergence, values=values[:1], value_ids=ids,
        prefix_logprobs=prefix[:, :2],
    )  # fmt: skip
    policies[1][:], values[1], prefix[:, 2] = NAN, -INF, -INF
    values[1, 2] = INF
    result = check(
        op, ref, policies, [0.5, 0.0], divergence=divergence, values=values, value_ids=ids,
        value_weights=[1.0, 0.0], prefix_logprobs=prefix,
    )  # fmt: skip
    assert ((result > -INF).sum(dim=1) == 3).all()
    assert (result - clean)[:, 4:7].abs().max() <= 1e-5


@pytest.mark.parametrize("vocab", [1, 2, 999, 1023, 1024, 1025, 2048, 2049, 4097])
def test_vocabularies_around_the_tile_size(op, vocab, divergence):
    ref, policies = logits(90, 6, vocab, 1, kind="mild")
    seeds = torch.arange(6)
    drawn = op.sample(ref, policies, [0.5], divergence=divergence, seed=seeds)
    log_p = reference.log_probs(ref, policies, [0.5], divergence=divergence)
    assert drawn.valid.all()
    assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, [0] * 6)
    ref[:], policies[0][:] = -9.0, -9.0
    ref[:, -1] = policies[0][:, -1] = 30.0  # nearly all mass on the very last token
    last = op.sample(ref, policies, [0.5], divergence=divergence, seed=seeds)
    assert (last.tokens == vocab - 1).all()


def test_an_empty_batch_gives_empty_results(op, divergence):
    ref, policy = torch.empty(0, V), torch.empty(0, V, dtype=torch.bfloat16)
    assert op.log_probs(ref, [policy], [0.5], divergence=divergence).shape == (0, V)
    asked = {"return_model_logprobs": True, "return_proposal_logprobs": True}
    drawn = op.sample(ref, [policy], [0.5], divergence=divergence, top_p=0.9, seed=1, **asked)
    assert [tuple(x.shape) for x in drawn] == [(0,), (0,), (0,), (0, 2), (0,)]
    assert op.sample(ref, [policy], [0.5], divergence=divergence).tokens.dtype == torch.int64


@pytest.mark.slow
def test_padded_vocabularies_of_one_tokenizer(op, divergence):
    # 151936 and 152064 columns for one tokenizer: the common ones count.
    ref, policies = logits(91, 1, 152064, 1, kind="typical", dtype=torch.bfloat16)
    policies[0][:, 151936:] = 40.0
    args = (ref[:, :151936], policies, [0.5])
    drawn = op.sample(*args, divergence=divergence, seed=4)
    cut = op.sample(args[0], [policies[0][:, :151936]], [0.5], divergence=divergence, seed=4)
    assert drawn.tokens.item() < 151936 and drawn.valid.item()
    assert torch.equal(drawn.tokens, cut.tokens)
    assert torch.equal(drawn.logprobs, cut.logprobs)


def test_inputs_are_detached_and_left_unchanged(op, divergence):
    ref, policies = logits(92, 3, 600, 1)
    before = ref.clone(), policies[0].clone()
    ref.requires_grad_(True)
    options = {"values": normal(92, 1, 3, 600), "prefix_logprobs": torch.zeros(3, 2)}
    for x in options.values():
        x.requires_grad_(True)
    result = op.log_probs(ref, policies, [0.5], divergence=divergence)
    tilted = op.log_probs(ref.detach(), policies, [0.5], divergence=divergence, **options)
    assert not tilted.requires_grad
    drawn = op.sample(
        ref, policies, [0.5], divergence=divergence, temperature=0.5, top_k=3, seed=1,
        mask=torch.ones(3, 600, dtype=torch.bool),
    )  # fmt: skip
    assert not result.requires_grad and not drawn.logprobs.requires_grad
    assert torch.equal(ref.detach(), before[0]) and torch.equal(policies[0], before[1])


# --- numbers, lists, arrays and tensors -----------------------------------------------------------

#: One argument in all the forms of the same numbers; the first one's results are the expected ones.
FORMS: dict[str, list[Any]] = {
    "weights": [
        [0.5, 0.25], (0.5, 0.25), np.array([0.5, 0.25]), np.float32([0.5, 0.25]),
        [np.float64(0.5), np.float16(0.25)], torch.tensor([0.5, 0.25]),
        [Fraction(1, 2), Fraction(1, 4)], [[0.5, 0.25]] * B, np.full((B, 2), [0.5, 0.25]),
        [np.array([0.5, 0.25])] * B, torch.tensor([[0.5, 0.25]] * B, dtype=torch.float64),
    ],
    "value_weights": [
        [2.0], [2], np.array([2]), (np.int64(2),), [[2]] * B, np.full((B, 1), 2.0),
        torch.tensor([2.0]), torch.full((B, 1), 2.0, dtype=torch.float64),
    ],
    "logit_scales": [[1.0, 0.5, 2.0], (1, 0.5, 2), np.array([1, 0.5, 2]), [np.float32(1), 0.5, 2]],
    "vocab_size": [1000, np.int32(1000), np.array(1000)],
    "plausibility": [0.001, np.float64(0.001), np.array(0.001)],
    "temperature": [
        0.5, np.float32(0.5), np.array(0.5), [0.5] * B, (np.float64(0.5),) * B, np.full(B, 0.5),
        torch.tensor(0.5), torch.full((B,), 0.5), torch.full((B,), 0.5, dtype=torch.float64),
    ],
    "top_k": [
        7, np.int64(7), np.uint8(7), np.array(7), [7] * B, np.full(B, 7), torch.tensor(7),
        torch.full((B,), 7), torch.full((B,), 7, dtype=torch.int32),
    ],
    "top_p": [
        0.75, np.float16(0.75), [0.75] * B, np.full(B, 0.75), torch.tensor(0.75),
        torch.full((B,), 0.75), torch.full((B,), 0.75, dtype=torch.float64),
    ],
    "min_p": [
        0.125, np.float32(0.125), [0.125] * B, np.full(B, 0.125), torch.tensor(0.125),
        torch.full((B,), 0.125), torch.full((B,), 0.125, dtype=torch.float64),
    ],
    "position": [
        5, np.int64(5), np.array(5), [5] * B, np.full(B, 5), torch.tensor(5), torch.full((B,), 5),
    ],
    "seed": [7, np.int64(7), np.uint64(7), np.array(7)],
    "seeds": [
        [2**64 - 1, 2, 3, 4, 5], [-1, 2, 3, 4, 5], np.array([-1, 2, 3, 4, 5]),
        np.array([2**64 - 1, 2, 3, 4, 5], dtype=np.uint64), torch.tensor([-1, 2, 3, 4, 5]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_equal_numbers_of_any_form_give_equal_results(op, name):
    ref, policies = logits(95, B, V, 2, kind="typical")
    divergence = "reverse_kl" if name == "top_k" else "jsd"
    results = []
    for form in FORMS[name]:
        given = {"seed" if name == "seeds" else name: form}
        arguments: dict[str, Any] = {"seed": 3, "weights": [0.5, 0.25], **given}
        if name in ("value_weights", "vocab_size"):
            width = int(arguments.get("vocab_size", V))
            arguments["values"] = normal(95, 1, B, width)
        results.append(op.sample(ref, policies, arguments.pop("weights"), divergence=divergence,
                                 **arguments))  # fmt: skip
    first, *others = results
    assert first.valid.all() and len(first.tokens.unique()) > 1
    for other in others:
        assert torch.equal(first.tokens, other.tokens)
        assert (first.logprobs - other.logprobs).abs().max() <= 1e-6


def test_numbers_of_one_row_are_numbers_and_no_rows_take_empty_lists(op):
    ref, policies = logits(96, 1, V, 2, kind="typical")
    by_row = {"temperature": [0.5], "top_k": [9], "top_p": [0.9], "min_p": [0.01], "position": [3]}
    numbers = {name: x[0] for name, x in by_row.items()}
    draws = [
        op.sample(ref, policies, weights, divergence="jsd", seed=3, **rest)
        for weights, rest in (([0.5, 0.25], numbers), ([[0.5, 0.25]], by_row))
    ]
    assert all(torch.equal(x, y) for x, y in zip(draws[0][:3], draws[1][:3], strict=True))
    mixing = check_mixture(ref, policies, [[0.5, 0.25]])
    assert mixing.weights == (0.5, 0.25)
    drawing = check_draw(mixing, seed=1, **by_row)
    assert [x for x in drawing if isinstance(x, torch.Tensor)] == []
    none = [torch.empty(0, V) for _ in range(2)]
    for empty in ([], np.empty((0,)), torch.empty(0)):
        for weights in ([], np.empty((0, 2)), torch.empty(0, 2)):
            rest = {name: empty for name in ("temperature", "top_p", "min_p")}
            drawn = op.sample(torch.empty(0, V), none, weights, seed=[], position=[], **rest)
            assert [x.shape[0] for x in drawn[:3]] == [0, 0, 0]


def test_a_tensor_of_no_dimension_is_read_when_the_op_runs():
    ref, policies = logits(97, B, V, 1, kind="typical")
    mixing, position = check_mixture(ref, policies, [0.5]), torch.tensor(3)
    drawing = check_draw(mixing, seed=1, position=position)
    position += 1
    assert drawing.position.tolist() == [4] * B  # as a captured graph needs it


def test_logits_of_the_meta_device_are_checked_without_being_drawn_from():
    meta = torch.empty(B, V, device="meta")
    mixing = check_mixture(meta, [meta], [[0.5]] * B, divergence="jsd")
    drawing = check_draw(mixing, temperature=[0.5] * B, seed=list(range(B)))
    for x in (mixing.weights, drawing.temperature, drawing.seed):
        assert x.device.type == "meta"
    with pytest.raises(ValueError, match="top_p must be in"):
        check_draw(mixing, top_p=[0.5] * (B - 1) + [2.0])


@pytest.mark.parametrize("name", ["weights", "value_weights", "temperature", "top_k", "seed"])
def test_lists_by_row_are_refused_while_a_graph_is_captured(monkeypatch, name):
    copies = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: copies.append(args))
    device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=f"{name} by row must be a tensor on cuda:0 while a CUDA"):
        if name.endswith("weights"):
            weights_of(name, [[0.5], [0.25]], 1, 2, device)
        elif name == "seed":
            checks._check_seed([1, 2], 2, device)
        else:
            row_parameter(name, [1, 2], 0, 2, device, lambda x: True, "", int)
    assert copies == []


# --- errors ---------------------------------------------------------------------------------------

X, Y = normal(1, 3, 40), normal(2, 3, 40)
PREFIX = {"prefix_logprobs": torch.zeros(3, 2)}


def own(x: Any) -> dict[str, Any]:
    return {"mixture_prefix_logprobs": x}


LOG_PROBS_ERRORS = [
    (ValueError, "policy_logits", (X, [Y[:2]], [1.0]), {}),
    (ValueError, "policy_logits", (X, [Y[0]], [1.0]), {}),
    (ValueError, "contiguous", (X, [normal(1, 40, 3).T], [1.0]), {}),
    (ValueError, "at most 8", (X, [Y] * 9, [0.1] * 9), {}),
    (ValueError, "values", (X, [], []), {}),
    (ValueError, "logits", (None, [], []), {"values": Y[None]}),
    (TypeError, "float64", (X.double(), [Y], [1.0]), {}),
    (TypeError, "int", (X, [Y.long()], [1.0]), {}),
    (TypeError, "ref_logits", (X.tolist(), [Y], [1.0]), {}),
    (TypeError, "weights", (X, [Y], "1"), {}),
    (ValueError, "weights", (X, [Y], [1.0, 2.0]), {}),
    (ValueError, "weights", (X, [Y], torch.ones(2, 1)), {}),
    (ValueError, "weights", (X, [Y], [NAN]), {}),
    (ValueError, "weights", (X, [Y], [10**400]), {}),
    (ValueError, "weights", (X, [Y], torch.tensor(1.0)), {}),
    (TypeError, "weights", (X, [Y], [torch.tensor(1.0)]), {}),
    (TypeError, "weights", (X, [Y], np.array(1.0)), {}),
    (TypeError, "weights", (X, [Y], np.array([True])), {}),
    (TypeError, "weights", (X, [Y], np.array([1j])), {}),
    (ValueError, "weights", (X, [Y], np.ones((2, 1))), {}),
    (ValueError, "weights", (X, [Y], []), {}),
    (ValueError, "weights", (X, [Y], [[1.0], [2.0], [INF]]), {}),
    (TypeError, "weights", (X, [Y], torch.ones(1).long()), {}),
    (ValueError, "ref_logits", (None, [Y], [1.0]), {"divergence": "jsd"}),
    (ValueError, "normalizer", (X, [Y], [1.0]), {"normalizer": "approximate"}),
    (TypeError, "divergence", (X, [Y], [1.0]), {"divergence": 3}),
    (ValueError, "value_ids", (X, [Y], [1.0]), {"value_ids": torch.zeros(3, 2).long()}),
    (ValueError, "value_weights", (X, [Y], [1.0]), {"value_weights": [1.0]}),
    (ValueError, "values", (X, [Y], [1.0]), {"values": Y}),
    (ValueError, "values", (X, [Y], [1.0]), {"values": Y[None, :, :39]}),
    (ValueError, "value_weights", (X, [Y], [1.0]), {"values": Y[None], "value_weights": [1, 2]}),
    (ValueError, "value_weights", (X, [Y], [1.0]), {"values": Y[None], "value_weights": [NAN]}),
    (
        ValueError,
        "value_ids",
        (X, [Y], [1.0]),
        {"values": Y[None, :, :2], "value_ids": torch.zeros(3, 3).long()},
    ),
    (
        TypeError,
        "value_ids",
        (X, [Y], [1.0]),
        {"values": Y[None, :, :2], "value_ids": torch.zeros(3, 2).int()},
    ),
    (ValueError, "prefix_logprobs", (X, [Y], [1.0]), {"prefix_logprobs": torch.zeros(3, 1)}),
    (TypeError, "prefix_logprobs", (X, [Y], [1.0]), {"prefix_logprobs": torch.zeros(3, 2).half()}),
    (ValueError, "mixture_prefix_logprobs", (X, [Y], [1.0]), {**PREFIX, **own(torch.zeros(3, 1))}),
    (ValueError, "mixture_prefix_logprobs", (X, [Y], [1.0]), {**PREFIX, **own(torch.zeros(2))}),
    (
        TypeError,
        "mixture_prefix_logprobs",
        (X, [Y], [1.0]),
        {**PREFIX, **own(torch.zeros(3).half())},
    ),
    (TypeError, "mixture_prefix_logprobs", (X, [Y], [1.0]), {**PREFIX, **own([0.0] * 3)}),
    (ValueError, "needs prefix_logprobs", (X, [Y], [1.0]), own(torch.zeros(3))),
    (
        ValueError,
        "needs normalizer 'exact'",
        (X, [Y], [1.0]),
        {**PREFIX, **own(torch.zeros(3)), "divergence": "jsd", "normalizer": "zero"},
    ),
    (ValueError, "logit_scales", (X, [Y], [1.0]), {"logit_scales": [1.0]}),
    (ValueError, "logit_scales", (X, [Y], [1.0]), {"logit_scales": [1.0, 0.0]}),
    (ValueError, "logit_scales", (X, [Y], [1.0]), {"logit_scales": [1.0, -2.0]}),
    (ValueError, "vocab_size", (X, [Y], [1.0]), {"vocab_size": 41}),
    (ValueError, "vocab_size", (X, [Y], [1.0]), {"vocab_size": 0}),
    (ValueError, "plausibility", (X, [Y], [1.0]), {"plausibility": -0.1}),
    (ValueError, "plausibility", (X, [Y], [1.0]), {"plausibility": 1.5}),
    (ValueError, "plausibility", (X, [Y], [1.0]), {"plausibility": [0.1] * (B + 1)}),
    (TypeError, "plausibility", (X, [Y], [1.0]), {"plausibility": torch.zeros(B).int()}),
    (
        ValueError,
        "plausibility_tensor",
        (X, [Y], [1.0]),
        {"plausibility": 0.1, "plausibility_tensor": 2},
    ),
    (
        TypeError,
        "plausibility_tensor must be a number, got str",
        (X, [Y], [1.0]),
        {"plausibility": 0.1, "plausibility_tensor": "all"},
    ),
    (
        ValueError,
        "plausibility_tensor must be between",
        (X, [Y], [1.0]),
        {"plausibility_tensor": 7},
    ),
    (ValueError, "plausibility_tensor", (None, [Y], [1.0]), {"plausibility": 0.1}),
    (ValueError, "backend", (X, [Y], [1.0]), {"backend": "cobol"}),
    (ValueError, "backend", (X, [Y], [1.0]), {"backend": ["cpu"]}),
    (ValueError, "meta", (X, [Y.to("meta")], [1.0]), {}),
]
SAMPLE_ERRORS = [
    (ValueError, "temperature", {"temperature": -0.5}),
    (ValueError, "temperature", {"temperature": NAN}),
    (ValueError, "temperature", {"temperature": [1.0, 1.0]}),
    (ValueError, "temperature", {"temperature": torch.ones(2)}),
    (TypeError, "temperature", {"temperature": "hot"}),
    (ValueError, "top_k", {"top_k": -1}),
    (TypeError, "top_k", {"top_k": 2.5}),
    (TypeError, "top_k", {"top_k": np.array([2.0, 2.0, 2.0])}),
    (TypeError, "top_k", {"top_k": np.bool_(True)}),
    (TypeError, "top_k", {"top_k": torch.tensor(2.0)}),
    (ValueError, "temperature", {"temperature": np.ones(2)}),
    (TypeError, "temperature", {"temperature": np.ones((3, 1))}),
    (TypeError, "temperature", {"temperature": torch.ones(3).half()}),
    (ValueError, "temperature", {"temperature": torch.ones(3, 1)}),
    (TypeError, "temperature", {"temperature": [torch.tensor(1.0)] * 3}),
    (ValueError, "temperature", {"temperature": 10**400}),
    (ValueError, "top_p", {"top_p": 0.0}),
    (ValueError, "top_p", {"top_p": 1.01}),
    (ValueError, "top_p", {"top_p": [0.5, 0.0, 0.5]}),
    (ValueError, "min_p", {"min_p": -0.1}),
    (ValueError, "min_p", {"min_p": 1.1}),
    (ValueError, "mask", {"mask": torch.ones(3, 39, dtype=torch.bool)}),
    (ValueError, "mask", {"mask": torch.ones(3, 3, dtype=torch.int32)}),
    (TypeError, "mask", {"mask": torch.ones(3, 40)}),
    (ValueError, "seed", {"seed": torch.zeros(2, dtype=torch.int64)}),
    (TypeError, "seed", {"seed": torch.zeros(3, dtype=torch.int32)}),
    (TypeError, "seed", {"seed": 1.5}),
    (ValueError, "seed", {"seed": torch.tensor(3)}),  # of which row would it be?
    (TypeError, "seed", {"seed": np.array([1.0, 2.0, 3.0])}),
    (ValueError, "seed", {"seed": 2**64}),
    (ValueError, "seed", {"seed": [1, 2]}),
    (TypeError, "position", {"position": 0.5}),
    (TypeError, "position", {"position": torch.zeros(3)}),
    (ValueError, "position", {"position": torch.zeros(4, dtype=torch.int64)}),
]


def describe(x):
    return x.__name__ if isinstance(x, type) else None


@pytest.mark.parametrize(("error", "says", "args", "kwargs"), LOG_PROBS_ERRORS, ids=describe)
def test_wrong_mixtures_are_refused_by_both_functions(error, says, args, kwargs):
    for function in (log_probs, sample):
        with pytest.raises(error, match=says):
            function(*args, **kwargs)


@pytest.mark.parametrize(("error", "says", "kwargs"), SAMPLE_ERRORS, ids=describe)
def test_wrong_sampling_parameters_are_refused(error, says, kwargs):
    with pytest.raises(error, match=says):
        sample(X, [Y], [1.0], **kwargs)


@pytest.mark.parametrize("name", ["total_variation", "tv", "chi_squared", "chi2", "hellinger"])
def test_divergences_that_are_not_barriers_are_refused_naming_the_five_that_work(name):
    with pytest.raises(ValueError) as error:
        log_probs(X, [Y], [1.0], divergence=name)
    for works in ("reverse_kl", "forward_kl", "jsd", "alpha", "jeffrey"):
        assert works in str(error.value)
    if name not in ("hellinger",):
        assert "finite" in str(error.value) or "barrier" in str(error.value)


@pytest.mark.parametrize("alpha", ["alpha:0", "alpha:1", "alpha:-0.5", "alpha:x", "alpha:nan"])
def test_alpha_must_be_between_0_and_1(alpha):
    with pytest.raises(ValueError, match="alpha"):
        log_probs(X, [Y], [1.0], divergence=alpha)


def test_aliases_and_objects_name_the_same_divergence(op):
    from mod_fused import divergence as d

    families = [
        ["reverse_kl", "kl", "rkl", d.ReverseKL()],
        ["forward_kl", "fkl", d.ForwardKL()],
        ["jsd", "js", "jensen_shannon", d.JensenShannonDivergence()],
        ["alpha:0.5", d.AlphaDivergence(0.5), d.AlphaDivergence()],
        ["jeffrey", "jeffreys", d.JeffreyDivergence()],
    ]
    results = []
    for family in families:
        same = [op.log_probs(X, [Y], [0.5], divergence=name) for name in family]
        assert all(torch.equal(x, same[0]) for x in same)
        results.append(same[0].numpy())
    assert len(np.unique(np.stack(results).round(4), axis=0)) == 5
