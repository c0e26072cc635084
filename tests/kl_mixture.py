"""A divergence of one's own: lambda KL(p || ref) + (1 - lambda) KL(ref || p), the example of the
README, in torch and as Triton device functions."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from mod_fused.triton_kernels.elementary import wright_omega

from mod_fused.divergence import Divergence
from mod_fused.divergence import wright_omega as torch_wright_omega

LAMBDA = 0.25
RATIO = LAMBDA / (1.0 - LAMBDA)

# f'(x) = lambda log x - (1 - lambda) / x, so with v = 1/x: q = (1 - lambda) v + lambda log v, and
# omega = v / RATIO solves omega + log omega = q / lambda - log RATIO.
LAMBDA_ = tl.constexpr(LAMBDA)
RATIO_ = tl.constexpr(RATIO)
LOG_RATIO_ = tl.constexpr(math.log(RATIO))


@triton.jit
def deficit(d, a):
    # Tensors before constants: Triton's interpreter wants it so.
    return tl.exp(-d) * (1.0 - LAMBDA_) - d * LAMBDA_


@triton.jit
def log_ratio(q, a):
    z = q / LAMBDA_ - LOG_RATIO_
    omega = wright_omega(z)
    return tl.where(z > 0.0, -tl.log(omega), omega - z) - LOG_RATIO_


@triton.jit
def log_slope(q, a):
    log_x = log_ratio(q, a)
    return log_x * 2.0 - tl.log(tl.exp(log_x) * LAMBDA_ + (1.0 - LAMBDA_))


class KLMixture(Divergence):
    name = "kl_mixture"
    triton = (deficit, log_ratio, log_slope)

    def deficit(self, d: torch.Tensor) -> torch.Tensor:
        return (1.0 - LAMBDA) * torch.exp(-d) - LAMBDA * d

    def log_ratio(self, q: torch.Tensor) -> torch.Tensor:
        z = q / LAMBDA - math.log(RATIO)
        omega = torch_wright_omega(z)
        return torch.where(z > 0, -torch.log(omega), omega - z) - math.log(RATIO)

    def log_slope(self, q: torch.Tensor) -> torch.Tensor:
        log_x = self.log_ratio(q)
        return 2.0 * log_x - torch.log(1.0 - LAMBDA + LAMBDA * torch.exp(log_x))
