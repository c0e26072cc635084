"""Divergences that users register."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import logits
from kl_mixture import LAMBDA, KLMixture
from scipy.optimize import brentq
from scipy.special import log_softmax

import mod_fused
from mod_fused import divergence as divergences
from mod_fused.divergence import Divergence, ForwardKL


@pytest.fixture
def kl_mixture():
    """Registered for the duration of a test."""
    registered = mod_fused.register_divergence(KLMixture())
    yield registered
    del divergences._CANONICAL[registered.name]


def exact(ref: torch.Tensor, policies: list[torch.Tensor], weights: list[float]) -> np.ndarray:
    """pi* of one row from f' alone, in float64, every inverse by root finding."""
    log_ref = log_softmax(ref.double().numpy())
    ratios = [log_softmax(p.double().numpy()) - log_ref for p in policies]

    def slope(d):  # f'(e^d)
        return LAMBDA * d - (1.0 - LAMBDA) * np.exp(-d)

    u = sum(w * slope(d) for w, d in zip(weights, ratios, strict=True))

    def log_ratios(z):
        return np.array([brentq(lambda d, y=y: slope(d) - y, -100, 200, xtol=1e-13) for y in u - z])

    z = brentq(lambda z: np.log(np.exp(log_ref + log_ratios(z)).sum()), -30, 30, xtol=1e-12)
    return np.exp(log_ref + log_ratios(z))


def test_a_registered_divergence_equals_its_definition_and_cpu_refuses_it(op, kl_mixture):
    ref, policies = logits(7, 2, 40, 2, kind="typical")
    if op.backend == "cpu":
        with pytest.raises(ValueError, match="does not know the registered divergence"):
            op.log_probs(ref, policies, [0.5, 0.4], divergence="kl_mixture")
        return
    for divergence in ("kl_mixture", kl_mixture):
        got = op.log_probs(ref, policies, [0.5, 0.4], divergence=divergence).double().exp().numpy()
        for row in range(2):
            expected = exact(ref[row], [p[row] for p in policies], [0.5, 0.4])
            assert 0.5 * np.abs(got[row] - expected).sum() <= 2e-5


def test_the_default_backend_is_one_that_knows_it(kl_mixture):
    ref, policies = logits(8, 3, 2000, 2)
    arguments = ref, policies, [0.5, 0.5]
    drawn = mod_fused.sample(*arguments, divergence="kl_mixture", seed=3)
    explicit = mod_fused.sample(*arguments, divergence=kl_mixture, seed=3, backend="torch")
    assert drawn.valid.all() and torch.equal(drawn.tokens, explicit.tokens)


def named(name: str, **changes: object) -> Divergence:
    return type("Changed", (KLMixture,), {"name": name, **changes})()


@pytest.mark.parametrize(
    ("divergence", "error", "message"),
    [
        (ForwardKL, TypeError, "got type"),
        (named("jsd"), ValueError, "taken"),
        (named("fkl"), ValueError, "taken"),
        (named("alpha"), ValueError, "taken"),
        (named("Two Words"), ValueError, "lower-case identifier"),
        (named("mine", deficit=Divergence.deficit), TypeError, "does not define deficit"),
        (named("mine", triton=(1, 2)), ValueError, "got 2 of them"),
        (named("mine", deficit=lambda self, d: d), ValueError, "must decrease"),
        (named("mine", bounded=True), ValueError, "must be positive"),
        (named("mine", log_ratio=lambda self, q: -q), ValueError, "not the inverse"),
        (named("mine", log_slope=lambda self, q: -q), ValueError, "log_slope"),
    ],
)
def test_what_cannot_be_a_divergence_is_refused(divergence, error, message):
    before = dict(divergences._CANONICAL)
    with pytest.raises(error, match=message):
        mod_fused.register_divergence(divergence)
    assert divergences._CANONICAL == before


def test_an_object_that_is_not_registered_is_refused():
    ref, policies = logits(9, 1, 8, 1)
    with pytest.raises(TypeError, match="register_divergence"):
        mod_fused.log_probs(ref, policies, [1.0], divergence=KLMixture())
