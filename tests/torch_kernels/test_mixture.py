"""log pi* where float32 alone would lose it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import check, normal

from mod_fused import log_probs, reference


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5", "jeffrey"])
def test_levels_far_from_zero_leave_the_differences(divergence):
    ref, policy = torch.tensor([[1e17, 1e17, -1e17]]), torch.tensor([[0.0, 3.0, 1.0]])
    got = log_probs(ref, [policy], [0.5], divergence=divergence, backend="torch")
    expected = reference.log_probs(ref, [policy], [0.5], divergence=divergence)
    assert abs(got[0].double().exp().numpy() - np.exp(expected[0])).max() < 1e-5


def test_without_a_normaliser_rows_beside_the_pole_keep_their_digits() -> None:
    ref, policy, noise = normal(3, 3, 2000, 6)
    signs = torch.where(normal(4, 2000, 6) > 0, 50.0, -50.0)
    arguments = ref, [policy], [0.4]
    options = {"values": (signs + 0.3 * noise)[None], "normalizer": "zero"}

    class Torch:
        log_probs = staticmethod(lambda *x, **y: log_probs(*x, **y, backend="torch"))

    check(Torch, *arguments, divergence="alpha:0.02", **options)
