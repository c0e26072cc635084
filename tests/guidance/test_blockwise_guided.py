"""Blockwise best-of-K of responses that scorers with caches guide."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_models import taste

from mod_fused import Ensemble
from mod_fused.guidance import Guidance, blockwise_best_of_k


@pytest.mark.parametrize("weights", [None, [0.6, 0.7]], ids=["reference", "mixture"])
def test_the_caches_of_scorers_are_forked_as_those_of_models(weights: Any) -> None:
    dense, scalar = tiny.gpt2(4, eos=None), tiny.llama_value(3)

    def recomputed(step: int, sequences: torch.Tensor) -> torch.Tensor:
        return (
            dense(input_ids=sequences, use_cache=False).logits[None, :, -1, : tiny.V].contiguous()
        )

    options: dict[str, Any] = {
        "input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]),
        "weights": weights,
        "divergence": "jsd",
        "score_fn": taste,
        "k": 3,
        "block_length": 3,
        "max_new_tokens": 8,
        "seed": [7, 8],
    }
    runs = [
        blockwise_best_of_k(tiny.three_models(), value_fn=v, **options)
        for v in (recomputed, Guidance([dense]))
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    torch.testing.assert_close(runs[0].logprobs, runs[1].logprobs, atol=1e-4, rtol=0)

    # Both kinds at once, from prompts of unequal lengths.
    options |= {"input_ids": None, "prompts": tiny.PROMPTS, "seed": [7, 8, 9]}
    guide = Guidance([scalar, dense], candidates=6)
    cached, uncached = (
        blockwise_best_of_k(tiny.three_models(), value_fn=guide, use_cache=c, **options)
        for c in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.logprobs, uncached.logprobs, atol=1e-4, rtol=0)


def test_a_scorer_that_keeps_its_own_state_is_refused() -> None:
    guide = Guidance([tiny.bigram(0)])
    with pytest.raises(TypeError, match="scorer 0 is a callable that keeps its own state"):
        blockwise_best_of_k(
            Ensemble([tiny.gpt2(0)], tiny.tokenizer()),
            tiny.PROMPTS,
            score_fn=taste,
            value_fn=guide,
            k=2,
            block_length=2,
        )
