"""What the op's rules for whole responses lose on the trees of `mod_fused.reference`, where every
optimum is known. Run it by

    python -m bench.alignment.tabular
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch

import mod_fused
from mod_fused import reference
from mod_fused.divergence import DIVERGENCES
from mod_fused.reference import Shortfall, Tree

Array = np.ndarray


def token_mixes(divergence: str, weights: Array) -> dict[str, reference.NextTokens]:
    """Functions that mix next-token distributions, for `Tree.decoded`."""

    def mod(normalizer: str, history: bool) -> reference.NextTokens:
        def mix(log_pi: Array, prefixes: list[Array], tokens: list[Array]) -> Array:
            logits = torch.from_numpy(np.stack(tokens)).float()
            options: dict[str, Any] = {"divergence": divergence, "normalizer": normalizer}
            if history:
                options["prefix_logprobs"] = torch.from_numpy(np.stack(prefixes, axis=1))
            if history and normalizer == "exact":
                options["mixture_prefix_logprobs"] = torch.from_numpy(log_pi)
            return mod_fused.log_probs(logits[0], logits[1:], weights, **options).double().numpy()

        return mix

    return {
        "token by token, exact Z": mod("exact", False),
        "token by token, Z = 0": mod("zero", False),
        "prefix ratios, own mass": mod("exact", True),
        "prefix ratios, Z = 0": mod("zero", True),
        "mean of logits": lambda _, __, tokens: reference.log_softmax(
            np.tensordot(weights, np.stack(tokens[1:]), 1)
        ),
        "mean of probabilities": lambda _, __, tokens: np.log(
            np.tensordot(weights, np.exp(np.stack(tokens[1:])), 1)
        ),
    }


def shortfalls(
    divergence: str, tree: Tree, weights: Array
) -> Iterator[tuple[str, Shortfall | None]]:
    """The shortfall of each of `token_mixes`, applied to the optimal policies; None where Z = 0
    has no solution."""
    policies = [reference.optimum(divergence, tree.log_ref, reward) for reward in tree.rewards]
    for name, mix in token_mixes(divergence, weights).items():
        log_pi = tree.decoded(mix, *policies)
        valid = not np.isnan(log_pi).any()
        yield name, reference.shortfall(divergence, tree, log_pi, weights) if valid else None


def measure(worlds: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Means over random worlds and simplex weights, one record per divergence, world and mix."""
    records: list[dict[str, Any]] = []
    kinds = {"one token": True, "tree, additive rewards": True, "tree": False}
    for (kind, additive), divergence in product(kinds.items(), DIVERGENCES):
        rng, found = np.random.default_rng(seed), {}
        for _ in range(worlds):
            tree = reference.random_tree(rng, additive=additive)
            weights = rng.dirichlet(np.ones(len(tree.rewards)))
            tree = reference.bandit(tree) if kind == "one token" else tree
            for name, result in shortfalls(divergence, tree, weights):
                found.setdefault(name, []).append(result)
        for name, results in found.items():
            valid = [r for r in results if r is not None]
            record: dict[str, Any] = {"world": kind, "divergence": divergence, "mix": name}
            record |= {"worlds": worlds, "invalid": worlds - len(valid)}
            for field, values in zip(Shortfall._fields, zip(*valid, strict=True), strict=False):
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
