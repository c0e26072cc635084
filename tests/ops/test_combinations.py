"""Random combinations of all options at once, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DIVERGENCES,
    KINDS,
    assert_matches_oracle,
    assert_proposal_logprobs_are_the_oracle_s,
    assert_tokens_are_the_oracle_s,
    logits,
)

from mod_fused import reference

pytestmark = pytest.mark.sanitized

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_call(seed: int) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Mixture arguments, mixture keywords and filter keywords."""
    rng = np.random.default_rng([4711, seed])

    def coin() -> bool:
        return bool(rng.random() < 0.5)

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape) * scale).float()

    batch, width = 6, int(rng.choice([3, 50, 1023, 1400, 2100]))
    count = int(rng.integers(0, 5))
    divergence = DIVERGENCES[seed % len(DIVERGENCES)]
    kind = list(KINDS)[rng.integers(len(KINDS))]
    ref, policies = logits(seed, batch, width, count, kind=kind, excluded=rng.choice([0, 0.1]))
    policies = [
        p[:, : width - int(rng.integers(0, 3) > 1)].to(DTYPES[rng.integers(3)]) for p in policies
    ]
    vocab = min([width] + [p.shape[1] for p in policies])
    if coin():
        vocab = max(2, vocab - 2)
    kwargs: dict[str, Any] = {"divergence": divergence, "vocab_size": vocab}
    without_ref = divergence == "reverse_kl" and count > 0 and coin()
    models = count + (not without_ref)
    # Multiples of 1/64: their sum is exact, which Z = 0 needs (see the design's tau).
    weights = torch.from_numpy(rng.integers(-16, 65, size=(batch, count)) / 64.0).float()
    weights = weights if coin() else weights[0]
    if coin():
        weights = weights.tolist()
    if count == 0 or coin():
        scores = int(rng.integers(1, 4))
        candidates = int(rng.integers(1, min(vocab, 30) + 1))
        if coin():
            kwargs["value_ids"] = torch.stack(
                [torch.from_numpy(rng.permutation(vocab)[:candidates]) for _ in range(batch)]
            )
            kwargs["value_ids"][0, 1:] = -1
            kwargs["values"] = tensor(scores, batch, candidates, scale=2.0)
        else:
            kwargs["values"] = tensor(scores, batch, vocab, scale=2.0)
        if coin():
            kwargs["value_weights"] = tensor(batch, scores) if coin() else [0.5] * scores
    if coin():
        kwargs["logit_scales"] = rng.uniform(0.5, 1.5, size=models).tolist()
    if not without_ref and coin():
        kwargs["prefix_logprobs"] = tensor(batch, models, scale=10.0)
    if coin():
        kwargs["plausibility"] = float(10.0 ** rng.uniform(-5, -0.5))
        kwargs["plausibility_tensor"] = int(rng.integers(1 if without_ref else 0, count + 1))
        if coin():
            kwargs["plausibility"] = kwargs["plausibility"] * (tensor(batch) > 0)
    if coin() and divergence != "reverse_kl":
        kwargs["normalizer"] = "zero" if coin() else "exact"
    if "prefix_logprobs" in kwargs and kwargs.get("normalizer") != "zero" and coin():
        own = kwargs["prefix_logprobs"].amax(1) + tensor(batch, scale=3.0)
        kwargs["mixture_prefix_logprobs"] = own.double()
    filters: dict[str, Any] = {}
    if coin():
        filters["temperature"] = torch.from_numpy(rng.uniform(0.5, 2.0, size=batch)).float()
    if coin():
        filters["top_k"] = int(rng.integers(1, 2000))
    if coin():
        filters["top_p"] = float(np.float32(rng.uniform(0.3, 1.0)))
    if coin():
        filters["min_p"] = torch.from_numpy(rng.uniform(0.0, 0.2, size=batch)).float()
    if coin():
        filters["mask"] = torch.from_numpy(rng.random((batch, vocab)) < 0.7)
    return (None if without_ref else ref, policies, weights), kwargs, filters


@pytest.mark.parametrize("seed", range(140))
def test_a_random_combination_of_options_equals_the_oracle(op, seed):
    args, kwargs, filters = random_call(seed)
    log_p = reference.log_probs(*args, **kwargs)
    assert_matches_oracle(op.log_probs(*args, **kwargs), log_p)
    seeds, positions = torch.arange(6) * 31 + seed, torch.arange(6) % 3
    asked = {"return_proposal_logprobs": True, "seed": seeds, "position": positions}
    drawn = op.sample(*args, **kwargs, **filters, **asked)
    assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, positions, **filters)
    assert_proposal_logprobs_are_the_oracle_s(drawn, log_p, **filters)
