"""Worlds in which every optimum is known exactly: a bandit, and a tree of tokens.

With beta = 1 the optimum for a reward R under the divergence f is the maximum over pi of

    J(pi) = <pi, R> - sum_y pi_ref(y) f( pi(y) / pi_ref(y) ),

and it satisfies f'(pi / pi_ref) = R - Z. MOD's theorem (arXiv 2406.18853) says: policies that are
optimal for R_1 to R_M, mixed by eq. 6 with Z solved, are optimal for sum_i w_i R_i. It holds
exactly where a response is one token. On a tree a decoder mixes token by token, with another Z
after every prefix. The result is the optimum only where Z is the same after all prefixes of a
length: for reverse KL, if tokens do not depend on those before them and rewards add up. Run it by

    python -m bench.alignment.tabular
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

import mod_fused
from mod_fused import reference
from mod_fused.divergence import DIVERGENCES

Array = np.ndarray


def _jsd(d: Array) -> Array:
    return np.exp(d) * d - (np.exp(d) + 1.0) * (np.logaddexp(0.0, d) - np.log(2.0))


#: f(e^d) as a function of the log-ratio d; f(1) = 0.
F: dict[str, Callable[[Array], Array]] = {
    "reverse_kl": lambda d: np.exp(d) * d,
    "forward_kl": lambda d: -d,
    "jsd": _jsd,
    "alpha:0.5": lambda d: 2.0 + 2.0 * np.exp(d) - 4.0 * np.exp(0.5 * d),
    "jeffrey": lambda d: np.expm1(d) * d,
}


def optimum(divergence: str, log_ref: Array, reward: Array) -> Array:
    """log of the policy that maximises J; float64 [N], from log pi_ref [N] and rewards [N]."""
    slope = reference.slope_of(divergence)
    if slope is None:
        return reference.log_softmax(log_ref + reward)
    return log_ref + reference.solve_log_ratios(log_ref, reward, slope)


def objective(divergence: str, log_ref: Array, log_pi: Array, reward: Array) -> float:
    """J of a policy, all arguments [N]."""
    divided = np.exp(log_ref) @ F[divergence](log_pi - log_ref)
    return float(np.exp(log_pi) @ reward - divided)


def mixed(
    divergence: str, log_ref: Array, policies: Array, weights: Array, **options: Any
) -> Array:
    """The op's log pi* as float64 [B, V]; log_ref [B, V], policies [M, B, V], weights [M]."""
    logits = torch.from_numpy(np.stack([log_ref, *policies])).float()
    result = mod_fused.log_probs(
        logits[0], logits[1:], weights.tolist(), divergence=divergence, **options
    )
    return result.double().numpy()


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

    def decoded(self, mix: Callable[[list[Array], list[Array]], Array], *policies: Array) -> Array:
        """log-probabilities [V^T] of the responses that a decoder draws token by token.

        `mix` gets, reference first, the prefixes' log-probabilities [V^t] and the next tokens'
        [V^t, V] under each model, and returns the next tokens' under pi*.
        """
        levels = [self.marginals(log_p) for log_p in (self.log_ref, *policies)]
        log_pi = np.zeros(1)
        for t in range(self.depth):
            prefixes = [level[t] for level in levels]
            tokens = [level[t + 1].reshape(-1, self.vocab) - level[t][:, None] for level in levels]
            log_pi = (log_pi[:, None] + mix(prefixes, tokens)).ravel()
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
        tokens = reference.log_softmax(1.5 * rng.normal(size=(contexts, vocab)))
        log_ref = (log_ref[:, None] + tokens).ravel()
        if additive:
            gains = rng.normal(size=(objectives, 1, vocab)) * scale / np.sqrt(depth)
            rewards = (rewards[:, :, None] + gains).reshape(objectives, -1)
    if not additive:
        rewards = rng.normal(size=(objectives, vocab**depth)) * scale
    return Tree(vocab, depth, log_ref, rewards)


