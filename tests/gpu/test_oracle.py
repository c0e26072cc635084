"""Distributions and tokens on the GPU: those of the float64 oracle, and of another backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import torch
from interpreter import INTERPRETED
from torch import Tensor

import mod_fused
from mod_fused import reference

pytestmark = pytest.mark.gpu

WEIGHTS = [0.5, 0.25]
FALSE_ALARMS = 1e-6  # of a chi-squared test
MAX_DIFFERING = 1e-4  # share of draws that may differ between two backends: none of a case
DTYPES = ("bfloat16", "float16", "float32")

Arguments = tuple[dict[str, Any], dict[str, Any]]  # of the distribution, of the draw


def packed(mask: Tensor) -> Tensor:
    """bool [B, V] as int32 [B, ceil(V/32)]."""
    batch, vocab = mask.shape
    bits = torch.nn.functional.pad(mask, (0, -vocab % 32)).view(batch, -1, 32).long()
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def tensor_parameters(b: int, v: int) -> Arguments:
    weights = torch.tensor(WEIGHTS).expand(b, 2) * torch.linspace(0.5, 1.0, b)[:, None]
    return {"weights": weights}, {
        "temperature": torch.linspace(0.7, 1.3, b),
        "top_k": torch.arange(b) * 20 + 5,
        "top_p": torch.linspace(0.5, 1.0, b),
        "min_p": torch.linspace(0.0, 0.05, b),
    }


def candidates(b: int, v: int) -> Arguments:
    ids = torch.arange(20).expand(b, 20) * (v // 21) + torch.arange(b)[:, None]
    ids[:, 15:] = -1
    return {"values": cases.normal(5, 1, b, 20), "value_ids": ids}, {}


def sparse_bias(b: int, v: int) -> dict[str, Any]:
    ids = torch.arange(20).expand(b, 20) * (v // 21) + torch.arange(b)[:, None]
    return {"bias": 5.0 * cases.normal(9, b, 20), "bias_ids": ids}


def drawn_by(drawing: dict[str, Any], b: int, v: int) -> dict[str, Any]:
    """The draw's arguments with a sparse bias as [B, V], which the oracle takes."""
    if "bias_ids" not in drawing:
        return drawing
    bias = torch.zeros(b, v).scatter(1, drawing["bias_ids"], drawing["bias"])
    return {"bias": bias}


#: What is asked of the op besides the mixture of two policies; [B, V] to arguments.
FEATURES: dict[str, Callable[[int, int], Arguments]] = {
    "plain": lambda b, v: ({}, {}),
    "greedy": lambda b, v: ({}, {"temperature": 0.0}),
    "temperature": lambda b, v: ({}, {"temperature": 0.7}),
    "mask": lambda b, v: ({}, {"mask": cases.normal(3, b, v) > 0.0}),
    "packed mask": lambda b, v: ({}, {"mask": packed(cases.normal(3, b, v) > 0.0)}),
    "bias": lambda b, v: ({}, {"bias": 3.0 * cases.normal(8, b, v)}),
    "sparse bias": lambda b, v: ({}, sparse_bias(b, v)),
    "bias, filters": lambda b, v: (
        {},
        {"bias": 3.0 * cases.normal(8, b, v), "top_k": 50, "top_p": 0.9, "temperature": 0.8},
    ),
    "top_k": lambda b, v: ({}, {"top_k": 50}),
    "top_p": lambda b, v: ({}, {"top_p": 0.9}),
    "min_p": lambda b, v: ({}, {"min_p": 0.05}),
    "per-row tensors": tensor_parameters,
    "values": lambda b, v: ({"values": cases.normal(4, 2, b, v), "value_weights": [1.0, 0.5]}, {}),
    "candidates": candidates,
    "prefix": lambda b, v: ({"prefix_logprobs": 5.0 * cases.normal(6, b, 3)}, {}),
    "own mass": lambda b, v: (
        {"prefix_logprobs": 5.0 * cases.normal(6, b, 3)}
        | {"mixture_prefix_logprobs": 5.0 * cases.normal(7, b)},
        {},
    ),
    "scales": lambda b, v: ({"logit_scales": [1.0, 0.75, 1.25]}, {}),
    "plausibility": lambda b, v: ({"plausibility": 1e-3, "plausibility_tensor": 1}, {}),
    "plausibility by row": lambda b, v: ({"plausibility": [0.0, *[1e-3] * (b - 1)]}, {}),
    "cut vocabulary": lambda b, v: ({"vocab_size": v - 3}, {}),
    "zero normalizer": lambda b, v: ({"normalizer": "zero"}, {}),
}
#: Asked of every divergence; the other features of one for each way to normalise (log-linear, by
#: the secular equation, by Newton's method). Every combination takes a compilation.
OF_ALL = ("plain", "per-row tensors", "values", "prefix", "own mass", "zero normalizer")
OF_EVERY_FEATURE = ("reverse_kl", "jsd", "jeffrey")


