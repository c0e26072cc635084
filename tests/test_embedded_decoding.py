"""The decoder on the models that ship with the package: real checkpoints, greedy and sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mod_fused import Ensemble, generate, world


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble.embedded(dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Four prompts of four lengths."""
    chosen = {len(p): p for p in world.prompts(50, seed=1)}
    return [chosen[length] for length in sorted(chosen)[:: max(1, len(chosen) // 4)]][:4]


@pytest.mark.parametrize("model", range(1 + len(world.OBJECTIVES)))
def test_greedy_at_a_corner_is_the_models_own_generate(
    ensemble: Ensemble, prompts: list[str], model: int
) -> None:
    weights = [float(i == model) for i in range(1, len(ensemble.models))]  # all 0: the reference
    out = generate(ensemble, prompts, weights=weights, do_sample=False, max_new_tokens=30)
    batch = ensemble.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"].eq(0).any()  # the lengths do differ
    expected = ensemble.models[model].generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=30,
        do_sample=False,
    )
    assert torch.equal(out.sequences, expected)
    assert out.texts == [
        ensemble.tokenizer.decode(row, skip_special_tokens=True)
        for row in expected[:, batch["input_ids"].shape[1] :]
    ]


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
