"""The losses of the scorers, minimised over a table: the values that they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tabular import Tree

from mod_fused.guidance.scorers import taken
from mod_fused.training import losses


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree()


def minimise(
    tree: Tree, weights: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor], steps: int
) -> torch.Tensor:
    """Newton's method over a table [n, V]: the losses are quadratic with a known diagonal.

    `weights` [N, T]: how often each response counts, so that the loss is an exact expectation.
    """
    table = torch.full_like(tree.ref, 0.5, requires_grad=True)
    visits = torch.zeros_like(tree.ref)
    visits.index_put_((tree.nodes, tree.tokens), weights, accumulate=True)
    for _ in range(steps):
        loss = loss_of(table[tree.nodes]) * len(tree.tokens)
        (gradient,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table -= gradient / visits.clamp(min=1e-300)
    return table.detach()


def test_cd_fudge_recovers_the_mean_reward_of_the_rollouts(tree: Tree) -> None:
    weights = tree.mask * tree.logprobs(tree.ref).exp()[:, None]
    table = minimise(
        tree,
        weights,
        lambda v: losses.value_loss(taken(v, tree.tokens), tree.response_rewards, weights),
        steps=1,
    )
    torch.testing.assert_close(table, tree.q(tree.ref), atol=1e-9, rtol=0)


def test_cd_q_recovers_it_too_one_level_each_step(tree: Tree) -> None:
    weights = tree.mask * tree.logprobs(tree.ref).exp()[:, None]

    def loss(v: torch.Tensor) -> torch.Tensor:
        targets = losses.q_targets(v, tree.ref[tree.nodes], tree.response_rewards, weights)
        return losses.value_loss(taken(v, tree.tokens), targets, weights)

    exact = tree.q(tree.ref)
    table = minimise(tree, weights, loss, steps=4)
    torch.testing.assert_close(table, exact, atol=1e-9, rtol=0)
    # A bootstrap: after one step only the ends are right.
    once = minimise(tree, weights, loss, steps=1)
    torch.testing.assert_close(once[tree.ends], exact[tree.ends], atol=1e-9, rtol=0)
    assert (once - exact)[~tree.ends].abs().min() > 1e-3


@pytest.mark.parametrize("td_lambda", [0.3, 0.8, 1.0])
def test_lambda_returns_have_the_same_fixed_point(tree: Tree, td_lambda: float) -> None:
    weights = tree.mask * tree.logprobs(tree.ref).exp()[:, None]
    ref = tree.ref[tree.nodes]

    def loss(v: torch.Tensor) -> torch.Tensor:
        targets = losses.q_targets(v, ref, tree.response_rewards, weights, td_lambda)
        return losses.value_loss(taken(v, tree.tokens), targets, weights)

    exact = tree.q(tree.ref)
    table = minimise(tree, weights, loss, steps=1 if td_lambda == 1 else 4)
    torch.testing.assert_close(table, exact, atol=1e-9, rtol=0)
    if td_lambda < 1:  # the first step is wrong by the share that is its own
        once = (minimise(tree, weights, loss, steps=1) - exact)[~tree.ends]
        paper = minimise(
            tree,
            weights,
            lambda v: losses.value_loss(
                taken(v, tree.tokens),
                losses.q_targets(v, ref, tree.response_rewards, weights),
                weights,
            ),
            steps=1,
        )
        assert once.abs().sum() < 0.95 * (paper - exact)[~tree.ends].abs().sum()


def test_lambda_returns_are_the_weighted_sum_of_n_step_returns() -> None:
    """target_t = (1 - l) sum_(n < left) l^(n-1) E V_(t+n) + l^(left-1) r, written out."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 3]
    values = torch.randn(3, 5, 4, generator=generator).double()
    ref = torch.randn(3, 5, 4, generator=generator).double().log_softmax(-1)
    rewards = torch.tensor([0.2, 0.9, -1.0]).double()
    mask = torch.tensor([[float(t < n) for t in range(5)] for n in lengths])
    for td_lambda in (0.0, 0.4, 1.0):
        got = losses.q_targets(values, ref, rewards, mask, td_lambda)
        for row, length in enumerate(lengths):
            expected = [float(ref[row, t].exp() @ values[row, t]) for t in range(5)]
            for t in range(length):
                left = length - t  # steps to the reward
                want = td_lambda ** (left - 1) * float(rewards[row])
                for n in range(1, left):
                    want += (1 - td_lambda) * td_lambda ** (n - 1) * expected[t + n]
                assert got[row, t] == pytest.approx(want, abs=1e-12), (td_lambda, row, t)
    one = losses.q_targets(values, ref, rewards, mask, 1.0)
    assert torch.equal(one * mask, rewards[:, None] * mask)  # CD-FUDGE's target
    for td_lambda in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="td_lambda must be in"):
            losses.q_targets(values, ref, rewards, mask, td_lambda)


