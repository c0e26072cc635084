"""Mask, temperature, top-k, top-p and min-p: against transformers' processors, and tie rules.

The op shows no filtered distribution, so its filters are tested through what it draws: equal to the
float64 race on the oracle's filtered distribution, which in turn equals transformers'.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_tokens_are_the_oracle_s, logits, normal
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mod_fused import reference

pytestmark = pytest.mark.sanitized

INF = math.inf


def drawn_tokens(op: Any, row: torch.Tensor, count: int = 400, **filters: Any) -> set[int]:
    """The set of tokens in `count` draws from softmax(row [V])."""
    rows = row.expand(count, -1)
    filters = {n: x.expand(count, -1) if n == "mask" else x for n, x in filters.items()}
    drawn = op.sample(None, [rows], [1.0], seed=torch.arange(count), **filters)
    assert drawn.valid.all()
    return set(drawn.tokens.tolist())


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.5, "top_k": 7, "top_p": 0.95, "min_p": 0.001},
    {"temperature": 2.5, "top_p": 0.99, "min_p": 0.05},
]


def processors(setting: dict[str, Any]) -> LogitsProcessorList:
    """What transformers' generate builds from these keywords, in its order."""
    made = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList([make(setting[n]) for n, make in made.items() if n in setting])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_oracle_s_filters_equal_those_of_transformers(setting):
    rows = normal(61, 20, 1500).double() * 3.0
    processed = processors(setting)(torch.zeros(20, 1, dtype=torch.long), rows.clone())
    for row, expected in zip(rows, processed, strict=True):
        log_p = reference.log_softmax(row.numpy())
        got = reference.filtered_log_probs(log_p, **setting)
        expected = torch.log_softmax(expected, dim=-1).numpy()
        assert ((got == -np.inf) == (expected == -np.inf)).all()
        kept = got > -np.inf
        assert np.abs(got[kept] - expected[kept]).max() <= 1e-12


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.slow
def test_draws_equal_the_race_on_the_filtered_distribution(op, setting, divergence):
    ref, policies = logits(62, 60, 1500, 2, kind="typical")
    seeds, positions = torch.arange(60) + 1, torch.arange(60) % 4
    drawn = op.sample(
        ref, policies, [0.5, 0.25], divergence=divergence, seed=seeds, position=positions, **setting
    )
    log_p = reference.log_probs(ref, policies, [0.5, 0.25], divergence=divergence)
    assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, positions, **setting)
    at = np.arange(60), drawn.tokens.numpy()
    assert np.abs(drawn.logprobs.numpy() - log_p[at]).max() <= 1e-4  # before any filter


@pytest.mark.slow
def test_every_filter_may_differ_by_row(op):
    ref, policies = logits(63, 60, 1500, 2, kind="typical")
    rng = np.random.default_rng(63)
    filters = {
        "temperature": torch.from_numpy(rng.choice([0.0, 0.5, 1.0, 1.6], 60)).float(),
        "top_k": torch.from_numpy(rng.choice([0, 1, 5, 60, 9000], 60)),
        "top_p": torch.from_numpy(rng.choice([0.3, 0.9, 1.0], 60)).float(),
        "min_p": torch.from_numpy(rng.choice([0.0, 0.01, 0.2], 60)).float(),
        "mask": torch.from_numpy(rng.random((60, 1500)) < 0.8),
    }
    seeds = torch.arange(60) - 30
    drawn = op.sample(ref, policies, [0.5, 0.25], seed=seeds, **filters)
    log_p = reference.log_probs(ref, policies, [0.5, 0.25])
    assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, torch.zeros(60), **filters)
    lists = {n: x if n == "mask" else x.tolist() for n, x in filters.items()}
    listed = op.sample(ref, policies, [0.5, 0.25], seed=seeds, **lists)
    assert torch.equal(listed.tokens, drawn.tokens)


@pytest.mark.slow
def test_filters_that_are_off_change_nothing(op):
    row = normal(64, 1500).expand(50, -1)
    plain = op.sample(row, [row], [0.5], seed=1).tokens
    off: list[dict[str, Any]] = [
        {"top_k": None}, {"top_k": 0}, {"top_k": 1500}, {"top_k": 10**6}, {"top_p": 1.0},
        {"top_p": None}, {"min_p": 0.0}, {"min_p": None}, {"temperature": 1},
        {"mask": torch.ones(50, 1500, dtype=torch.bool)},
    ]  # fmt: skip
    for setting in off:
        assert torch.equal(op.sample(row, [row], [0.5], seed=1, **setting).tokens, plain)


@pytest.mark.slow
def test_top_k_keeps_every_token_tied_with_the_kth(op):
    row = torch.full((1100,), -5.0)
    row[[3, 700, 1090]] = 2.0
    row[40] = 4.0
    assert drawn_tokens(op, row, top_k=2, temperature=2.0) == {3, 40, 700, 1090}
    assert drawn_tokens(op, row, top_k=1) == {40}
    row[[9, 40]] = 5.0  # now top_k = 1 is not argmax
    assert drawn_tokens(op, row, top_k=1) == {9, 40}
    kept = TopKLogitsWarper(1)(torch.zeros(1, 1), row[None])[0] > -INF
    assert set(kept.nonzero().flatten().tolist()) == {9, 40}


