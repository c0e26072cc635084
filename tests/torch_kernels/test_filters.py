"""The threshold of a filter, against sorted keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import normal

from mod_fused.torch_kernels import filters
from mod_fused.torch_kernels.vocabulary import WHOLE


def expected(key: np.ndarray, mass: np.ndarray, target: int) -> float:
    """Of one row: down the sorted keys until their mass is enough."""
    order = np.argsort(-key, kind="stable")
    enough = mass[order].cumsum() >= min(target, mass.sum())
    return float(key[order][enough.argmax()])


@pytest.mark.parametrize("target", [1, 2, 17, 500, 2**39, 2**45])
def test_the_threshold_is_that_of_sorted_keys(target):
    key = normal(target % 97, 5, 700) * torch.tensor([[1.0], [1e-3], [1e30], [3.0], [1e-42]])
    key[3] = key[3].round()  # ties, and zeros of both signs
    key[:, ::7] = -torch.inf
    ones = torch.ones(5, 700, dtype=torch.int64)
    for mass in (
        ones,
        (torch.rand(5, 700, generator=torch.Generator().manual_seed(3)) * 2**40).long(),
    ):
        found = filters._reaching(key, mass, torch.full((5,), target), WHOLE)
        for b in range(5):
            assert float(found[b]) == expected(key[b].numpy(), mass[b].numpy(), target)
