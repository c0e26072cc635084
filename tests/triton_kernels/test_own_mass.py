"""The kernels' own mass in the interpreter: the divergences with functions of their own."""

from __future__ import annotations

import pytest
import torch
from cases import MAX_TV, logits, total_variation

import mod_fused
from mod_fused import reference

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("divergence", ["jsd", "jeffrey"])
def test_own_mass_of_small_and_large_m_is_the_oracle_s(divergence):
    ref, policies = logits(61, 3, 300, 2, kind="typical")
    own = torch.tensor([-25.0, 0.5, 30.0])
    options = {
        "divergence": divergence,
        "prefix_logprobs": torch.stack([torch.zeros(3), own + 1.0, own - 2.0], dim=1),
        "mixture_prefix_logprobs": own,
    }
    got = mod_fused.log_probs(ref, policies, [0.5, 0.75], backend="triton", **options)
    expected = reference.log_probs(ref, policies, [0.5, 0.75], **options)
    assert total_variation(got, expected).max() <= MAX_TV
