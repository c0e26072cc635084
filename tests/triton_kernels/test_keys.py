"""What the Triton kernels make of a tile's keys: log-linear tiles read once, masses without
logarithms (TRITON_INTERPRET=1)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import logits, normal
from mod_fused.triton_kernels import keys

import mod_fused
from mod_fused import reference

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("bad", "tensor", "tiles"),
    [(None, 1, 0), (-math.inf, 1, 1), (math.nan, 1, 1), (math.inf, 1, 1), (-3e38, 1, 1)]
    + [(-math.inf, 0, 1), (-math.inf, 2, 1), (-math.inf, 3, 0), (math.nan, 3, 0), (-3e38, 3, 0)],
)
def test_log_linear_tiles_are_read_again_where_a_logit_that_counts_is_not_finite(
    bad, tensor, tiles, monkeypatch
):
    ref, policies = logits(215, 1, 5 * 1024 + 7, 3, kind="typical")
    if bad is not None:
        [ref, *policies][tensor][0, 1500] = bad
    weights = [2.5, -0.5, 0.0]
    again, exactly = [], keys.keys_and_broken

    def count(mixing, state, model_fields, row, tile, count, variant):
        again.append(int(tile))
        return exactly(mixing, state, model_fields, row, tile, count, variant)

    monkeypatch.setattr(keys, "keys_and_broken", count)
    found = mod_fused.sample(ref, policies, weights, seed=3, backend="triton")
    assert found.valid == (bad in (None, -math.inf, -3e38) or tensor == 3)
    expected = mod_fused.sample(ref, policies, weights, seed=3, backend="torch")
    assert torch.equal(found.tokens, expected.tokens)
    # The last tile, which is not whole, and in the end the token's.
    assert len(again) == 1 + tiles + 1
    assert again[:-1] == [1] * tiles + [5]


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5"])
def test_the_largest_value_that_counts_forces_its_token(divergence):
    ref, policies = logits(219, 1, 300, 2, kind="typical")
    values = torch.zeros(1, 1, 300)
    values[0, 0, 7], values[0, 0, 9] = 9.9e36, -math.inf  # 1e37 breaks the row
    drawn = mod_fused.sample(
        ref, policies, [0.6, 0.3], divergence=divergence, values=values, seed=1, backend="triton"
    )
    assert drawn.valid.all() and drawn.tokens == 7 and -2e-6 <= drawn.logprobs <= 0.0


def test_where_no_tensor_counts_the_tokens_of_the_vocabulary_are_alike():
    _, policies = logits(218, 64, 3, 2, kind="typical")
    drawn = mod_fused.sample(None, policies, [0.0, 0.0], seed=1, backend="triton")
    assert drawn.valid.all() and set(drawn.tokens.tolist()) == {0, 1, 2}
    assert torch.allclose(drawn.logprobs, torch.tensor(1.0 / 3.0).log())


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5"])
@pytest.mark.parametrize("kind", ["typical", "brutal"])
def test_log_probabilities_come_from_masses_without_logarithms(divergence, kind):
    ref, policies = logits(216, 4, 2100, 2, kind=kind)
    values = normal(217, 1, 4, 2100)
    for weights, tilt in (([0.6, 0.3], None), ([1.4, -0.6], values)):
        arguments = {"divergence": divergence, "values": tilt}
        drawn = mod_fused.sample(ref, policies, weights, seed=1, backend="triton", **arguments)
        expected = reference.log_probs(ref, policies, weights, **arguments)
        own = expected[range(4), drawn.tokens]
        assert drawn.valid.all() and np.abs(drawn.logprobs.double().numpy() - own).max() <= 2e-5
