"""Value guidance on a tree of responses: what the op and the decoder must give, in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import DIVERGENCES, total_variation
from scipy.stats import chi2
from tabular import Tree

import mod_fused
from mod_fused import Ensemble, generate
from mod_fused.guidance import Guidance

LAMBDA = 2.0
FIRST_DERIVATIVES = {  # f', textbook
    "reverse_kl": lambda x: np.log(x) + 1,
    "forward_kl": lambda x: -1 / x,
    "jsd": lambda x: np.log(2 * x / (1 + x)),
    "alpha:0.25": lambda x: (1 - x**-0.25) / 0.25,
    "alpha:0.5": lambda x: (1 - x**-0.5) / 0.5,
    "alpha:0.75": lambda x: (1 - x**-0.75) / 0.75,
    "jeffrey": lambda x: np.log(x) - 1 / x + 1,
}


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree()


def guided(tree: Tree, q: torch.Tensor, strength: float, **options: Any) -> torch.Tensor:
    """log pi* [n, V] of every prefix of the tree, by the op."""
    return mod_fused.log_probs(
        tree.ref.float(), [], [], values=q.float()[None], value_weights=[strength], **options
    ).double()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokenwise_control_is_optimal_for_the_f_regularised_step(
    tree: Tree, divergence: str
) -> None:
    """max over pi of lambda E_pi[Q] - D_f(pi || ref) is concave: its optimum is where
    lambda Q - f'(pi / ref) is the same for all tokens and pi sums to one."""
    q = tree.q(tree.ref)
    pi = guided(tree, q, LAMBDA, divergence=divergence).exp().numpy()
    ref = tree.ref.exp().numpy()
    np.testing.assert_allclose(pi.sum(1), 1, atol=1e-5)
    rest = LAMBDA * q.numpy() - FIRST_DERIVATIVES[divergence](pi / ref)
    assert np.ptp(rest, axis=1).max() < 1e-4
    assert np.abs(pi - ref).sum(1).min() > 1e-3  # it did move
    if divergence == "reverse_kl":
        closed = (tree.ref + LAMBDA * q).log_softmax(-1)
        assert total_variation(np.log(pi), closed).max() < 2e-5


def test_with_the_soft_value_whole_responses_are_tilted_by_their_reward(tree: Tree) -> None:
    """The optimum of E[r] - KL / lambda over whole responses: ref(y) exp(lambda r(y)) / Z."""
    policy = guided(tree, tree.soft_q(LAMBDA), LAMBDA)
    exact = (tree.logprobs(tree.ref) + LAMBDA * tree.response_rewards).log_softmax(0)
    assert total_variation(tree.logprobs(policy), exact) < 5e-5
    # The plain value function of the reference is not that, which is what MAVIS repairs.
    plain = guided(tree, tree.q(tree.ref), LAMBDA)
    assert total_variation(tree.logprobs(plain), exact) > 1e-3


def test_two_rewards_combine_linearly(tree: Tree) -> None:
    """The value of v_1 r_1 + v_2 r_2 is the same mix of the values."""
    other = Tree(seed=0)
    other.rewards = torch.where(other.ends, 1 - tree.rewards**2, 0.0)
    mixed = Tree(seed=0)
    mixed.rewards = 1.5 * tree.rewards + 0.75 * other.rewards
    two = torch.stack([tree.q(tree.ref), other.q(tree.ref)]).float()
    got = mod_fused.log_probs(tree.ref.float(), [], [], values=two, value_weights=[1.5, 0.75])
    exact = (tree.ref + mixed.q(tree.ref)).log_softmax(-1)
    assert total_variation(got, exact).max() < 2e-5


def test_generate_draws_whole_responses_from_the_tilted_distribution(tree: Tree) -> None:
    """Chi-squared over all complete responses; a right decoder fails once in 10,000 seeds."""
    draws = 20_000
    out = generate(
        Ensemble([tree.step(tree.ref)]),
        input_ids=torch.zeros(draws, 1, dtype=torch.int64),
        weights=[],
        value_fn=Guidance([tree.step(tree.soft_q(LAMBDA))]),
        value_weights=[LAMBDA],
        max_new_tokens=4,
        eos_token_id=0,
        pad_token_id=0,
        seed=4,
    )
    place = tree.tokens.shape[1] - 1 - torch.arange(tree.tokens.shape[1])
    keys = (out.tokens * 4**place).sum(1)
    counts = torch.bincount(keys, minlength=4**4)[(tree.tokens * 4**place).sum(1)].double()
    assert counts.sum() == draws
    expected = draws * (tree.logprobs(tree.ref) + LAMBDA * tree.response_rewards).softmax(0)
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < chi2.ppf(1 - 1e-4, len(expected) - 1)


@pytest.mark.parametrize(
    ("values", "ids", "message"),
    [
        ((1, 2, 3), (2, 4), "value_ids"),  # K differs
        ((1, 2, 3), (3, 3), "value_ids"),  # B differs
        ((1, 2, 0), (2, 0), "K >= 1"),
        ((0, 2, 3), (2, 3), "J >= 1"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(values: Any, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mod_fused.sample(
            torch.zeros(2, 8), [], [], values=torch.zeros(values),
            value_ids=torch.zeros(ids, dtype=torch.int64),
        )  # fmt: skip


def test_a_row_without_candidates_is_invalid_and_disturbs_no_other() -> None:
    ids = torch.tensor([[1, 2], [-1, -1], [3, 9]])
    out = mod_fused.sample(torch.zeros(3, 8), [], [], values=torch.zeros(1, 3, 2), value_ids=ids)
    assert out.valid.tolist() == [True, False, False]
    assert int(out.tokens[0]) in (1, 2)
