"""min_new_tokens, and what it does to a mask of the caller's and to the cut of the support."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble, generate

FOX, DOG = tiny.VOCAB["fox"], tiny.VOCAB["dog"]


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [tiny.gpt2(1), tiny.vivid(tiny.llama(0), 0)]


@pytest.mark.parametrize("beams", [1, 3])
def test_no_end_of_sequence_comes_before_as_at_the_policy_itself(
    models: list[Any], beams: int
) -> None:
    ids = torch.tensor([[3, 4, 5], [7, 8, 9]])
    options: dict[str, Any] = {"eos_token_id": [2, 4, 15, 20], "max_new_tokens": 9}
    options |= {"num_beams": beams, "do_sample": False, "pad_token_id": 6}
    lengths = []
    for least in (0, 4, 9):
        expected = models[1].generate(input_ids=ids, min_new_tokens=least, **options)
        out = generate(
            Ensemble(models), input_ids=ids, weights=[1.0], min_new_tokens=least, **options
        )
        assert torch.equal(out.sequences, expected)
        lengths.append(int(out.lengths.min()))
    assert lengths[0] < 4 <= lengths[1] < 9 == lengths[2]


@pytest.mark.parametrize("packed", [False, True])
def test_it_goes_with_a_mask_of_the_callers(models: list[Any], packed: bool) -> None:
    def only(allowed: list[int]) -> torch.Tensor:
        mask = torch.zeros(2, tiny.V, dtype=torch.bool)
        mask[:, allowed] = True
        if not packed:
            return mask
        bits = 2 ** torch.arange(tiny.V, dtype=torch.int64)
        return (mask * bits).sum(1, keepdim=True).to(torch.int32)

    ids = torch.tensor([[3, 4, 5], [7, 8, 9]])
    options: dict[str, Any] = {"input_ids": ids, "weights": [0.5], "divergence": "jsd", "seed": 1}
    out = generate(
        Ensemble(models),
        **options,
        mask_fn=lambda step, sequences: only([FOX, DOG]),
        eos_token_id=FOX,
        min_new_tokens=3,
        max_new_tokens=30,
    )
    assert out.tokens[:, :3].eq(DOG).all()
    assert out.finish_reasons == ["eos", "eos"] and out.valid.all()


def test_ids_beyond_the_vocabulary_end_nothing_and_are_no_error() -> None:
    ensemble = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    options: dict[str, Any] = {"input_ids": torch.tensor([[3]]), "weights": [0.5], "seed": 0}
    out = generate(ensemble, **options, eos_token_id=[tiny.V, 500], min_new_tokens=2)
    assert torch.equal(out.tokens, generate(ensemble, **options, eos_token_id=[]).tokens)


def test_the_automatic_cut_is_measured_from_what_the_mask_leaves() -> None:
    # The end is e^15 times likelier than all else: a cut from it would leave nothing of the rest.
    logits = torch.tensor([[20.0, 5.0, 4.0, -1.0, -10.0]])
    scaled = torch.tensor([2.0, 0.5])
    models = [lambda tokens: logits / scaled[0], lambda tokens: (logits - 1e-3) / scaled[1]]
    options: dict[str, Any] = {
        "input_ids": torch.tensor([[1]]),
        "weights": [0.5],
        "divergence": "jsd",
        "logit_scales": scaled.tolist(),
        "eos_token_id": 0,
        "output_logits": True,
        "max_new_tokens": 2,
        "seed": 0,
    }
    out = generate(Ensemble(models), **options, min_new_tokens=1)
    assert out.valid.all()
    # Kept: above 1e-3 of token 1, which is 6.9 below it. Behind min_new_tokens: of the end.
    assert out.logits[0].isfinite().tolist() == [[True, True, True, True, False]]
    assert out.logits[-1].isfinite().tolist()[0][1:] == [False] * 4
    off = generate(Ensemble(models), **options, min_new_tokens=1, plausibility=None)
    assert off.logits[0].isfinite().all()


def test_more_than_max_new_tokens_is_refused(models: list[Any]) -> None:
    for least, error, message in [
        (4, ValueError, "min_new_tokens must be at most max_new_tokens = 3, got 4"),
        (-1, ValueError, "min_new_tokens must be at least 0"),
        (1.5, TypeError, "min_new_tokens must be an int"),
    ]:
        with pytest.raises(error, match=message):
            generate(
                Ensemble(models),
                input_ids=torch.tensor([[3]]),
                weights=[1.0],
                max_new_tokens=3,
                min_new_tokens=least,
            )
