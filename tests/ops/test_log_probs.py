"""log pi* of every backend against the float64 oracle on identical inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import BARRIERS, DIVERGENCES, KINDS, MAX_TV, check, logits, normal, total_variation

from mod_fused import reference

pytestmark = pytest.mark.sanitized

INF = math.inf


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 999, 1024, 4097])
def test_matches_the_oracle(op, vocab, kind, divergence):
    ref, policies = logits(1, 4, vocab, 2, kind=kind, excluded=0.02)
    check(op, ref, policies, [0.625, 0.375], divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("vocab", "kind"), [(32000, "brutal"), (128256, "apart")])
@pytest.mark.slow
def test_matches_the_oracle_at_the_vocabularies_of_language_models(op, vocab, kind, divergence):
    ref, policies = logits(2, 2 if vocab < 1e5 else 1, vocab, 2, kind=kind, dtype=torch.bfloat16)
    check(op, ref, policies, [0.5, 0.5], divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.slow
def test_golden_identity_mixed_bandits_reach_the_oracle(op, divergence):
    # The optimal policies of tests/reference/test_mixture.py in bulk: pi_i = optimum of reward i,
    # rounded to float32; the mixture of the rounded ones is compared on both sides.
    rng = np.random.default_rng(3)
    for arms, count in [(2, 1), (4, 3), (17, 2), (40, 4)]:
        lr = torch.from_numpy(rng.normal(size=(20, arms)) * 1.5).float()
        rewards = rng.normal(size=(count, 20, arms)) * 2.0
        policies = [
            torch.from_numpy(
                reference.log_probs(lr, [], [], divergence=divergence, values=r[None])
            ).float()
            for r in rewards
        ]
        simplex = rng.dirichlet(np.ones(count), size=20)
        for w in (simplex, simplex * 1.5, rng.normal(size=(20, count))):
            weights = torch.from_numpy(w).float()
            mixed = check(op, lr, policies, weights, divergence=divergence)
            direct = reference.log_probs(
                lr, [], [], divergence=divergence, values=rewards, value_weights=weights
            )
            # Rounding the policies to float32 is all that separates it from the exact optimum.
            assert total_variation(mixed, direct).max() <= 1e-3


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.029, 0.03, 0.05, 0.95, 0.999])
def test_extreme_alpha_is_the_oracle_s_to_the_same_bounds(op, alpha):
    # 1/alpha magnifies whatever the deficits and their sums round off.
    divergence = f"alpha:{alpha}"
    ref, policies = logits(25, 4, 1100, 2, kind="typical")
    values = normal(25, 1, 4, 1100)
    prefix = torch.tensor([[0.0, 3.0, -2.0], [-90.0, -95.0, -85.0], [0.0] * 3, [-5.0, 60.0, -60.0]])
    calls = [
        ([0.625, 0.375], {}),
        ([1.5, -0.75], {"prefix_logprobs": prefix}),
        ([-0.5, 0.25], {"values": values}),
        ([0.5, 0.25], {"prefix_logprobs": prefix, "normalizer": "zero"}),
    ]
    for weights, options in calls:
        log_p = check(op, ref, policies, weights, divergence=divergence, **options)
        drawn = op.sample(ref, policies, weights, divergence=divergence, seed=1, **options)
        assert (drawn.logprobs - log_p[torch.arange(4), drawn.tokens]).abs().max() <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_mixed_dtypes(op, dtype, divergence):
    ref, policies = logits(4, 3, 1500, 2, dtype=dtype)
    check(op, ref, policies, [0.5, 0.5], divergence=divergence)
    check(op, ref.float(), [policies[0], policies[1].float()], [0.5, 0.5], divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 0.0],
        [0.0, 1.0],
        [0.0, 0.0],
        [1.5, 0.75],
        [1.5, -0.5],
        [-0.5, -0.25],
        [0.1, 0.2],
        [[0.5, 0.5], [2.0, -1.0], [0.0, 0.25]],
        torch.tensor([0.3, 0.6]),
        torch.tensor([[0.5, 0.5], [2.0, -1.0], [0.0, 0.25]], dtype=torch.float64),
    ],
    ids=lambda w: str(w.tolist() if isinstance(w, torch.Tensor) else w),
)
def test_weights_of_any_sign_sum_and_form(op, weights, divergence):
    ref, policies = logits(5, 3, 1100, 2, kind="typical", excluded=0.05)
    check(op, ref, policies, weights, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("policies", range(9))
def test_any_number_of_policies_up_to_8_listed_or_stacked(op, policies, divergence):
    ref, tensors = logits(6, 2, 700, policies, kind="typical")
    weights = [(-1) ** i * 0.5 / (i + 1) for i in range(policies)]
    values = normal(6, 1, 2, 700) if policies == 0 else None
    listed = check(op, ref, tensors, weights, divergence=divergence, values=values)
    if policies:
        stacked = op.log_probs(ref, torch.stack(tensors), weights, divergence=divergence)
        assert torch.equal(stacked, listed)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.5, 0.5], [2.0, -0.75], [0.0, 0.0]])
def test_without_a_reference_it_is_the_product_of_the_policies(op, weights):
    _, policies = logits(7, 3, 1025, 2, excluded=0.05)
    check(op, None, policies, weights)
    check(op, None, policies, weights, plausibility=0.01, plausibility_tensor=2)
    check(op, None, policies, weights, logit_scales=[0.5, 2.0], vocab_size=800)


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.3],
        [0.9, 0.1 + 5e-13],
        torch.tensor([0.7, 0.3]),
        torch.tensor([0.9, 0.1 + 1.5e-7]),
        torch.tensor([0.9, 0.1 + 5e-13], dtype=torch.float64),
    ],
    ids=str,
)
def test_a_reference_of_coefficient_0_is_not_looked_at(op, weights):
    ref, policies = logits(26, 4, 1100, 2, excluded=0.05)
    ref[0, 5], ref[1, 6], ref[2, 7], ref[3] = math.nan, INF, -INF, -INF
    values = normal(26, 1, 4, 3)
    ids = torch.tensor([[5, 6, 7]]).expand(4, 3).contiguous()
    for options in ({}, {"values": values, "value_ids": ids}, {"logit_scales": [0.5, 1.0, 2.0]}):
        result = check(op, ref, policies, weights, **options)
        assert not result.isnan().any()
        drawn = op.sample(ref, policies, weights, seed=1, **options)
        assert drawn.valid.all()
    named = check(op, ref, policies, weights, plausibility=0.1, plausibility_tensor=0)
    assert named.isnan().any(1).tolist() == [True, True, False, True]
    assert (named[2, 7] == -INF).all()


@pytest.mark.parametrize(
    "weights",
    [
        [0.9, 0.1 + 2e-12],
        torch.tensor([0.9, 0.1 + 3e-7]),
        torch.tensor([0.9, 0.1 + 2e-12], dtype=torch.float64),
    ],
    ids=str,
)
def test_a_reference_of_the_least_coefficient_counts(op, weights):
    ref, policies = logits(27, 3, 1100, 2)
    ref[0, 5], ref[1, 6], ref[2, 7] = math.nan, INF, -INF
    result = check(op, ref, policies, weights)
    assert result.isnan().any(1).tolist() == [True, True, False] and result[2, 7] == -INF


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_values_tilt_and_exclude(op, divergence):
    ref, policies = logits(8, 3, 1100, 1, kind="typical")
    values = normal(8, 2, 3, 1100) * 3.0
    values[0, :, 5:50] = -INF
    for value_weights in (None, [0.5, -2.0], [[1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]):
        check(
            op, ref, policies, [0.5], divergence=divergence, values=values,
            value_weights=value_weights,
        )  # fmt: skip
    check(
        op, ref, [], [], divergence=divergence, values=values.bfloat16(),
        value_weights=torch.tensor([0.25, 1.0]),
    )  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sparse_values_are_the_candidate_set(op, divergence):
    ref, policies = logits(9, 3, 1100, 1, kind="typical")
    ids = torch.stack(
        [torch.from_numpy(np.random.default_rng(b).permutation(1100)[:6]) for b in range(3)]
    )
    ids[1, 2], ids[2, 1:] = -1, -1
    values = normal(9, 2, 3, 6)
    values[0, 0, 3] = -INF
    values[:, 1, 2] = math.nan  # a padded slot is not looked at
    for value_weights in (None, [0.5, -2.0], [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]):
        result = check(
            op, ref, policies, [0.5], divergence=divergence, values=values, value_ids=ids,
            value_weights=value_weights,
        )  # fmt: skip
        assert set(np.flatnonzero(result[1] > -INF)) == set(ids[1].tolist()) - {-1}
        assert abs(result[2, ids[2, 0]]) <= 1e-6


@pytest.mark.parametrize("divergence", BARRIERS)
@pytest.mark.parametrize("kind", ["typical", "apart"])
def test_values_equal_on_many_tokens_do_not_drown_the_policies(op, kind, divergence):
    # A 0/1 score: next to it, the deficits that separate the tokens scored 1 are tiny.
    ref, policies = logits(10, 3, 2000, 2, kind=kind)
    values = (normal(10, 1, 3, 2000) > 1.0).float() * 4.0
    check(op, ref, policies, [0.5, 0.5], divergence=divergence, values=values)
    # One value for all changes nothing.
    values = torch.full((1, 3, 2000), 256.0)
    result = check(op, ref, policies, [0.5, 0.5], divergence=divergence, values=values)
    without = reference.log_probs(ref, policies, [0.5, 0.5], divergence=divergence)
    assert total_variation(result, without).max() <= MAX_TV


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_prefix_of_the_response_so_far(op, dtype, divergence):
    ref, policies = logits(11, 6, 1100, 2, kind="typical")
    prefix = torch.tensor(
        [[0, 0, 0], [-50, -52, -47], [-900, -930, -880], [-5000, -5250, -5100],
         [-5000, -4000, -4950.5], [-3, -60, -300]], dtype=dtype,
    )  # fmt: skip
    check(op, ref, policies, [0.5, 0.5], divergence=divergence, prefix_logprobs=prefix)
    check(op, ref, policies, [0.0, 0.75], divergence=divergence, prefix_logprobs=prefix)


@pytest.mark.parametrize("divergence", BARRIERS)
def test_prefix_differences_count_down_to_minus_40(op, divergence):
    ref, policies = logits(24, 6, 1100, 2, kind="mild")
    difference = torch.tensor([0.0, -4.0, -12.0, -25.0, -39.0, -60.0])
    prefix = torch.stack([torch.zeros(6), difference, difference + 1.0], dim=1)
    result = check(op, ref, policies, [0.5, 0.25], divergence=divergence, prefix_logprobs=prefix)
    same = op.log_probs(ref, policies, [0.5, 0.25], divergence=divergence)
    assert total_variation(result[1], same[1]) > 100 * MAX_TV
    prefix[:, 0] = 5.0  # a tensor of weight 0 does not decide the shift
    prefix[:, 2] = -900.0
    check(op, ref, policies, [0.5, 0.0], divergence=divergence, prefix_logprobs=prefix)


def test_long_prefixes_are_subtracted_in_float64(op):
    # In float32 the difference of two log-probabilities near -1e5 would be off by 0.01.
    ref, policies = logits(12, 1, 500, 1, kind="typical")
    prefix = torch.tensor([[-123456.789012, -123457.123456]], dtype=torch.float64)
    check(op, ref, policies, [0.5], divergence="jeffrey", prefix_logprobs=prefix)
    check(op, ref, policies, [0.5], divergence="forward_kl", prefix_logprobs=prefix)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logit_scales_are_applied_before_the_softmax(op, divergence):
    ref, policies = logits(13, 3, 1100, 2, kind="typical")
    check(op, ref, policies, [0.5, 0.5], divergence=divergence, logit_scales=[0.5, 1.0, 1.75])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_plausibility_drops_tokens_far_below_the_most_likely(op, tensor, divergence):
    ref, policies = logits(14, 3, 1100, 2, kind="typical", excluded=0.05)
    for p in (1.0, 0.1, 1e-4):
        result = check(
            op, ref, policies, [1.5, 0.0], divergence=divergence, plausibility=p,
            plausibility_tensor=tensor, logit_scales=[1.0, 0.5, 1.25],
        )  # fmt: skip
        assert (result > -INF).sum() < 3 * 1100


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_plausibility_by_row_is_that_of_each_row_alone(op, divergence):
    ref, policies = logits(28, 5, 1100, 2, kind="apart", excluded=0.05)
    shares, options = [0.0, 1e-2, 1.0, 1e-5, 0.0], {"divergence": divergence}
    policies[0][0, 7] = -INF  # row 0 has no cut: what is left is the support
    for given in (shares, torch.tensor(shares), torch.tensor(shares, dtype=torch.float64)):
        result = check(op, ref, policies, [0.5, 0.5], plausibility=given, **options)
        for b, share in enumerate(shares):
            alone = op.log_probs(
                ref[b : b + 1], [x[b : b + 1] for x in policies], [0.5, 0.5],
                plausibility=share or None, **options,
            )  # fmt: skip
            assert torch.equal(result[b], alone[0])
    every = op.log_probs(ref, policies, [0.5, 0.5], plausibility=torch.tensor(0.01), **options)
    assert torch.equal(every, op.log_probs(ref, policies, [0.5, 0.5], plausibility=0.01, **options))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_plausibility_of_a_row_reads_its_tensor_where_it_is_on(op, divergence):
    ref, policies = logits(29, 5, 40, 2)
    policies[1][:, 3] = float("nan")
    shares = torch.tensor([0.0, 0.1, float("nan"), -0.1, 1.5])
    result = op.log_probs(
        ref, policies, [0.5, 0.0], divergence=divergence, plausibility=shares, plausibility_tensor=2
    )
    assert result.isnan().any(1).tolist() == [False, True, True, True, True]
    drawn = op.sample(ref, policies[:1], [0.5], divergence=divergence, plausibility=shares, seed=1)
    assert drawn.valid.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("divergence", BARRIERS)
@pytest.mark.parametrize("levels", [(9000.0, 9000.0, 9000.0), (-3000.0, 700.0, 0.0)])
def test_logits_far_from_zero_lose_nothing_to_their_level(op, levels, divergence):
    # Reverse KL sums raw logits in float32 (design §3), and does lose what their size rounds away.
    ref, policies = logits(16, 2, 1100, 2, kind="typical")
    ref, *policies = (x + level for x, level in zip([ref, *policies], levels, strict=True))
    check(op, ref, policies, [0.5, 0.25], divergence=divergence)
    values = normal(16, 1, 2, 1100)
    check(op, ref, policies, [0.5, 0.25], divergence=divergence, values=values)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padded_and_unequal_vocabularies_count_their_common_columns(op, divergence):
    ref, policies = logits(15, 3, 1100, 2)
    ref[:, 1050:] = math.nan  # never looked at
    short = [ref, [policies[0][:, :1060], policies[1][:, :1033]]]
    cut = [ref[:, :1033], [p[:, :1033] for p in policies]]
    result = check(op, *short, [0.5, 0.5], divergence=divergence)
    assert result.shape == (3, 1033)
    same = op.log_probs(*cut, [0.5, 0.5], divergence=divergence, vocab_size=1033)
    assert total_variation(result, same).max() <= MAX_TV
    assert check(op, *short, [0.5, 0.5], divergence=divergence, vocab_size=7).shape == (3, 7)


def test_strided_views_need_no_copy_to_be_right(op):
    storage = normal(16, 3, 5, 1200) * 3.0
    storage[:, :, 1100:] = math.nan
    views = storage[:, ::2, :1100]  # [M+1, B, V], rows two apart and padded
    for divergence in DIVERGENCES:
        check(op, views[0], views[1:], [0.5, 0.5], divergence=divergence)
        check(op, views[0], list(views[1:]), [0.5, 0.5], divergence=divergence)
        one_row = storage[0, :1, :1100].expand(3, 1100)
        check(op, one_row, [views[1], views[2]], [0.5, 0.5], divergence=divergence)
        check(op, storage[0, :3, 3:1003], [storage[1, :3, 1:1001]], [0.5], divergence=divergence)


@pytest.mark.parametrize("divergence", BARRIERS)
@pytest.mark.parametrize("kind", ["mild", "typical", "apart"])
def test_zero_normalizer_is_equation_6_as_printed(op, kind, divergence):
    ref, policies = logits(17, 4, 1100, 2, kind=kind)
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.5], [1.0, 0.25], [3.0, -1.0]])
    result = check(op, ref, policies, weights, divergence=divergence, normalizer="zero")
    exact = op.log_probs(ref, policies, weights, divergence=divergence)
    assert kind == "mild" or total_variation(result[0], exact[0]) > 100 * MAX_TV


def test_zero_normalizer_rows_without_an_inverse_are_invalid(op):
    ref, policies = logits(18, 2, 500, 1, kind="typical")
    weights = torch.tensor([[8.0], [0.5]])
    for divergence, first in (("jsd", 8.0), ("alpha:0.5", 8.0), ("alpha:0.01", 500.0)):
        weights[0] = first
        result = check(op, ref, policies, weights, divergence=divergence, normalizer="zero")
        assert result[0].isnan().all() and not result[1].isnan().any()


def test_jeffrey_at_zero_z_with_a_huge_u_is_one_token(op):
    # A negative weight on a policy that gave up tokens: u = e^40, and log pi* differs by as much.
    ref, policy = torch.zeros(1, 3), torch.tensor([[0.0, -40.0, -41.0]])
    result = check(op, ref, [policy], [-0.5], divergence="jeffrey", normalizer="zero")
    assert result[0, 2] == 0.0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_normalizer_makes_no_difference_to_reverse_kl_alone(op, divergence):
    ref, policies = logits(19, 2, 300, 2, kind="typical")
    exact, zero = (
        op.log_probs(ref, policies, [0.5, 0.25], divergence=divergence, normalizer=n)
        for n in ("exact", "zero")
    )
    assert torch.equal(exact, zero) == (divergence == "reverse_kl")


@pytest.mark.parametrize("divergence", BARRIERS)
def test_identical_policies_and_a_single_policy_give_themselves(op, divergence):
    # The bracket's two ends meet here; rounding inverts them.
    ref, (policy,) = logits(20, 4, 3000, 1, kind="brutal")
    itself = torch.log_softmax(policy.double(), dim=-1)
    for tensors, w in (([policy], [1.0]), ([policy, policy], [0.5, 0.5])):
        result = check(op, ref, tensors, w, divergence=divergence)
        assert total_variation(result, itself).max() <= MAX_TV
    result = check(op, policy, [policy, policy], [0.5, 0.25], divergence=divergence)
    assert total_variation(result, itself).max() <= MAX_TV


@pytest.mark.parametrize("divergence", BARRIERS)
def test_tokens_the_reference_gives_less_than_e_to_minus_80_leave_the_support(op, divergence):
    ref, policies = logits(21, 2, 200, 1, kind="mild")
    ref[:, 7], ref[:, 8] = ref.amax() - 70.0, ref.amax() - 100.0
    result = check(op, ref, policies, [1.0], divergence=divergence)
    assert (result[:, 7] > -INF).all() and (result[:, 8] == -INF).all()
    assert (op.log_probs(ref, policies, [1.0])[:, 8] > -INF).all()  # reverse KL has no such rule


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_log_ratios_of_hundreds_neither_overflow_nor_vanish(op, divergence):
    ref, policies = logits(22, 3, 400, 2, kind="mild")
    policies[0][:, 10:200] -= 300.0
    policies[1][:, 300:] -= 3000.0
    policies[1][1, 3] += 200.0
    check(op, ref, policies, [0.5, 0.5], divergence=divergence)
    check(op, ref, policies, [1.0, 0.0], divergence=divergence)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.75"])
@pytest.mark.slow
def test_textbook_bisection_of_z_in_float32_fails_where_the_op_does_not(op, divergence):
    ref, policies = logits(23, 2, 32000, 2, kind="apart")
    check(op, ref, policies, [0.5, 0.5], divergence=divergence)
    lr, *lps = (torch.log_softmax(x, dim=-1) for x in (ref, *policies))
    slope, inverse = {
        "forward_kl": (lambda x: -1 / x, lambda y: -1 / y),
        "jsd": (
            lambda x: math.log(2) + torch.log(x / (1 + x)),
            lambda y: 1 / (2 * torch.exp(-y) - 1),
        ),
        "alpha:0.75": (lambda x: (1 - x**-0.75) / 0.75, lambda y: (1 - 0.75 * y) ** (-1 / 0.75)),
    }[divergence]
    u = sum(0.5 * slope(torch.exp(lp - lr)) for lp in lps)
    supremum = {"forward_kl": 0.0, "jsd": math.log(2), "alpha:0.75": 1 / 0.75}[divergence]
    low = u.amax(dim=-1, keepdim=True) - supremum
    high = u.amax(dim=-1, keepdim=True)
    for _ in range(200):
        z = (low + high) / 2
        mass = (lr.exp() * inverse(u - z)).sum(dim=-1, keepdim=True)
        low, high = torch.where(mass > 1, z, low), torch.where(mass > 1, high, z)
    naive = (lr.exp() * inverse(u - z)).double()
    naive = naive / naive.sum(dim=-1, keepdim=True)
    expected = np.exp(reference.log_probs(ref, policies, [0.5, 0.5], divergence=divergence))
    tv = 0.5 * np.abs(naive.numpy() - expected).sum(axis=-1)
    assert not tv.max() <= 0.1  # far off, or NaN, in a row


@pytest.mark.parametrize("vocab", [300, 3000])
def test_sums_that_overflow_downwards_exclude_a_token_and_no_row(op, vocab):
    # Some mask tokens with the least float instead of -inf; weights that sum to more than one
    # make it overflow.
    ref, policies = logits(231, 2, vocab, 2, kind="typical")
    for x in (ref, *policies):
        x[0, 5::7] = -3.2e38
    weights = [2.5, -0.5]
    expected = reference.log_probs(ref, policies, weights)
    found = op.log_probs(ref, policies, weights).double().numpy()
    assert total_variation(found, expected).max() <= 2e-5
    assert (found[0, 5::7] < -1e38).all()
    assert op.sample(ref, policies, weights, seed=1).valid.all()