def matrix() -> list[tuple[str, str, str, str]]:
    """Backend, divergence, dtype and feature; plain calls in every dtype, of torch on the GPU,
    too. In the interpreter few, the features by torch."""
    if INTERPRETED:
        found = [("torch", "jsd", "float32", feature) for feature in FEATURES]
        return found + [("triton", d, "bfloat16", "plain") for d in ("reverse_kl", "jsd")]
    every = cases.DIVERGENCES
    plain = [(b, d, t, "plain") for b in ("triton", "torch") for d in every for t in DTYPES]
    dtype_of = {d: DTYPES[i % 3] for i, d in enumerate(every)}
    of_all = [("triton", d, dtype_of[d], f) for d in every for f in OF_ALL]
    of_some = [("triton", d, dtype_of[d], f) for d in OF_EVERY_FEATURE for f in FEATURES]
    return list(dict.fromkeys(plain + of_all + of_some))


def put(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in arguments.items()}


@pytest.mark.parametrize(("backend", "divergence", "dtype", "feature"), matrix())
def test_log_probs_and_tokens_are_the_oracle_s(gpu, backend, divergence, dtype, feature):
    b, v = gpu.pick((6, 2100), (2, 1030))
    ref, policies = cases.logits(21, b, v, 2, dtype=getattr(torch, dtype), excluded=0.05)
    mixing, drawing = FEATURES[feature](b, v)
    mixing = {"weights": WEIGHTS, "divergence": divergence, **mixing}
    if feature == "cut vocabulary":  # rows that are not one after the other, an odd width
        ref = torch.nn.functional.pad(ref, (0, 5))[:, :v]
    expected = reference.log_probs(ref, policies, **mixing)
    seeds, positions = torch.arange(b) * 31 - 5, torch.arange(b) * 3
    arguments = (ref.to(gpu.device), [x.to(gpu.device) for x in policies])
    options = {**put(gpu.device, mixing), "backend": backend}
    cases.assert_matches_oracle(mod_fused.log_probs(*arguments, **options).cpu(), expected)
    options |= put(gpu.device, {**drawing, "seed": seeds, "position": positions})
    drawn = mod_fused.sample(*arguments, **options, return_model_logprobs=True)
    valid, tokens = drawn.valid.cpu().numpy(), drawn.tokens.cpu()
    assert (valid == ~np.isnan(expected).any(axis=1)).all()
    filters = drawn_by(drawing, b, v)
    cases.assert_tokens_are_the_oracle_s(tokens, expected, seeds, positions, **filters)
    at = expected[np.arange(b), tokens.numpy()]
    assert np.abs(drawn.logprobs.cpu().numpy() - at)[valid].max(initial=0.0) <= 1e-4


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p, temperature": {"min_p": 0.05, "temperature": 1.3},
    "all": {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "temperature": 0.8},
}
#: 22400 draws in all; in the interpreter each filter once.
PAIRS = [(d, f) for d in cases.DIVERGENCES for f in FILTERS][:: 8 if INTERPRETED else 1]


