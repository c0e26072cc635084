"""Blockwise best-of-K draws from the distribution that it has in closed form, and its KL to what it
draws from keeps the published bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import normal
from scipy.stats import chi2

from mod_fused import Ensemble
from mod_fused.guidance import blockwise_best_of_k

# Order-1 chains over 4 tokens, of which 0 ends; at most T tokens in blocks of L; K continuations.

EOS, TOKENS, T, L, K = 0, 4, 4, 2, 3
CHAINS = normal(1, 2, TOKENS, TOKENS).double() * 0.8
SCORES = (normal(2, 5**T) * 2.0).round() / 2.0  # rounded: many prefixes tie


def code_of(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A number for each response [N, t]: its tokens are digits 1 to 4, padding is 0."""
    return ((tokens + 1) * mask * 5 ** torch.arange(tokens.shape[1])).sum(dim=1)


def outcomes(prefix: tuple[int, ...], length: int) -> Iterator[tuple[int, ...]]:
    """Everything that a block may make of a prefix."""
    if length == 0 or (len(prefix) > 1 and prefix[-1] == EOS):
        yield prefix
        return
    for token in range(TOKENS):
        yield from outcomes((*prefix, token), length - 1)


def probability(chain: np.ndarray, prefix: tuple[int, ...], response: tuple[int, ...]) -> float:
    pairs = zip(response[len(prefix) - 1 : -1], response[len(prefix) :], strict=True)
    return math.prod(chain[a, b] for a, b in pairs)


def best_of_k(p: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """Closed form: the best level of K draws, and in it the reference's own proportions."""
    result = np.zeros_like(p)
    for level in np.unique(scores):
        here = scores == level
        below, up_to = p[scores < level].sum(), p[scores <= level].sum()
        result[here] = (up_to**k - below**k) * p[here] / p[here].sum()
    return result


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def exact(chain: np.ndarray, start: int) -> tuple[dict[tuple[int, ...], float], float, float]:
    """The distribution of whole responses, the expected number of blocks, the largest KL of a
    block to the chain."""
    running, done, blocks, worst = {(start,): 1.0}, {}, 0.0, 0.0
    while running:
        after: dict[tuple[int, ...], float] = {}
        for prefix, mass in running.items():
            blocks += mass
            ends = list(outcomes(prefix, L))
            p = np.array([probability(chain, prefix, y) for y in ends])
            codes = [sum((y + 1) * 5**i for i, y in enumerate(e[1:])) for e in ends]
            chosen = best_of_k(p, SCORES[codes].double().numpy(), K)
            assert abs(chosen.sum() - 1.0) < 1e-12
            worst = max(worst, kl(chosen, p))
            for end, q in zip(ends, chosen, strict=True):
                finished = end[-1] == EOS or len(end) == 1 + T
                (done if finished else after)[end] = mass * q
        running = after
    return done, blocks, worst


@pytest.mark.parametrize("drawn_from", ["reference", "mixture"])
def test_the_distribution_is_the_exact_one_and_its_kl_keeps_the_bound(drawn_from: str) -> None:
    draws, start = 20_000, 2
    tables = [c.float() for c in CHAINS]
    steps: list[Any] = [lambda tokens, t=t: t[tokens[:, -1]] for t in tables]
    if drawn_from == "reference":
        weights, logits = None, CHAINS[0]
    else:
        weights, logits = [0.5], 0.5 * CHAINS.log_softmax(-1).sum(0)
    chain = logits.softmax(-1).numpy()
    out = blockwise_best_of_k(
        Ensemble(steps),
        input_ids=torch.full((draws, 1), start),
        weights=weights,
        score_fn=lambda sequences, mask: SCORES[code_of(sequences[:, 1:], mask[:, 1:])],
        k=K,
        block_length=L,
        max_new_tokens=T,
        eos_token_id=EOS,
        seed=5,
        use_cache=False,
    )
    expected, blocks, worst = exact(chain, start)
    assert len(expected) == 3**4 + 3**3 + 3**2 + 3 + 1
    found = [
        (start, *row[:length])
        for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)
    ]

    # Chi-squared, rare responses together; false alarms: 1 in a million.
    names = sorted(expected, key=expected.__getitem__)
    q = np.array([expected[y] for y in names])
    counts = np.array([found.count(y) for y in names], dtype=float)
    rare = q * draws < 10
    assert counts.sum() == draws and rare.sum() < len(q) / 2
    q, counts = (np.append(x[~rare], x[rare].sum()) for x in (q, counts))
    statistic = ((counts - draws * q) ** 2 / (draws * q)).sum()
    assert statistic < chi2.isf(1e-6, len(q) - 1)
    # It can tell: the chain itself is another distribution.
    itself = np.array([probability(chain, (start,), y) for y in names])
    itself = np.append(itself[~rare], itself[rare].sum())
    assert ((counts - draws * itself) ** 2 / (draws * itself)).sum() > 10 * chi2.isf(1e-6, len(q))

    # KL to what is drawn from: per block, and by the chain rule per response.
    bound = math.log(K) - (K - 1) / K
    names = list(expected)
    whole = kl(
        np.array([expected[y] for y in names]),
        np.array([probability(chain, (start,), y) for y in names]),
    )
    assert 0.5 * bound < worst <= bound
    assert 0.1 < whole <= blocks * bound
    assert set(out.blocks.tolist()) == {1, 2}
    error = 5.0 * 0.5 * bound / math.sqrt(draws)  # five standard deviations: 6 in ten million
    assert abs(out.kl_bound.double().mean().item() - blocks * bound) < error
    log_p = np.array([math.log(probability(chain, (start,), y)) for y in found])
    np.testing.assert_allclose(out.logprobs.sum(1).numpy(), log_p, atol=1e-4)
    codes = [sum((y + 1) * 5**i for i, y in enumerate(e[1:])) for e in found]
    assert torch.equal(out.scores, SCORES[codes])