def test_soft_labels_teach_the_soft_value(tree: Tree) -> None:
    """The gradient is zero where logsigmoid(logit) = log E exp(beta r) - beta max r, and the loss
    is higher beside it."""
    beta, highest = 3.0, 1.25  # a largest reward that no response of the tree has
    weights = tree.mask * tree.logprobs(tree.ref).exp()[:, None]
    labels = losses.soft_labels(tree.response_rewards, beta, highest)
    soft = beta * (tree.soft_q(beta) - highest)
    assert soft.max() < 0
    logits = (soft - torch.log1p(-soft.exp())).requires_grad_()  # logsigmoid's inverse

    def loss(table: torch.Tensor) -> torch.Tensor:
        return losses.attribute_loss(taken(table[tree.nodes], tree.tokens), labels, weights)

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert gradient.abs().max() < 1e-12
    for shift in (-0.3, 0.3):
        assert loss(logits + shift) > loss(logits) * 1.005
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta must be positive and finite"):
            losses.soft_labels(tree.response_rewards, beta, highest)


def test_kl_returns_recover_the_regularised_value_of_their_own_policy(tree: Tree) -> None:
    beta = 3.0
    generator = torch.Generator().manual_seed(1)
    policy = torch.randn(tree.ref.shape, generator=generator).double().log_softmax(-1)
    weights = tree.mask * tree.logprobs(policy).exp()[:, None]
    log_ratios = (policy - tree.ref)[tree.nodes, tree.tokens]
    returns = losses.kl_returns(tree.response_rewards, log_ratios, tree.mask, beta)
    table = minimise(
        tree,
        weights,
        lambda v: losses.value_loss(taken(v, tree.tokens), returns, weights),
        steps=1,
    )
    torch.testing.assert_close(table, tree.q(policy, beta), atol=1e-9, rtol=0)


def test_attribute_loss_is_least_at_the_share_of_rollouts_with_the_attribute(tree: Tree) -> None:
    labels = tree.response_rewards > 0.5
    weights = tree.mask * tree.logprobs(tree.ref).exp()[:, None]
    tree_of_labels = Tree()
    tree_of_labels.rewards = torch.where(tree.ends, (tree.rewards > 0.5).double(), 0.0)
    share = tree_of_labels.q(tree.ref)
    inner = (share > 1e-6) & (share < 1 - 1e-6)
    assert inner.sum() > 10
    logits = torch.logit(share.clamp(1e-9, 1 - 1e-9)).requires_grad_()

    def loss(table: torch.Tensor) -> torch.Tensor:
        return losses.attribute_loss(taken(table[tree.nodes], tree.tokens), labels, weights)

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert gradient.abs().max() < 1e-9
    with torch.no_grad():
        for shift in (-0.3, 0.3):
            assert loss(logits + shift * inner) > loss(logits) + 1e-6


def test_targets_carry_no_gradient_and_padding_counts_for_nothing() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[1, 0, 4], [2, 2, 0]])
    ref = torch.full((2, 3, 5), -math.log(5.0))
    rewards = torch.tensor([0.25, 0.75])
    targets = losses.q_targets(values, ref, rewards, mask)
    assert not targets.requires_grad
    assert targets[0, 1] == 0.25 and targets[1, 2] == 0.75  # where the responses end
    torch.testing.assert_close(targets[0, 0], values[0, 1].mean())
    loss = losses.value_loss(taken(values, tokens), targets, mask)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient[0, 2].eq(0).all()
    assert gradient.ne(0).sum() == 5  # one entry for each token that was taken
    returns = losses.kl_returns(
        rewards, torch.tensor([[5.0, 0.5, 9.0], [0.1, 0.2, 0.4]]), mask, beta=2.0
    )
    torch.testing.assert_close(returns[0, :2], torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(returns[1], torch.tensor([0.75 - 0.3, 0.75 - 0.2, 0.75]))
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            losses.kl_returns(rewards, torch.zeros(2, 3), mask, beta)
