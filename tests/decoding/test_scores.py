"""The distributions of each step: log pi*, and what the tokens are drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from mod_fused import Ensemble, generate, log_probs

IDS = torch.tensor([[3, 4, 5], [7, 8, 9]])


def warped(log_p: torch.Tensor, temperature: float, **filters: Any) -> torch.Tensor:
    """transformers' own filters in its order, normalised."""
    kinds = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    warpers = [kinds[name](x) for name, x in filters.items()]
    warpers = [logits_process.TemperatureLogitsWarper(temperature), *warpers]
    return LogitsProcessorList(warpers)(IDS[:1], log_p[None]).log_softmax(1)[0]


def test_scores_are_filtered_as_transformers_filters_and_logits_are_log_pi() -> None:
    models = [tiny.llama(0), tiny.gpt2(1), tiny.llama(2)]
    mask = torch.arange(tiny.V).ne(5).expand(2, tiny.V)
    options: dict[str, Any] = {"weights": [0.6, 0.7], "divergence": "jsd", "plausibility": 1e-4}
    rows: dict[str, list[Any]] = {
        "temperature": [0.7, 1.4], "top_k": [6, 9], "top_p": [0.8, 0.95], "min_p": [0.02, 0.01],
    }  # fmt: skip
    out = generate(
        Ensemble(models),
        input_ids=IDS,
        **options,
        **rows,
        mask_fn=lambda step, sequences: mask,
        eos_token_id=[],
        seed=2,
        max_new_tokens=5,
        output_scores=True,
        output_logits=True,
    )
    assert len(out.scores) == len(out.logits) == 5
    for row in range(2):
        prompt, response = IDS[row].tolist(), out.tokens[row].tolist()
        logits = [tiny.teacher_forced(model, prompt, response) for model in models]
        expected = log_probs(logits[0], logits[1:], **options)
        for step in range(5):
            log_p = out.logits[step][row]
            torch.testing.assert_close(log_p, expected[step], atol=1e-4, rtol=1e-4)
            assert out.logprobs[row, step] == pytest.approx(float(log_p[response[step]]), abs=1e-5)
            each = {name: x[row] for name, x in rows.items()}
            theirs = warped(log_p.masked_fill(~mask[row], -torch.inf), **each)
            torch.testing.assert_close(out.scores[step][row], theirs, atol=1e-5, rtol=0)
            assert out.scores[step][row, response[step]] > -torch.inf


def test_greedy_rows_have_no_filters_as_in_transformers() -> None:
    out = generate(
        Ensemble([tiny.llama(0), tiny.gpt2(1)]),
        input_ids=IDS,
        weights=[0.5],
        temperature=[0.0, 2.0],
        top_k=3,
        seed=0,
        max_new_tokens=2,
        output_scores=True,
        output_logits=True,
    )
    torch.testing.assert_close(out.scores[0][0], out.logits[0][0], atol=1e-6, rtol=0)
    assert out.scores[0][1].isfinite().sum() == 3
    assert out.tokens[0, 0] == out.logits[0][0].argmax()


def test_they_are_absent_unless_asked_for_and_as_long_as_the_responses() -> None:
    ensemble = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    options: dict[str, Any] = {"input_ids": IDS, "weights": [0.5], "seed": 0}
    out = generate(ensemble, **options, output_logits=True)
    assert out.scores is None and len(out.logits) == out.tokens.shape[1] == 20
    assert generate(ensemble, **options).logits is None
    out = generate(
        ensemble, **options, output_scores=True, stopping_criteria=lambda ids, scores: True
    )
    assert len(out.scores) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_candidates": 2},
        {"resample_fn": lambda step, sequences, lengths, reasons: None},
    ],
    ids=lambda x: next(iter(x)),
)
@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_where_rows_are_chosen_anew_they_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        generate(
            Ensemble([tiny.llama(0), tiny.gpt2(1)]),
            input_ids=IDS,
            weights=[0.5],
            **options,
            **{name: True},
        )
