"""The divergences measured from the mixture's own mass of the response so far.

With log m = mixture_prefix - prefix_ref the next token's ratio x = pi*(s) / pi_ref(s) satisfies

    f'(m x) = sum_i w_i f'(e^d_i) + tilt - Z,    d_i = (log pi_i + prefix_i) - (lr + prefix_ref),

the equation of a token for another divergence, whose derivative is f'(m x), and for log-ratios
d_i - log m (docs/concepts.md). Its deficit is scaled by kappa, so that float32 holds it whatever m
is.

- Forward KL and alpha: f' is a power. kappa = m^alpha leaves the deficit as it was.
- JSD: kappa = max(1, m). It tends to forward KL as m grows, to reverse KL as m falls.
- Jeffrey: kappa = min(1, m). It tends to reverse KL as m grows, to forward KL as m falls.

m counts as less where all policies' ratios lie so far below it that one token takes everything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..divergence import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    JeffreyDivergence,
    JensenShannonDivergence,
)

#: The range of float32, the same in every backend: of a deficit's exponent at a token, at the
#: policies' prefixes, and of kappa where it multiplies something else.
_LARGEST_EXPONENT, _LARGEST_PREFIX_EXPONENT, _LARGEST_SCALE = 80.0, 40.0, 70.0


class RowFunctions(NamedTuple):
    """What the mathematics of rows needs of the divergence; tensors are float64 [b]."""

    divergence: Any  # its three functions, of d - log_mass and of kappa times the deficit
    log_mass: Tensor  # what log-ratios are measured from
    least_log_ratio: Tensor  # d - log_mass is clamped below here
    tilt_scale: Tensor  # kappa


def own_mass(divergence: Divergence, log_mass: Tensor, least: Tensor) -> RowFunctions:
    """The divergence for rows with log m, float64 [b], and the least prefix_i - prefix_ref, float64
    [b], of the policies that count. It must be built in, and not reverse KL."""
    kind = type(divergence)
    functions: Any = divergence
    alpha = divergence.alpha if isinstance(divergence, AlphaDivergence) else 1.0
    if kind is JensenShannonDivergence:  # its deficit is linear below d = 0
        least = least.clamp(min=0.0)
    most = least + _LARGEST_PREFIX_EXPONENT / alpha
    floor = torch.full_like(log_mass, -_LARGEST_EXPONENT / alpha)
    log_scale = alpha * torch.minimum(log_mass, most)
    if kind is JensenShannonDivergence:
        log_scale = log_scale.clamp(min=0.0)
        log_mass = torch.where(log_mass < 0.0, log_mass, log_scale)
        functions, floor = _JensenShannonOfMass(divergence, log_mass), floor - torch.inf
    elif kind is JeffreyDivergence:
        log_scale = log_scale.clamp(max=0.0)
        log_mass = torch.where(log_scale < 0.0, log_scale, log_mass)
        functions, floor = _JeffreyOfMass(divergence, log_mass), floor - log_mass.clamp(min=0.0)
    else:
        assert kind in (ForwardKL, AlphaDivergence)
        log_mass = log_scale / alpha
    tilt_scale = torch.exp(log_scale.clamp(max=_LARGEST_SCALE))
    return RowFunctions(functions, log_mass, floor, tilt_scale)


class _OfMass:
    """The three functions of d - log m or of y = kappa q, in float64; rows come first."""

    def __init__(self, base: Divergence, log_mass: Tensor) -> None:
        self.base, self.bounded = base, base.bounded
        self.supremum, self._log_mass = base.supremum, log_mass

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x in float64, and log m against it."""
        return x.double(), self._log_mass.view(-1, *[1] * (x.dim() - 1))


class _JensenShannonOfMass(_OfMass):
    """kappa = max(1, m)."""

    def deficit(self, d: Tensor) -> Tensor:
        d, log_m = self._at(d)
        k = log_m.clamp(min=0.0)
        scaled = torch.exp(k.clamp(max=_LARGEST_SCALE)) * self.base.deficit(d + log_m)
        # The deficit is e^-(d + log m) there: m times it is e^-d, however large m is.
        power = torch.exp((-d).clamp(max=_LARGEST_EXPONENT))
        return torch.where((k > 0.0) & (d + k > 16.0), power, scaled)

    def log_ratio(self, y: Tensor) -> Tensor:
        y, log_m = self._at(y)
        q = y * torch.exp(-log_m.clamp(min=0.0))
        # log(expm1(q) / q) keeps its digits where m is so large that q underflows.
        rest = torch.where(q < 1e-6, 0.5 * q, q + torch.log(-torch.expm1(-q) / q))
        return torch.where(log_m < 0.0, self.base.log_ratio(y) - log_m, -torch.log(y) - rest)

    def log_slope(self, y: Tensor) -> Tensor:
        y64, log_m = self._at(y)
        above = y64 * torch.exp(-log_m.clamp(min=0.0)) + 2.0 * self.log_ratio(y)
        return torch.where(log_m < 0.0, self.base.log_slope(y64) - log_m, above)


class _JeffreyOfMass(_OfMass):
    """kappa = min(1, m)."""

    def deficit(self, d: Tensor) -> Tensor:
        d, log_m = self._at(d)
        power = torch.exp((-d - log_m.clamp(min=0.0)).clamp(max=_LARGEST_EXPONENT))
        return power - torch.exp(log_m.clamp(max=0.0)) * (d + log_m + 1.0)

    def log_ratio(self, y: Tensor) -> Tensor:
        y, log_m = self._at(y)
        q = y * torch.exp(-log_m.clamp(max=0.0))
        # v = 1/x solves v + log v = q + 1; from 1e15 on it is q, and 1 / (m x) is y.
        near = self.base.log_ratio(q.clamp(max=1e15)) - log_m
        return torch.where(q > 1e15, -torch.log(y), near)

    def log_slope(self, y: Tensor) -> Tensor:
        _, log_m = self._at(y)
        log_ratio = self.log_ratio(y)
        above = torch.nn.functional.softplus(log_ratio + log_m)
        return 2.0 * log_ratio + log_m.clamp(min=0.0) - above
