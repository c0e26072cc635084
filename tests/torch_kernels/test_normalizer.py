"""The safety net of the solver."""

from __future__ import annotations

import torch

from mod_fused.divergence import ForwardKL
from mod_fused.torch_kernels import normalizer


class WildSlope(ForwardKL):
    """Forward KL whose Newton steps all leave the bracket."""

    def log_slope(self, q):
        wild = 40.0 if q.dim() == 1 else 0.0  # where it scales a step, not where it is summed
        return super().log_slope(q) + wild


def test_bisection_alone_finds_tau():
    generator = torch.Generator().manual_seed(1)
    log_ref = torch.randn(3, 1, 64, generator=generator).mul(2).flatten(1).log_softmax(-1)
    excess = torch.rand(3, 1, 64, generator=generator)
    excess[..., 5] = 0.0
    tau = normalizer.solve(WildSlope(), log_ref.view(3, 1, 64), excess, log_ref[:, 5])
    total = (log_ref.double().exp() / (tau.double()[:, None] + excess[:, 0].double())).sum(1)
    assert (total - 1).abs().max() < 1e-5
