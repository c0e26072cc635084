"""The decoder on the models that ship with the package: real checkpoints, greedy and sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DIVERGENCES

from mod_fused import Ensemble, generate, world


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble.embedded(dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Four prompts of four lengths."""
    chosen = {len(p): p for p in world.prompts(50, seed=1)}
    return [chosen[length] for length in sorted(chosen)[:: max(1, len(chosen) // 4)]][:4]


def own_generate(ensemble: Ensemble, prompts: list[str], model: int) -> torch.Tensor:
    """What a model of the ensemble says by itself: greedy sequences of its own `generate`."""
    batch = ensemble.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"].eq(0).any()  # the lengths do differ
    return ensemble.models[model].generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=30,
        do_sample=False,
    )


def corner(model: int) -> list[float]:
    """Weight 1 for a policy, 0 for the others; all 0 for the reference."""
    return [float(i == model) for i in range(1, 1 + len(world.OBJECTIVES))]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("model", range(1 + len(world.OBJECTIVES)))
def test_greedy_at_a_corner_is_the_models_own_generate(
    ensemble: Ensemble, prompts: list[str], model: int, divergence: str
) -> None:
    out = generate(
        ensemble,
        prompts,
        weights=corner(model),
        divergence=divergence,
        do_sample=False,
        max_new_tokens=30,
    )
    expected = own_generate(ensemble, prompts, model)
    assert torch.equal(out.sequences, expected)
    assert out.texts == [
        ensemble.tokenizer.decode(row, skip_special_tokens=True)
        for row in expected[:, out.sequences.shape[1] - out.tokens.shape[1] :]
    ]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("model", range(1, 1 + len(world.OBJECTIVES)))
def test_with_history_and_no_z_a_corner_is_the_policys_own_generate(
    ensemble: Ensemble, prompts: list[str], model: int, divergence: str
) -> None:
    out = generate(
        ensemble,
        prompts,
        weights=corner(model),
        divergence=divergence,
        normalizer="zero",
        sequence_history=True,
        do_sample=False,
        max_new_tokens=30,
        return_model_logprobs=True,
    )
    assert out.valid.all()
    assert torch.equal(out.sequences, own_generate(ensemble, prompts, model))
    # Not the token alone: pi* is the policy.
    torch.testing.assert_close(out.logprobs, out.model_logprobs[..., model], atol=1e-3, rtol=0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_batched_is_one_by_one_and_cached_is_recomputed(
    ensemble: Ensemble, prompts: list[str], divergence: str
) -> None:
    options: dict[str, Any] = {
        "weights": [0.5, 0.3, 0.2],
        "divergence": divergence,
        "sequence_history": True,
        "max_new_tokens": 20,
    }
    together = generate(ensemble, prompts, seed=[1, 2, 3, 4], **options)
    recomputed = generate(ensemble, prompts, seed=[1, 2, 3, 4], use_cache=False, **options)
    assert torch.equal(together.tokens, recomputed.tokens)
    torch.testing.assert_close(together.logprobs, recomputed.logprobs, atol=1e-3, rtol=0)
    for row, prompt in enumerate(prompts):
        alone = generate(ensemble, prompt, seed=[row + 1], **options)
        length = int(alone.lengths[0])
        assert torch.equal(alone.tokens[0, :length], together.tokens[row, :length])
        assert alone.texts[0] == together.texts[row]
        assert alone.finish_reasons[0] == together.finish_reasons[row]
