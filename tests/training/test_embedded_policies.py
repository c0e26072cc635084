"""f-DPO of the embedded world: the slope of every divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mod_fused.divergence import DIVERGENCES
from mod_fused.training import embedded_policies as train

# f' as printed, a function of x = pi / pi_ref.
F_PRIME = {
    "reverse_kl": lambda x: np.log(x) + 1.0,
    "forward_kl": lambda x: -1.0 / x,
    "jsd": lambda x: np.log(2.0) + np.log(x / (1.0 + x)),
    "alpha:0.5": lambda x: (1.0 - x**-0.5) / 0.5,
    "jeffrey": lambda x: np.log(x) - 1.0 / x + 1.0,
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_slope_is_f_prime_and_goes_on_as_a_line_that_pulls(divergence):
    d = torch.linspace(-3.9, 6.0, 60, dtype=torch.float64)
    slope = train.slope_of(divergence)
    offset = slope(d) - torch.from_numpy(F_PRIME[divergence](d.exp().numpy()))
    assert float(offset.max() - offset.min()) <= 1e-5
    far = torch.tensor([-4.1, -30.0, -200.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(slope(far).sum(), far)
    assert bool(torch.isfinite(slope(far)).all()) and bool((gradient > 0.5).all())
    near = slope(torch.tensor([-4.0 - 1e-3, -4.0 + 1e-3], dtype=torch.float64))
    assert 0.0 < float(near[1] - near[0]) < 0.2  # no step where the line begins


def test_an_alias_has_the_same_slope_and_an_unknown_divergence_is_refused():
    d = torch.linspace(-8.0, 3.0, 20)
    assert torch.equal(train.slope_of("fkl")(d), train.slope_of("forward_kl")(d))
    assert torch.equal(train.slope_of("kl")(d), d)
    with pytest.raises(ValueError, match="chi"):
        train.slope_of("chi_squared")
