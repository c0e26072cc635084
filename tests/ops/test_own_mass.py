"""The mixture's own mass of the response so far (`mixture_prefix_logprobs`) on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import BARRIERS, MAX_TV, check, logits, normal, total_variation

from mod_fused import reference

pytestmark = pytest.mark.sanitized

ALL = (*BARRIERS, "alpha:0.05", "alpha:0.01")


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_own_mass_is_the_oracle_s(op, dtype, divergence):
    ref, policies = logits(51, 6, 1100, 2, kind="typical")
    prefix = torch.tensor(
        [[0, 0, 0], [-50, -52, -47], [-900, -890, -905], [-30, -60, -10], [-5, -5, -5],
         [-3, -13, -23]], dtype=dtype,
    )  # fmt: skip
    own = torch.tensor([0.0, -51.0, -893.0, -40.0, 1.0, -9.0], dtype=dtype)
    for weights in ([0.5, 0.5], [0.75, 0.75], [1.5, -0.5]):
        check(
            op, ref, policies, weights, divergence=divergence, prefix_logprobs=prefix,
            mixture_prefix_logprobs=own,
        )  # fmt: skip


# Not alpha 0.01: where m lies 200 nats from the policies' own, Q is a hundred times tau there.
@pytest.mark.parametrize("divergence", (*BARRIERS, "alpha:0.05"))
@pytest.mark.parametrize("log_mass", [-500.0, -100.0, -20.0, 20.0, 100.0, 500.0])
def test_masses_and_prefixes_up_to_500_nats(op, log_mass, divergence):
    # `check` does not fit: some tokens that float32 calls impossible have 1e-40 in the oracle.
    shifts = [(0.0, 0.0), (-80.0, -150.0), (150.0, -20.0), (500.0, 500.0), (-500.0, 0.0)]
    shifts += [(log_mass, log_mass + 3.0), (log_mass - 60.0, log_mass + 60.0)]
    ref, policies = logits(52, len(shifts), 4096, 2, kind="typical")
    prefix = torch.tensor([[-700.0, -700.0 + x, -700.0 + y] for x, y in shifts])
    own = torch.full((len(shifts),), -700.0 + log_mass)
    for weights in ([0.625, 0.375], [1.5, -0.5]):
        options = {"prefix_logprobs": prefix, "mixture_prefix_logprobs": own}
        got = op.log_probs(ref, policies, weights, divergence=divergence, **options)
        expected = reference.log_probs(ref, policies, weights, divergence=divergence, **options)
        assert total_variation(got, expected).max() <= MAX_TV
        assert np.abs(got.double().exp().sum(1).numpy() - 1.0).max() <= 1e-5


@pytest.mark.parametrize("divergence", BARRIERS)
def test_a_corner_is_the_policy_itself(op, divergence):
    ref, policies = logits(53, 5, 1100, 2, kind="typical")
    own = torch.tensor([0.0, -8.0, -70.0, -300.0, 40.0])
    prefix = torch.stack([torch.tensor([0.0, -2.0, -90.0, -280.0, 0.0]), own, 2.0 * own], dim=1)
    got = op.log_probs(
        ref, policies, [1.0, 0.0], divergence=divergence, prefix_logprobs=prefix,
        mixture_prefix_logprobs=own,
    )  # fmt: skip
    assert total_variation(got, torch.log_softmax(policies[0].double(), 1)).max() <= MAX_TV
    without = op.log_probs(ref, policies, [1.0, 0.0], divergence=divergence, prefix_logprobs=prefix)
    assert total_variation(got, without).max() > 100 * MAX_TV


@pytest.mark.parametrize("divergence", BARRIERS)
def test_values_plausibility_and_scales_with_own_mass(op, divergence):
    ref, policies = logits(54, 4, 1100, 2, kind="typical")
    values = normal(54, 2, 4, 1100)
    values[0, :, 7] = -math.inf
    options = {
        "prefix_logprobs": torch.tensor([[-9.0, -7, -12], [0, -30, 5], [-40, -20, -30], [0, 9, 9]]),
        "mixture_prefix_logprobs": torch.tensor([-8.0, -11.0, -25.0, 9.0]),
        "logit_scales": [1.0, 0.75, 1.25], "plausibility": 1e-4, "plausibility_tensor": 1,
    }  # fmt: skip
    args = ref, policies, [0.5, 0.75]
    check(op, *args, divergence=divergence, values=values, value_weights=[0.5, -1.0], **options)
    ids = torch.arange(4)[:, None] + torch.tensor([[0, 3, 900, 17, 2, 1000]])
    check(
        op, *args, divergence=divergence, values=values[:, :, :6].contiguous(), value_ids=ids,
        **options,
    )  # fmt: skip


def test_reverse_kl_does_not_depend_on_it(op):
    ref, policies = logits(55, 2, 500, 2)
    prefix, own = torch.tensor([[0.0, 5.0, -9.0]] * 2), torch.tensor([3.0, math.nan])
    got = op.log_probs(
        ref, policies, [0.5, 0.25], prefix_logprobs=prefix, mixture_prefix_logprobs=own
    )
    assert torch.equal(got, op.log_probs(ref, policies, [0.5, 0.25]))


@pytest.mark.parametrize("divergence", BARRIERS)
def test_a_mass_that_is_not_finite_invalidates_its_row(op, divergence):
    ref, policies = logits(56, 4, 500, 2)
    prefix, own = torch.zeros(4, 3), torch.tensor([0.0, math.nan, math.inf, -math.inf])
    options = {"prefix_logprobs": prefix, "mixture_prefix_logprobs": own}
    check(op, ref, policies, [0.5, 0.25], divergence=divergence, **options)
    drawn = op.sample(ref, policies, [0.5, 0.25], divergence=divergence, seed=1, **options)
    assert drawn.valid.tolist() == [True, False, False, False]


@pytest.mark.parametrize("divergence", BARRIERS)
@pytest.mark.parametrize("log_mass", [-900.0, 900.0])
def test_a_mass_of_the_reference_alone(op, log_mass, divergence):
    ref, policies = logits(58, 2, 500, 1)
    prefix, own = torch.zeros(2, 2), torch.full((2,), log_mass)
    options = {"prefix_logprobs": prefix, "mixture_prefix_logprobs": own}
    got = op.log_probs(ref, policies, [0.0], divergence=divergence, **options)
    assert total_variation(got, torch.log_softmax(ref.double(), 1)).max() <= MAX_TV


def test_the_mass_may_be_a_strided_tensor(op):
    ref, policies = logits(57, 3, 500, 2)
    prefix = torch.tensor([[0.0, 2.0, -5.0, 1.0], [3.0, 1.0, 4.0, 2.0], [0.0, -8.0, -6.0, -7.0]])
    check(
        op, ref, policies, [0.5, 0.25], divergence="jsd", prefix_logprobs=prefix[:, :3],
        mixture_prefix_logprobs=prefix[:, 3],
    )  # fmt: skip
