"""The oracle of whole responses: optima against the printed f, trees against their leaves, and what
the op's rules lose there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DIVERGENCES

import mod_fused
from mod_fused import reference

# f' as a function of x, as printed.
F_PRIME = {
    "reverse_kl": lambda x: np.log(x) + 1.0,
    "forward_kl": lambda x: -1.0 / x,
    "jsd": lambda x: np.log(2.0) + np.log(x / (1.0 + x)),
    "alpha:0.5": lambda x: (1.0 - x**-0.5) / 0.5,
    "alpha:0.2": lambda x: (1.0 - x**-0.2) / 0.2,
    "jeffrey": lambda x: np.log(x) - 1.0 / x + 1.0,
}
#: f(0): what a response of probability 0 costs.
AT_ZERO = {"reverse_kl": 0.0, "jsd": np.log(2.0), "alpha:0.5": 2.0, "alpha:0.2": 1.25}
MAX_TV = 2e-5  # the op's, of the contract


def total_variation(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return float(0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum())


@pytest.mark.parametrize("divergence", F_PRIME)
def test_optimum_and_objective_are_those_of_the_printed_f(divergence: str) -> None:
    # R - f'(x) constant, sum 1: with f strictly convex, the one maximum of J.
    rng = np.random.default_rng(1)
    x = rng.uniform(0.05, 6.0, size=50)
    step = 1e-6
    f = reference.f_of(divergence)
    numeric = (f(np.log(x + step)) - f(np.log(x - step))) / (2 * step)
    assert np.abs(numeric - F_PRIME[divergence](x)).max() <= 1e-5
    assert abs(f(np.zeros(1))[0]) <= 1e-12
    assert f(np.array([-np.inf])) == pytest.approx(AT_ZERO.get(divergence, np.inf))
    for _ in range(20):
        log_ref = reference.log_softmax(1.5 * rng.normal(size=9))
        reward = 2.0 * rng.normal(size=9)
        best = reference.optimum(divergence, log_ref, reward)
        assert abs(np.exp(best).sum() - 1.0) <= 1e-10
        assert np.ptp(reward - F_PRIME[divergence](np.exp(best - log_ref))) <= 1e-7
        top = reference.objective(divergence, log_ref, best, reward)
        other = reference.log_softmax(best + 0.1 * rng.normal(size=9))
        assert reference.objective(divergence, log_ref, other, reward) < top


@pytest.mark.parametrize("divergence", F_PRIME)
def test_divergence_terms_are_not_negative_and_have_the_divergence_as_their_mean(
    divergence: str,
) -> None:
    rng = np.random.default_rng(6)
    log_ref, log_pi = (reference.log_softmax(rng.normal(size=30)) for _ in range(2))
    terms = reference.divergence_terms(divergence, log_pi - log_ref)
    assert terms.min() >= -1e-12
    exact = np.exp(log_ref) @ reference.f_of(divergence)(log_pi - log_ref)
    assert np.exp(log_pi) @ terms == pytest.approx(exact, rel=1e-10)
    assert np.isfinite(reference.divergence_terms(divergence, np.array([-90.0, 2000.0]))).all()


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="expected reverse_kl.*got chi2"):
        reference.f_of("chi2")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_op_mixes_optimal_policies_to_the_exact_optimum_of_the_mixed_reward(
    divergence: str,
) -> None:
    rng = np.random.default_rng(2)
    for k in range(40):
        arms, policies = int(rng.integers(2, 60)), int(rng.integers(1, 5))
        log_ref = reference.log_softmax(1.5 * rng.normal(size=arms))
        rewards = 2.0 * rng.normal(size=(policies, arms))
        weights = rng.dirichlet(np.ones(policies)) * (1.0, 0.5, 1.7)[k % 3]
        optima = np.stack([reference.optimum(divergence, log_ref, r) for r in rewards])
        logits = torch.from_numpy(np.stack([log_ref, *optima])).float()[:, None]
        got = (
            mod_fused.log_probs(logits[0], logits[1:], weights.tolist(), divergence=divergence)[0]
            .double()
            .numpy()
        )
        best = reference.optimum(divergence, log_ref, weights @ rewards)
        assert total_variation(got, best) <= MAX_TV


def test_a_tree_s_prefixes_and_decoder_agree_with_its_leaves() -> None:
    tree = reference.random_tree(np.random.default_rng(3), vocab=3, depth=3)
    leaves = np.exp(tree.log_ref).reshape(3, 3, 3)
    empty, one, two, three = tree.marginals(tree.log_ref)
    assert np.exp(empty) == pytest.approx([1.0])
    assert np.exp(one) == pytest.approx(leaves.sum((1, 2)))
    assert np.exp(two) == pytest.approx(leaves.sum(2).ravel())
    assert np.exp(three) == pytest.approx(leaves.ravel())
    best = reference.optimum("jsd", tree.log_ref, tree.rewards[0])
    marginals, levels = tree.marginals(best), []

    def one_policy(log_pi: np.ndarray, prefixes: list, tokens: list) -> np.ndarray:
        levels.append((log_pi, prefixes[1]))
        return tokens[1]

    assert tree.decoded(one_policy, best) == pytest.approx(best, abs=1e-10)
    for level, own in zip(levels, marginals, strict=False):  # the decoder's own prefixes
        assert level[0] == pytest.approx(own, abs=1e-10) == level[1]


def test_the_reference_and_the_optimum_are_the_ends_of_the_shortfall() -> None:
    tree = reference.random_tree(np.random.default_rng(4), additive=True)
    weights = np.array([0.3, 0.7])
    best = reference.optimum("jeffrey", tree.log_ref, weights @ tree.rewards)
    assert reference.shortfall("jeffrey", tree, best, weights) == (0.0, 0.0)
    at_ref = reference.shortfall("jeffrey", tree, tree.log_ref, weights)
    assert at_ref == (pytest.approx(total_variation(best, tree.log_ref)), 1.0)