@pytest.mark.slow
def test_top_p_keeps_every_token_tied_with_the_last_kept(op):
    row = torch.log(torch.tensor([0.4, 0.15, 0.15, 0.15, 0.1, 0.05]))
    assert drawn_tokens(op, row, top_p=0.3) == {0}
    assert drawn_tokens(op, row, top_p=0.5) == {0, 1, 2, 3}
    assert drawn_tokens(op, row, top_p=0.86) == {0, 1, 2, 3, 4}
    assert drawn_tokens(op, row, top_p=0.999) == {0, 1, 2, 3, 4, 5}


@pytest.mark.slow
def test_top_p_measures_what_top_k_left_and_temperature_comes_first(op):
    row = torch.log(torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]))
    # Of the two kept by top-k, the first has 0.625 of the mass.
    assert drawn_tokens(op, row, top_p=0.6) == {0, 1}
    assert drawn_tokens(op, row, top_p=0.6, top_k=2) == {0}
    assert drawn_tokens(op, row, top_p=0.6, temperature=100.0) == {0, 1, 2}
    assert drawn_tokens(op, row, min_p=0.15) == {0, 1, 2}
    assert drawn_tokens(op, row, min_p=0.15, temperature=2.0) == {0, 1, 2, 3, 4}


def pack(mask: torch.Tensor) -> torch.Tensor:
    """bool [B, V] to int32 [B, ceil(V/32)], with every bit beyond V set (nobody may look)."""
    batch, vocab = mask.shape
    words = np.ones((batch, -(-vocab // 32) * 32), dtype=np.uint64)
    words[:, :vocab] = mask.numpy()
    packed = (words.reshape(batch, -1, 32) << np.arange(32, dtype=np.uint64)).sum(axis=-1)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 999, 1024, 1025])
def test_packed_masks_equal_boolean_ones(op, vocab):
    row = normal(65, vocab).expand(30, -1)
    rng = np.random.default_rng(65)
    mask = torch.from_numpy(rng.random((30, vocab)) < 0.3)
    mask[:, vocab - 1] = True
    drawn = [op.sample(row, [row], [0.5], seed=2, mask=m) for m in (mask, pack(mask))]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert drawn[0].valid.all() and drawn[1].valid.all()
    assert mask.gather(1, drawn[0].tokens[:, None]).all()


@pytest.mark.slow
def test_a_masked_token_is_never_drawn_and_the_mask_acts_after_z(op):
    # The mask leaves 2 of 1100 tokens, the least likely ones.
    ref, (policy,) = logits(66, 1, 1100, 1, kind="mild")
    log_p = reference.log_probs(ref, [policy], [0.5], divergence="jsd")[0]
    allowed = np.argsort(log_p)[:2]
    mask = torch.zeros(500, 1100, dtype=torch.bool)
    mask[:, allowed] = True
    drawn = op.sample(
        ref.expand(500, -1), [policy.expand(500, -1)], [0.5], divergence="jsd", mask=mask, seed=3
    )
    assert set(drawn.tokens.tolist()) == set(allowed.tolist())
    assert np.abs(drawn.logprobs.numpy() - log_p[drawn.tokens.numpy()]).max() <= 1e-4
    excluded = torch.where(mask, 0.0, -INF)[None]  # before Z: another distribution
    values = op.sample(
        ref.expand(500, -1), [policy.expand(500, -1)], [0.5], divergence="jsd", values=excluded,
        seed=3,
    )  # fmt: skip
    assert values.logprobs.exp().min() > 1000 * drawn.logprobs.exp().max()


@pytest.mark.parametrize("k", [2, 40, 150, 190, 2500, 2999])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.slow
def test_top_k_over_several_tiles_is_the_mask_of_the_k_largest(op: Any, k: int, ties: bool) -> None:
    """Few, up to a peak per group of a tile, and most of the tokens."""
    row = torch.randn(3000, generator=torch.Generator().manual_seed(k)) * 3
    row = row.round() if ties else row
    rows, seeds = row.expand(64, -1), torch.arange(64)
    mask = (row >= row.topk(k).values[-1]).expand(64, -1)
    filtered = op.sample(None, [rows], [1.0], seed=seeds, top_k=k)
    assert torch.equal(
        filtered.tokens, op.sample(None, [rows], [1.0], seed=seeds, mask=mask).tokens
    )
    strided = torch.stack([mask, mask], dim=-1)[..., 0]
    assert torch.equal(
        filtered.tokens, op.sample(None, [rows], [1.0], seed=seeds, mask=strided).tokens
    )


@pytest.mark.parametrize("setting", [{"top_k": 50}, {"top_p": 0.999}, {"top_p": 1e-6}])
@pytest.mark.slow
def test_equal_keys_over_several_tiles_are_all_kept(op: Any, setting: dict[str, Any]) -> None:
    rows, seeds = torch.zeros(64, 3000), torch.arange(64)
    filtered = op.sample(None, [rows], [1.0], seed=seeds, **setting)
    assert torch.equal(filtered.tokens, op.sample(None, [rows], [1.0], seed=seeds).tokens)
