"""The race of tokens."""

from __future__ import annotations

import torch

from mod_fused.torch_kernels import draw


def test_a_zero_mass_loses_to_a_mass_whose_quotient_overflows():
    arrival = torch.ones(1, 3)
    quotients = draw._quotients(arrival, torch.tensor([[0.0, 1e-44, 0.0]]))
    assert quotients.argmin(1).tolist() == [1]
