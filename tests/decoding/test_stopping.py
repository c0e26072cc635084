"""Stopping criteria and the limit of time: where they end a row, what they see, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import ConfidenceCriteria, EosTokenCriteria

from mod_fused import Ensemble, generate

PAD = tiny.VOCAB["a"]


@pytest.fixture(scope="module")
def corner() -> tuple[Ensemble, Any, Any]:
    tokenizer = tiny.tokenizer(pad_token="a", padding_side="left")
    policy = tiny.vivid(tiny.llama(0), 0)
    batch = tokenizer(tiny.PROMPTS, return_tensors="pt", padding=True)
    return Ensemble([tiny.gpt2(1), policy], tokenizer), policy, batch


def draw(ensemble: Ensemble, **options: Any) -> Any:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [], **options}
    return generate(ensemble, tiny.PROMPTS, weights=[1.0], pad_token_id=PAD, **options)


@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_criteria_end_the_rows_that_they_end_there(
    corner: tuple[Ensemble, Any, Any], beams: int
) -> None:
    models, policy, batch = corner
    free = draw(models)
    pair = free.tokens[0, 2:4]

    def says_the_pair(input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return (input_ids[:, -2:] == pair).all(1)

    ends = EosTokenCriteria(int(free.tokens[1, 4]))
    criteria = StoppingCriteriaList([says_the_pair, ends])
    options: dict[str, Any] = {"num_beams": beams, "stopping_criteria": criteria}
    expected = policy.generate(
        **batch, **options, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
    out = draw(models, **options)
    # Without an end-of-sequence id transformers' beam search fills with -1.
    assert torch.equal(out.sequences, expected.where(expected >= 0, PAD))
    assert out.finish_reasons[0] == "stopping_criteria" and out.lengths[0] < 8
    assert out.attention_mask.sum() == batch["attention_mask"].sum() + out.lengths.sum()


def test_a_criterion_sees_the_sequences_and_the_scores_so_far(
    corner: tuple[Ensemble, Any, Any],
) -> None:
    seen: list[tuple[list[list[int]], Any]] = []
    width = corner[2]["input_ids"].shape[1]

    def second_row_at_three(input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        seen.append((input_ids.tolist(), scores))
        return torch.tensor([False, input_ids.shape[1] >= width + 3, False])

    out = draw(corner[0], stopping_criteria=second_row_at_three, output_scores=True)
    assert out.lengths.tolist() == [8, 3, 8]
    assert out.finish_reasons == ["length", "stopping_criteria", "length"]
    assert out.tokens[1, 3:].eq(PAD).all() and out.logprobs[1, 3:].eq(0).all()
    assert [ids for ids, _ in seen] == [
        out.sequences[:, : width + 1 + t].tolist() for t in range(8)
    ]
    for step, (_, scores) in enumerate(seen):
        assert len(scores) == step + 1 and torch.equal(scores[-1], out.scores[step])
    seen.clear()
    draw(corner[0], stopping_criteria=[second_row_at_three])
    assert [scores for _, scores in seen] == [None] * 8


def test_one_bool_ends_all_rows_and_an_end_of_sequence_keeps_its_reason(
    corner: tuple[Ensemble, Any, Any],
) -> None:
    free = draw(corner[0])
    eos, width = int(free.tokens[1, 1]), free.sequences.shape[1] - 6
    widths: list[int] = []

    def two_tokens(input_ids: torch.Tensor, scores: Any) -> bool:
        widths.append(input_ids.shape[1])
        return input_ids.shape[1] == width

    out = draw(corner[0], stopping_criteria=[two_tokens], eos_token_id=eos)
    assert out.tokens.shape[1] == 2 and widths == [width - 1, width]  # and no step more
    assert [r == "eos" for r in out.finish_reasons] == out.tokens.eq(eos).any(1).tolist()
    assert set(out.finish_reasons) == {"eos", "stopping_criteria"}


def test_confidence_criteria_need_scores(corner: tuple[Ensemble, Any, Any]) -> None:
    def ask(confidence: float, **options: Any) -> Any:
        criteria = [ConfidenceCriteria(confidence)]
        options = {"max_new_tokens": 4, "seed": 0, "eos_token_id": [], **options}
        models = Ensemble([tiny.llama(0), tiny.gpt2(1)])
        ids = torch.tensor([[3, 4]])
        return generate(models, input_ids=ids, weights=[1.0], stopping_criteria=criteria, **options)

    with pytest.raises(ValueError, match="ConfidenceCriteria reads scores"):
        ask(0.5)
    whole = ask(0.0, output_scores=True)
    assert whole.finish_reasons == ["length"]
    assert ask(1.0, output_scores=True).tokens.shape == (1, 1)


def test_no_step_begins_after_the_time(
    corner: tuple[Ensemble, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [5.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def tick(input_ids: torch.Tensor, scores: Any) -> bool:
        clock[0] += 1.0
        return False

    for beams in (1, 3):
        out = draw(corner[0], max_time=2, stopping_criteria=tick, num_beams=beams)
        assert out.lengths.tolist() == [3, 3, 3] and set(out.finish_reasons) == {"max_time"}
    assert draw(corner[0], max_time=0.0).finish_reasons == ["length"] * 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stopping_criteria": [3]}, TypeError, "functions .* got int"),
        ({"max_time": -1.0}, ValueError, "0 or more seconds, got -1.0"),
        ({"max_time": float("nan")}, ValueError, "0 or more seconds, got nan"),
        ({"max_time": "1"}, TypeError, "max_time must be a number"),
        ({"max_time": 1.0, "num_candidates": 2, "do_sample": True}, ValueError, "max_time"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_runs(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def step(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a model ran")

    with pytest.raises(error, match=message):
        generate(Ensemble([step, step]), input_ids=torch.tensor([[1]]), weights=[1.0], **options)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.tensor([True]), ValueError, r"\[B\] = \[3\].* got \[1\]"),
        (torch.tensor([0, 1, 0]), TypeError, "must be bool, got torch.int64"),
        (None, TypeError, "judge in stopping_criteria must return a bool tensor"),
    ],
)
def test_what_a_criterion_returns_is_checked(
    corner: tuple[Ensemble, Any, Any], result: Any, error: type[Exception], message: str
) -> None:
    def judge(input_ids: torch.Tensor, scores: Any) -> Any:
        return result

    with pytest.raises(error, match=message):
        draw(corner[0], stopping_criteria=judge)