def token_mixes(divergence: str, weights: Array) -> dict[str, Callable[..., Array]]:
    """Functions that mix next-token distributions, for `Tree.decoded`."""

    def mod(normalizer: str, history: bool) -> Callable[..., Array]:
        def mix(prefixes: list[Array], tokens: list[Array]) -> Array:
            prefix = torch.from_numpy(np.stack(prefixes, axis=1)) if history else None
            ref, *policies = tokens
            return mixed(
                divergence, ref, np.stack(policies), weights,
                normalizer=normalizer, prefix_logprobs=prefix,
            )  # fmt: skip

        return mix

    def mean_logits(_: list[Array], tokens: list[Array]) -> Array:
        return reference.log_softmax(np.tensordot(weights, np.stack(tokens[1:]), 1))

    def mean_probabilities(_: list[Array], tokens: list[Array]) -> Array:
        return np.log(np.tensordot(weights, np.exp(np.stack(tokens[1:])), 1))

    return {
        "token by token, exact Z": mod("exact", False),
        "token by token, Z = 0": mod("zero", False),
        "with history, exact Z": mod("exact", True),
        "with history, Z = 0": mod("zero", True),
        "mean of logits": mean_logits,
        "mean of probabilities": mean_probabilities,
    }


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


def shortfall(divergence: str, tree: Tree, log_pi: Array, weights: Array) -> Shortfall:
    """The shortfall of log pi [V^T] on a tree, for the reward sum_i w_i R_i."""
    reward = weights @ tree.rewards
    best = optimum(divergence, tree.log_ref, reward)
    values = [objective(divergence, tree.log_ref, p, reward) for p in (best, log_pi, tree.log_ref)]
    distance = 0.5 * np.abs(np.exp(best) - np.exp(log_pi)).sum()
    return Shortfall(float(distance), (values[0] - values[1]) / (values[0] - values[2]))


def shortfalls(
    divergence: str, tree: Tree, weights: Array
) -> Iterator[tuple[str, Shortfall | None]]:
    """The shortfall of each of `token_mixes`, applied to the optimal policies; None where Z = 0
    has no solution."""
    policies = [optimum(divergence, tree.log_ref, reward) for reward in tree.rewards]
    for name, mix in token_mixes(divergence, weights).items():
        log_pi = tree.decoded(mix, *policies)
        valid = not np.isnan(log_pi).any()
        yield name, shortfall(divergence, tree, log_pi, weights) if valid else None


def measure(worlds: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Means over random worlds and simplex weights, one record per divergence, world and mix."""
    records: list[dict[str, Any]] = []
    kinds = {"one token": True, "tree, additive rewards": True, "tree": False}
    for kind, additive in kinds.items():
        for divergence in DIVERGENCES:
            rng = np.random.default_rng(seed)
            found: dict[str, list[Shortfall | None]] = {}
            for _ in range(worlds):
                tree = random_tree(rng, additive=additive)
                weights = rng.dirichlet(np.ones(len(tree.rewards)))
                tree = bandit(tree) if kind == "one token" else tree
                for name, result in shortfalls(divergence, tree, weights):
                    found.setdefault(name, []).append(result)
            for name, results in found.items():
                valid = [r for r in results if r is not None]
                record: dict[str, Any] = {"world": kind, "divergence": divergence, "mix": name}
                record |= {"worlds": worlds, "invalid": worlds - len(valid)}
                for field in Shortfall._fields if valid else ():
                    values = [getattr(r, field) for r in valid]
                    record |= {field: float(np.mean(values)), f"{field}_max": float(max(values))}
                records.append(record)
    return records


def main() -> None:
    """Prints each world's mean shares of J that the mixes lose."""
    for r in measure():
        lost = f"{r['lost']:.2%}" if "lost" in r else "no solution"
        print(f"{r['world']:24} {r['divergence']:10} {r['mix']:26} {lost}")


if __name__ == "__main__":
    main()
