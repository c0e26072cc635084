"""Whole responses of a world small enough to enumerate, and their optimum by a root finder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import optimize
from tabular import Tree

from mod_fused import Ensemble, reference

Array = np.ndarray


def slope(divergence: str) -> tuple[Callable[[Array], Array], Callable[[Array], Array], float]:
    """f' as a function of d = log x, log of its inverse, and sup f'."""
    alpha = float(divergence.partition(":")[2] or 1.0)

    def root(u: float) -> float:
        return optimize.brentq(lambda d: d - math.exp(-d) + 1.0 - u, -60.0, 400.0, xtol=1e-14)

    return {
        "forward_kl": (lambda d: -np.exp(-d), lambda u: -np.log(-u), 0.0),
        "jsd": (
            lambda d: math.log(2.0) - np.logaddexp(0.0, -d),
            lambda u: u - math.log(2.0) - np.log1p(-0.5 * np.exp(u)),
            math.log(2.0),
        ),
        "alpha": (
            lambda d: (1.0 - np.exp(-alpha * d)) / alpha,
            lambda u: -np.log(1.0 - alpha * u) / alpha,
            1.0 / alpha,
        ),
        "jeffrey": (lambda d: d - np.exp(-d) + 1.0, np.vectorize(root), math.inf),
    }[divergence.partition(":")[0]]


def brute_force(
    divergence: str, w: Array, log_models: Array, log_q: Array, tilt: Array | float = 0.0
) -> tuple[Array, float]:
    """The weights [N] of candidates with log_models [N, M + 1] and tilt sum v V [N], and the
    normaliser's logarithm or Z, found by a root finder in float64."""
    if divergence == "reverse_kl":
        log_w = log_models @ np.concatenate([[1.0 - w.sum()], w]) + tilt - log_q
        total = np.logaddexp.reduce(log_w)
        return np.exp(log_w - total), float(total - math.log(len(log_q)))
    f, inverse, supremum = slope(divergence)
    u = (w * f(log_models[:, 1:] - log_models[:, :1])).sum(1) + tilt
    base = log_models[:, 0] - log_q - math.log(len(log_q))

    def log_sum(z: float) -> float:
        return float(np.logaddexp.reduce(base + inverse(u - z)))

    pole = u.max() - supremum
    if math.isinf(supremum):
        z = optimize.brentq(log_sum, u.max() - 300.0, u.max() + 50.0, xtol=1e-13)
    else:  # in the logarithm of the distance to the pole
        z = pole + math.exp(
            optimize.brentq(lambda t: log_sum(pole + math.exp(t)), -25.0, 40.0, xtol=1e-13)
        )
    log_w = base + inverse(u - z)
    return np.exp(log_w - np.logaddexp.reduce(log_w)), z


TREE = Tree(vocab=3, depth=3, seed=2)
TABLES = [
    TREE.ref,
    *[
        (TREE.ref + torch.from_numpy(np.random.default_rng(i).normal(size=TREE.ref.shape)))
        for i in (1, 2)
    ],
]
TABLES = [table.log_softmax(-1) for table in TABLES]
W = [0.7, 0.6]


def tree_models() -> Ensemble:
    """The models of `TABLES`, which read whole sequences behind one token of prompt."""

    def model(table: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tokens: table[at_nodes(tokens)].float()

    return Ensemble([model(table) for table in TABLES])


def tree_options(prompts: int, **options: Any) -> dict[str, Any]:
    return {
        "input_ids": torch.zeros(prompts, 1, dtype=torch.int64),
        "weights": W,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "max_new_tokens": 3,
        "use_cache": False,
        "plausibility": None,
        **options,
    }


#: Values of every prefix with one more token, [J, nodes, V], and their weights.
SCORES = torch.from_numpy(np.random.default_rng(7).normal(size=(2, *TREE.ref.shape)))
V = [0.8, -0.5]
PAIRS = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1], [0, 2], [1, 0], [2, 0]])  # two of 3 tokens


def at_nodes(sequences: torch.Tensor) -> torch.Tensor:
    """The tree's prefix [B] of each response behind one token of prompt; of ended ones, any."""
    at = torch.zeros(len(sequences), dtype=torch.int64)
    for column in sequences[:, 1:].T:
        at = TREE.child[at, column].clamp(min=0)
    return at


def scores(step: int, sequences: torch.Tensor) -> torch.Tensor:
    """A value_fn that scores all tokens: `SCORES`."""
    return SCORES[:, at_nodes(sequences)].float()


def scores_of_pairs(step: int, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A value_fn that scores two tokens, `PAIRS`, and excludes the third."""
    at = at_nodes(sequences)
    ids = PAIRS[at]
    values = SCORES[:, at].float().gather(2, ids.expand(2, -1, -1))
    none = torch.full_like(ids[:, :1], -1)
    return torch.cat([values, torch.full_like(values[..., :1], 9.0)], 2), torch.cat([ids, none], 1)


VALUES = {"none": None, "all": scores, "pairs": scores_of_pairs}


def proposal(divergence: str, values: str = "none", weights: Any = W, **filters: Any) -> Array:
    """log q [nodes, V] of token-by-token draws, of the oracle; `values` is a key of `VALUES`."""
    ref, *policies = (x.float() for x in TABLES)
    given: dict[str, Any] = {}
    if values != "none":
        given = {"values": SCORES.float(), "value_weights": V}
    if values == "pairs":
        given |= {"values": SCORES.float().gather(2, PAIRS.expand(2, -1, -1)), "value_ids": PAIRS}
    policies = policies[: len(weights)]
    log_pi = reference.log_probs(ref, policies, weights, divergence=divergence, **given)
    return np.stack([reference.filtered_log_probs(row, **filters) for row in log_pi])


def of_answers(steps: Array) -> Array:
    """log q [answers] of whole answers, from that of each step."""
    return TREE.logprobs(torch.from_numpy(steps)).numpy()


def tilts() -> Array:
    """sum v V [answers] of the last token of each answer."""
    last = TREE.mask.sum(1).long() - 1
    rows = torch.arange(len(last))
    nodes, tokens = TREE.nodes[rows, last], TREE.tokens[rows, last]
    return (torch.tensor(V).double() @ SCORES[:, nodes, tokens]).numpy()


def log_answers() -> Array:
    """log pi [answers, models] of whole answers."""
    return torch.stack([TREE.logprobs(table) for table in TABLES], 1).numpy()


def answers_drawn(out: Any) -> Array:
    """How often each complete answer of the tree was drawn."""
    tokens = torch.nn.functional.pad(out.tokens, (0, 3 - out.tokens.shape[1]))
    same = (tokens[:, None] == TREE.tokens[None]).all(2)
    assert bool((same.sum(1) == 1).all())
    return same.sum(0).numpy()
