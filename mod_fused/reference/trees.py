"""Worlds in which the optimum of whole responses is known exactly: a bandit, and a tree of tokens.

With beta = 1 the optimum for a reward R under the divergence f is the maximum over pi of

    J(pi) = <pi, R> - sum_y pi_ref(y) f( pi(y) / pi_ref(y) ),

and it satisfies f'(pi / pi_ref) = R - Z. MOD's theorem (arXiv 2406.18853) says: policies that are
optimal for R_1 to R_M, mixed by eq. 6 with Z solved, are optimal for sum_i w_i R_i. It holds
exactly where a response is one token. On a tree a decoder mixes token by token, with another Z
after every prefix. The result is the optimum only where Z is the same after all prefixes of a
length: for reverse KL, if tokens do not depend on those before them and rewards add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .mixture import Array, log_softmax, solve_log_ratios
from .slopes import slope_of

#: next_tokens(log_pi, prefixes, tokens) of `Tree.decoded`.
NextTokens = Callable[[Array, list[Array], list[Array]], Array]


def f_of(divergence: Any) -> Callable[[Array], Array]:
    """f of a divergence as a function of d = log(pi / pi_ref), with f(1) = 0; -inf stands for a
    ratio of 0. `divergence` is a name or an object with a `name`.

    Raises:
        ValueError: there is no such divergence.
    """
    name = str(getattr(divergence, "name", divergence))
    slope_of(name)  # refuses any other name

    def f(d: Array) -> Array:
        x = np.exp(d)
        x_log_x = x * np.where(d > -np.inf, d, 0.0)
        if name == "reverse_kl":
            return x_log_x
        if name == "forward_kl":
            return -d
        if name == "jsd":
            return x_log_x - (x + 1.0) * (np.logaddexp(0.0, d) - np.log(2.0))
        if name == "jeffrey":
            return np.expm1(d) * d
        a = float(name.removeprefix("alpha:"))
        return (np.expm1((1.0 - a) * d) - (1.0 - a) * np.expm1(d)) / (a * (a - 1.0))

    return f


def divergence_terms(divergence: Any, d: Array) -> Array:
    """Terms >= 0 whose mean over responses drawn from pi estimates sum_y pi_ref f(pi / pi_ref).

    They are (f(x) - f'(1) (x - 1)) / x at d = log x = log(pi / pi_ref), float [...] in nats: what
    is subtracted has mean 0. f(x) / x is the f of the divergence with pi and pi_ref swapped, at
    1 / x.

    Raises:
        ValueError: there is no such divergence.
    """
    name, d = str(getattr(divergence, "name", divergence)), np.asarray(d, dtype=np.float64)
    swapped, slope = {"reverse_kl": ("forward_kl", 1.0), "forward_kl": ("reverse_kl", -1.0)}.get(
        name, (name, 0.0)
    )
    if name.startswith("alpha:"):
        swapped = f"alpha:{1.0 - float(name.removeprefix('alpha:'))}"
    return f_of(swapped)(-d) + slope * np.expm1(-d)


def optimum(divergence: Any, log_ref: Array, reward: Array) -> Array:
    """log of the policy that maximises J; float64 [N] in nats, from finite log pi_ref [N] and
    rewards [N]."""
    slope = slope_of(divergence)
    if slope is None:
        return log_softmax(log_ref + reward)
    return log_ref + solve_log_ratios(log_ref, reward, slope)


def objective(divergence: Any, log_ref: Array, log_pi: Array, reward: Array) -> float:
    """J of a policy in nats, all arguments [N]; log pi may be -inf, log pi_ref may not."""
    return float(np.exp(log_pi) @ reward - np.exp(log_ref) @ f_of(divergence)(log_pi - log_ref))


class Tree(NamedTuple):
    """All V^T responses of T = `depth` tokens out of V = `vocab`, the leaves, in order of tokens.

    Attributes:
        log_ref: [V^T], log pi_ref of whole responses.
        rewards: [M, V^T].
    """

    vocab: int
    depth: int
    log_ref: Array
    rewards: Array

    def marginals(self, log_p: Array) -> list[Array]:
        """log-probabilities [V^t] of the prefixes of t = 0 .. T tokens, from the leaves' [V^T]."""
        levels = [log_p]
        for _ in range(self.depth):
            rows = levels[0].reshape(-1, self.vocab)
            levels.insert(0, np.logaddexp.reduce(rows, axis=1))
        return levels

    def decoded(self, next_tokens: NextTokens, *policies: Array) -> Array:
        """log-probabilities [V^T] of the responses that a decoder draws token by token.

        `next_tokens(log_pi, prefixes, tokens)` gets the prefixes' log-probabilities [V^t] under
        pi* and, reference first, under each model, and the next tokens' [V^t, V] under each model.
        It returns the next tokens' under pi*. `policies` are log-probabilities [V^T].
        """
        levels = [self.marginals(log_p) for log_p in (self.log_ref, *policies)]
        log_pi = np.zeros(1)
        for t in range(self.depth):
            prefixes = [level[t] for level in levels]
            tokens = [level[t + 1].reshape(-1, self.vocab) - level[t][:, None] for level in levels]
            log_pi = (log_pi[:, None] + next_tokens(log_pi, prefixes, tokens)).ravel()
        return log_pi


def random_tree(
    rng: np.random.Generator,
    *,
    vocab: int = 4,
    depth: int = 4,
    objectives: int = 2,
    scale: float = 2.0,
    additive: bool = False,
) -> Tree:
    """A tree with normal logits and rewards of standard deviation about `scale`.

    With `additive` rewards are sums over tokens, and neither a token's reward nor its reference
    probability depends on the tokens before it. Otherwise each response has a random reward.
    """
    log_ref, rewards = np.zeros(1), np.zeros((objectives, 1))
    for t in range(depth):
        contexts = 1 if additive else vocab**t
        tokens = log_softmax(1.5 * rng.normal(size=(contexts, vocab)))
        log_ref = (log_ref[:, None] + tokens).ravel()
        if additive:
            gains = rng.normal(size=(objectives, 1, vocab)) * scale / np.sqrt(depth)
            rewards = (rewards[:, :, None] + gains).reshape(objectives, -1)
    if not additive:
        rewards = rng.normal(size=(objectives, vocab**depth)) * scale
    return Tree(vocab, depth, log_ref, rewards)


def bandit(tree: Tree) -> Tree:
    """The same responses and rewards with a whole response as one token."""
    return tree._replace(vocab=len(tree.log_ref), depth=1)


class Shortfall(NamedTuple):
    """The distance of a policy from the optimum for the mixed reward.

    Attributes:
        total_variation: distance from the optimum's responses.
        lost: (J* - J) / (J* - J(pi_ref)): 0 for the optimum, 1 for the reference.
    """

    total_variation: float
    lost: float


def shortfall(divergence: Any, tree: Tree, log_pi: Array, weights: Array) -> Shortfall:
    """The shortfall of log pi [V^T] on a tree, for the reward sum_i w_i R_i; weights [M]."""
    reward = weights @ tree.rewards
    best = optimum(divergence, tree.log_ref, reward)
    values = [objective(divergence, tree.log_ref, p, reward) for p in (best, log_pi, tree.log_ref)]
    distance = 0.5 * np.abs(np.exp(best) - np.exp(log_pi)).sum()
    return Shortfall(float(distance), (values[0] - values[1]) / (values[0] - values[2]))