@pytest.mark.parametrize(("divergence", "filters"), PAIRS)
def test_tokens_are_those_of_another_backend_on_the_cpu(gpu, divergence, filters):
    rows, vocab = gpu.pick((640, 5000), (1, 1030))
    ref, policies = cases.logits(22, rows, vocab, 2, kind="typical", dtype=torch.bfloat16)
    seeds = torch.arange(rows) * 7919
    options = {"divergence": divergence, **FILTERS[filters]}
    on_gpu = (ref.to(gpu.device), [x.to(gpu.device) for x in policies], WEIGHTS)
    mine = mod_fused.sample(*on_gpu, **options, seed=seeds.to(gpu.device), backend="triton")
    other = "cpu" if mod_fused.backends()["cpu"] == "available" else "torch"
    theirs = mod_fused.sample(ref, policies, WEIGHTS, **options, seed=seeds, backend=other)
    same = mine.tokens.cpu() == theirs.tokens
    assert int((~same).sum()) <= MAX_DIFFERING * rows
    assert (mine.logprobs.cpu() - theirs.logprobs).abs().max() <= 2e-4


def chi_squared(counts: np.ndarray, p: np.ndarray) -> tuple[float, int, float]:
    """Statistic, degrees of freedom and p-value of counts [V] against probabilities [V]; the
    rarest are merged until five of them are expected."""
    order = np.argsort(-p, kind="stable")
    seen, expected = counts[order].astype(np.float64), p[order] * counts.sum()
    rest = np.cumsum(expected[::-1])[::-1] - expected  # behind each
    freedom = int(((expected >= 5.0) & (rest >= 5.0)).sum())
    bins = np.arange(freedom + 1)
    seen, expected = np.add.reduceat(seen, bins), np.add.reduceat(expected, bins)
    statistic = float(((seen - expected) ** 2 / expected).sum())
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return statistic, freedom, float(torch.special.gammaincc(*half)) if freedom else 1.0


def test_chi_squared_accepts_the_distribution_and_sees_a_bias():
    rng = np.random.default_rng(1)
    p = rng.gamma(0.2, size=2500)
    p /= p.sum()
    biased = p * np.where(np.arange(2500) < 1024, 1.03, 1.0)
    assert chi_squared(rng.multinomial(1 << 22, p), p)[2] > FALSE_ALARMS
    assert chi_squared(rng.multinomial(1 << 22, biased / biased.sum()), p)[2] < FALSE_ALARMS
    p = np.array([0.03, 0.5, 0.45, 0.02])  # the rare ones are merged
    statistic, freedom, value = chi_squared(np.array([1, 60, 36, 3]), p)
    assert freedom == 2 and statistic == pytest.approx(100 / 50 + 81 / 45 + 1 / 5)
    assert value == pytest.approx(np.exp(-statistic / 2))  # at two degrees of freedom


@pytest.mark.parametrize("divergence", cases.DIVERGENCES[:: 3 if INTERPRETED else 1])
def test_millions_of_draws_follow_the_oracle_s_distribution(gpu, divergence):
    """Token by token and, where a small bias of many tokens shows, tile by tile."""
    vocab = gpu.pick(2500, 1030)
    total, chunk = gpu.pick((1 << 22, 1 << 18), (200, 200))
    ref, policies = cases.logits(23, 1, vocab, 2, kind="typical", dtype=torch.bfloat16)
    p = np.exp(reference.log_probs(ref, policies, WEIGHTS, divergence=divergence)[0])
    rows = [x.to(gpu.device).expand(chunk, -1) for x in (ref, *policies)]
    seeds = torch.full((chunk,), 77, device=gpu.device)
    counts = torch.zeros(vocab, dtype=torch.int64, device=gpu.device)
    for start in range(0, total, chunk):
        drawn = mod_fused.sample(
            rows[0], rows[1:], WEIGHTS, divergence=divergence, seed=seeds,
            position=torch.arange(start, start + chunk, device=gpu.device),
            backend="torch" if gpu.dry else "triton",
        )  # fmt: skip
        counts += torch.bincount(drawn.tokens, minlength=vocab)
    seen = counts.cpu().numpy()
    tiles = np.arange(0, vocab, reference.TILE)
    of_tiles = np.add.reduceat(seen, tiles), np.add.reduceat(p, tiles)
    for found in (chi_squared(seen, p), chi_squared(*of_tiles)):
        print(f"{total} draws, chi-squared %.1f at %d degrees of freedom, p-value %.2g" % found)
        assert found[2] > FALSE_ALARMS
