"""Values of candidates in the Triton kernels: read directly, whatever their number and places,
against the same values made dense."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import logits, normal
from mod_fused.triton_kernels import launch

import mod_fused

pytestmark = pytest.mark.interpreted

BATCH, VOCAB = 3, 1300  # two tiles, the last one cut
#: By name: how many candidates a row has, and the ids that they are taken from.
PLACES = {
    "one": (1, range(VOCAB)),
    "some": (15, range(VOCAB)),
    "one tile": (25, range(1024)),
    "the last": (12, range(VOCAB - 12, VOCAB)),
    "blocks": (21, range(VOCAB)),  # more than a tile reads at once, see `blocks`
}
WEIGHTS: dict[str, Any] = {
    "numbers": [1.5, -0.5],
    "a zero": [0.0, 2.0],
    "by row": torch.tensor([[1.0, 0.5], [0.0, 0.0], [-1.0, 2.0]]),
}


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A tile reads 8 candidates at once where the test's places are `blocks`."""
    if getattr(request.node, "callspec", None) and "blocks" in request.node.callspec.id:
        monkeypatch.setattr(launch, "CANDIDATE_BLOCKS", (4, 8))


def candidates(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [B, K], one of them padding if there are several, values [2, B, K], and these dense."""
    count, places = PLACES[name]
    rng = np.random.default_rng(count)
    ids = torch.stack([torch.from_numpy(rng.permutation(places)[:count]) for _ in range(BATCH)])
    values = normal(11, 2, BATCH, count)
    if count > 2:
        values[0, 1, 2] = -math.inf
        ids[2, count // 2] = -1
    dense = torch.full((2, BATCH, VOCAB + 1), -math.inf)
    dense.scatter_(2, torch.where(ids < 0, VOCAB, ids).expand(2, -1, -1), values)
    return ids, values, dense[..., :VOCAB]


CASES = [(name, "numbers", "reverse_kl") for name in PLACES]
CASES += [(name, "numbers", "jsd") for name in ("blocks", "one tile")]
CASES += [("some", kind, d) for kind in ("a zero", "by row") for d in ("reverse_kl", "jsd")]


@pytest.mark.parametrize(("name", "kind", "divergence"), CASES)
def test_they_are_the_dense_values_with_all_others_excluded(name, kind, divergence):
    ref, policies = logits(12, BATCH, VOCAB, 1, kind="typical")
    ids, values, dense = candidates(name)
    given: dict[str, Any] = {"divergence": divergence, "backend": "triton"}
    weights = WEIGHTS[kind]
    own = given | {"values": values, "value_ids": ids, "value_weights": weights}
    # Excluded by a value of weight 1: one of weight 0 excludes nothing.
    excluded = torch.where((dense[:1] == -math.inf) & (dense[1:] == -math.inf), dense[:1], 0.0)
    one = torch.ones(BATCH, 1) if isinstance(weights, torch.Tensor) else [1.0]
    extended = torch.cat([weights, one], 1) if isinstance(weights, torch.Tensor) else weights + one
    finite = torch.where(excluded == -math.inf, 0.0, dense)
    full = given | {"values": torch.cat([finite, excluded]), "value_weights": extended}
    args = (ref, policies, [0.6])
    found, expected = (mod_fused.log_probs(*args, **x) for x in (own, full))
    assert torch.equal(found == -math.inf, expected == -math.inf)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    draws = [mod_fused.sample(*args, **x, seed=5) for x in (own, full)]
    assert draws[0].valid.all() and torch.equal(draws[0].tokens, draws[1].tokens)
    torch.testing.assert_close(draws[0].logprobs, draws[1].logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-2, VOCAB, 2**62])
def test_an_id_out_of_range_makes_its_row_invalid_alone(bad):
    ref, policies = logits(13, BATCH, VOCAB, 1, kind="typical")
    ids, values, _ = candidates("some")
    own: dict[str, Any] = {"values": values, "value_ids": ids.clone(), "backend": "triton"}
    good = mod_fused.sample(ref, policies, [0.6], **own, top_k=5, seed=1)
    own["value_ids"][1, 7] = bad
    out = mod_fused.sample(ref, policies, [0.6], **own, top_k=5, seed=1)
    assert out.valid.tolist() == [True, False, True] and out.tokens[1] == 0
    assert out.logprobs[1].isnan() and torch.equal(out.tokens[::2], good.tokens[::2])
    log_pi = mod_fused.log_probs(ref, policies, [0.6], divergence="jsd", **own)
    assert log_pi.isnan().all(1).tolist() == [False, True, False]


def test_ids_and_values_may_have_any_strides_and_16_bits():
    ref, policies = logits(15, BATCH, VOCAB, 1, kind="typical")
    ids, values, _ = candidates("some")
    values[:, 2, 7] = math.nan  # of the padding, which nobody looks at
    half = values.bfloat16()
    plain = {"values": half.float(), "value_ids": ids, "backend": "triton", "divergence": "jsd"}
    wide = torch.full((2, BATCH + 1, 22), math.nan, dtype=torch.bfloat16)
    wide[:, :BATCH, 3:18] = half
    given = plain | {"values": wide[:, :BATCH, 3:18], "value_ids": ids.t().contiguous().t()}
    args = (ref, policies, [0.6])
    found, expected = (mod_fused.log_probs(*args, **x) for x in (given, plain))
    assert torch.equal(found, expected) and found.exp().sum(1).isclose(torch.ones(3)).all()


def test_a_row_without_a_candidate_is_invalid_alone():
    ref, policies = logits(16, BATCH, VOCAB, 1, kind="typical")
    ids, values, _ = candidates("some")
    ids[1] = -1
    own: dict[str, Any] = {"values": values, "value_ids": ids, "backend": "triton"}
    out = mod_fused.sample(ref, policies, [0.6], **own, return_model_logprobs=True, seed=1)
    assert out.valid.tolist() == [True, False, True]
    assert out.model_logprobs.isnan().all(1).tolist() == [False, True, False]


def test_a_plan_reads_ids_that_change_in_place():
    ref, policies = logits(14, BATCH, VOCAB, 1, kind="typical")
    ids, values, _ = candidates("some")
    args = (ref, policies, [0.6])
    own: dict[str, Any] = {"values": values, "value_ids": ids, "backend": "triton", "seed": 2}
    step = mod_fused.plan(*args, **own)
    for shift in (0, 1024):
        ids.copy_(torch.where(ids < 0, ids, (ids + shift) % VOCAB))
        expected = mod_fused.sample(*args, **own, position=3)
        assert torch.equal(step(position=3).tokens, expected.tokens)
        assert (ids == expected.tokens[:, None]).any(1).all()
