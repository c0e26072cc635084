"""Models that share their head, and decodes with one head beside separate heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble, generate
from mod_fused.decoding.stacked_layers import FewRows

PROMPTS = tiny.PROMPTS
IDS = torch.tensor([[2, 3, 4], [5, 6, 7], [8, 9, 10]])
THIRD = 1.0 / 3.0
ROWS = [[0.25, 0.0, 0.75], [1.5, -0.5, 0.5], [0.5, 0.0, 0.5]]
SCORERS = [tiny.llama(20, eos=None), tiny.gpt2(21, eos=None)]


def sharing(*makers: Callable[..., Any], seed: int = 0) -> list[Any]:
    """Models whose heads are equal, each a tensor of its own."""
    models = [make(seed + i, eos=None) for i, make in enumerate(makers)]
    for model in models[1:]:
        with torch.no_grad():
            model.lm_head.weight.copy_(models[0].lm_head.weight)
    return models


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """GPT-2's head is tied to its embedding, Llama's is not."""
    return sharing(tiny.llama, tiny.gpt2, tiny.llama, tiny.gpt2)


@pytest.fixture(scope="module")
def ensemble(models: list[Any]) -> Ensemble:
    return Ensemble(models, tiny.tokenizer(eos_token=None))


def heads_of(models: list[Any]) -> list[Any]:
    return [model.get_output_embeddings() for model in models]


def counted(modules: list[Any], call: Any, *args: Any, **options: Any) -> tuple[int, Any]:
    """How often the modules' weights multiply, and the result. (A hook would be refused.)"""
    seen: list[int] = []
    wanted = {id(getattr(module, "weight", module)) for module in modules}

    def counts(forward: Any) -> Any:
        @functools.wraps(forward)
        def counted_forward(self: Any, *given: Any, **named: Any) -> Any:
            seen.extend([1] * (id(getattr(self, "weight", self)) in wanted))
            return forward(self, *given, **named)

        return counted_forward

    with pytest.MonkeyPatch.context() as patch:
        for kind in {FewRows, *map(type, modules)}:
            patch.setattr(kind, "forward", counts(kind.forward))
        out = call(*args, **options)
    return len(seen), out


def agree(out: Any, separate: Any) -> None:
    """Two outputs of `generate` are the same, log-probabilities up to rounding."""
    for name in ("sequences", "tokens", "lengths", "valid", "seeds", "finish_reasons", "texts"):
        mine, theirs = getattr(out, name), getattr(separate, name)
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, name
    for name in ("logprobs", "sequences_scores", "scores", "logits"):
        mine, theirs = getattr(out, name), getattr(separate, name)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, equal_nan=True)


def compare(ensemble: Ensemble, *prompts: Any, **options: Any) -> Any:
    """Decode with one head and with a head for each model; every step of the first has one product
    with a head."""
    heads = heads_of([m for m in ensemble.models if m is not None])
    many, separate = counted(heads, generate, ensemble, *prompts, **options)
    once, out = counted(heads, generate, ensemble, *prompts, one_head=True, **options)
    assert 0 < once <= many / 2
    agree(out, separate)
    return out
