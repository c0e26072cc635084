"""The kernels' plausibility by row in the interpreter, log-linear and off reverse KL."""

from __future__ import annotations

import pytest
import torch
from cases import MAX_TV, logits, total_variation

import mod_fused
from mod_fused import reference

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("tensor", [0, 2])
def test_each_row_has_its_own_plausibility(divergence, tensor):
    ref, policies = logits(62, 4, 300, 2, kind="typical")
    policies[1][3, 5] = float("nan")  # of weight 0: read only where plausibility is on
    options = {"divergence": divergence, "plausibility_tensor": tensor}
    options["plausibility"] = torch.tensor([0.0, 0.01, 0.5, 0.0])
    got = mod_fused.log_probs(ref, policies, [0.75, 0.0], backend="triton", **options)
    expected = reference.log_probs(ref, policies, [0.75, 0.0], **options)
    assert (got > -torch.inf).numpy().tolist() == (expected > -torch.inf).tolist()
    assert total_variation(got, expected).max() <= MAX_TV


@pytest.mark.parametrize("tensor", [0, 2])
def test_a_plausibility_out_of_range_or_of_a_broken_tensor_makes_its_row_invalid(tensor):
    ref, policies = logits(63, 4, 300, 2)
    broken = (ref, *policies)[tensor]
    broken[2, 5] = float("nan")
    result = mod_fused.sample(
        ref, policies, [1.0, 0.0], seed=1, backend="triton", plausibility_tensor=tensor,
        plausibility=torch.tensor([-0.1, 1.5, 0.5, 0.0]),
    )  # fmt: skip
    assert result.valid.tolist() == [False, False, False, True]
