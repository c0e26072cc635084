"""Several responses to a prompt, and rows that a function chooses to go on with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from cases import normal
from tiny_models import seeds_of

from mod_fused import Ensemble, generate, reference
from mod_fused.decoding.responses import FINISH_REASONS

PROMPTS = tiny.PROMPTS


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny.three_models()


@pytest.mark.parametrize("form", [list, np.array, torch.tensor], ids=["list", "numpy", "tensor"])
def test_responses_are_those_of_separate_calls_with_the_documented_seeds(
    ensemble: Ensemble, form: Any
) -> None:
    weights = [[0.6, 0.7], [1.0, 0.0], [0.2, 0.3]]
    temperature, top_k, seeds = [1.5, 0.7, 1.0], [0, 9, 5], [5, 6, 7]
    options: dict[str, Any] = {
        "divergence": "jsd",
        "sequence_history": True,
        "max_new_tokens": 5,
        "return_model_logprobs": True,
    }
    out = generate(
        ensemble,
        PROMPTS,
        weights=form(weights),
        temperature=torch.tensor(temperature) if form is torch.tensor else temperature,
        top_k=torch.tensor(top_k) if form is torch.tensor else top_k,
        seed=torch.tensor(seeds) if form is torch.tensor else seeds,
        num_return_sequences=3,
        **options,
    )
    assert out.tokens.shape == (9, 5) and len(out.texts) == 9
    for row, prompt in enumerate(PROMPTS):
        for response, seed in enumerate(seeds_of(seeds[row], 3)):
            alone = generate(
                ensemble,
                prompt,
                weights=weights[row],
                temperature=temperature[row],
                top_k=top_k[row],
                seed=[seed],
                **options,
            )
            assert torch.equal(alone.tokens[0], out.tokens[3 * row + response])
            assert alone.texts[0] == out.texts[3 * row + response]
            torch.testing.assert_close(
                alone.model_logprobs[0], out.model_logprobs[3 * row + response], atol=1e-4, rtol=0
            )
    assert len({tuple(row) for row in out.tokens.tolist()}) > 6


@pytest.mark.parametrize("seed", [4, 2**64 - 3, None])
def test_one_seed_or_none_serves_every_prompt(seed: int | None) -> None:
    models = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    options: dict[str, Any] = {"input_ids": torch.full((2, 1), 4), "weights": [0.5]}
    torch.manual_seed(3)
    one = generate(models, seed=seed, **options)
    torch.manual_seed(3)
    out = generate(models, seed=seed, num_return_sequences=4, use_cache=False, **options)
    assert torch.equal(out.tokens[::4], one.tokens)
    assert len({tuple(row) for row in out.tokens.tolist()}) == 8
    if seed is not None:
        rows = reference.row_seeds(seed, 2)
        every = [s for row in rows for s in seeds_of(row, 4)]
        options["input_ids"] = torch.full((8, 1), 4)
        assert torch.equal(generate(models, seed=every, **options).tokens, out.tokens)


def test_functions_see_every_response_and_values_their_prompts_weights() -> None:
    seen: list[tuple[int, ...]] = []
    table = normal(0, 6)

    def values(step: int, sequences: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(sequences.shape))
        return table.expand(1, len(sequences), 6).contiguous()

    def mask(step: int, sequences: torch.Tensor) -> torch.Tensor:
        return torch.arange(6) != torch.arange(len(sequences))[:, None]

    out = generate(
        Ensemble([lambda tokens: torch.zeros(len(tokens), 6)]),
        input_ids=torch.zeros(2, 1, dtype=torch.int64),
        weights=[],
        value_fn=values,
        value_weights=[[2.0], [-3.0]],
        mask_fn=mask,
        num_return_sequences=3,
        use_cache=False,
        max_new_tokens=12,
        seed=0,
    )
    assert seen == [(6, 1 + step) for step in range(12)]
    for row in range(6):
        assert row not in out.tokens[row]
        expected = (table * (2.0 if row < 3 else -3.0)).log_softmax(-1)[out.tokens[row]]
        torch.testing.assert_close(out.logprobs[row], expected)


def test_chosen_rows_bring_everything_with_them(ensemble: Ensemble) -> None:
    # After the second token the rows change places; then each goes on as the row it was, with the
    # noise of its new place. Forced tokens tell the rows apart.
    order = torch.tensor([2, 0, 0, 1])
    prompts = [*PROMPTS, PROMPTS[1]]
    calls: list[Any] = []

    def swap(
        step: int, sequences: torch.Tensor, lengths: torch.Tensor, reasons: torch.Tensor
    ) -> torch.Tensor | None:
        calls.append((step, sequences.clone(), lengths.tolist(), reasons.tolist()))
        return order if step == 1 else None

    def forced(step: int, sequences: torch.Tensor) -> torch.Tensor:
        if step < 2:
            return torch.arange(tiny.V) == 3 + torch.arange(4)[:, None] + step
        return torch.ones(4, tiny.V, dtype=torch.bool)

    options: dict[str, Any] = {
        "weights": [0.6, 0.7],
        "divergence": "jsd",
        "sequence_history": True,
        "max_new_tokens": 6,
        "eos_token_id": 6,
        "pad_token_id": 0,
        "return_model_logprobs": True,
    }
    seeds = [1, 2, 3, 4]
    out = generate(ensemble, prompts, resample_fn=swap, mask_fn=forced, seed=seeds, **options)
    assert [c[0] for c in calls] == list(range(len(calls)))
    assert calls[0][2] == [1, 1, 1, 1] and calls[0][3] == [0, 0, 0, FINISH_REASONS.index("eos")]
    assert calls[1][2] == [2, 2, 2, 1] and calls[1][3] == [0, 0, 1, 1]
    assert calls[1][1].shape[1] == calls[0][1].shape[1] + 1
    # The first row is now one that has ended, the others what rows 0, 0 and 1 would have become.
    assert out.lengths[0] == 2 and out.finish_reasons[0] == "eos"
    assert out.tokens[0, :2].tolist() == [5, 6] and out.tokens[0, 2:].eq(0).all()
    for place, origin in enumerate(order.tolist()):
        if place == 0:
            continue
        alone = generate(
            ensemble,
            [prompts[origin]],
            seed=[seeds[place]],
            mask_fn=lambda step, ids, origin=origin: forced(step, ids)[origin : origin + 1],
            **options,
        )
        width, length = len(prompts[origin].split()), int(alone.lengths[0])
        assert out.lengths[place] == length > 2
        assert out.tokens[place, :length].tolist() == alone.tokens[0].tolist()
        assert out.sequences[place, 9 - width : 9].tolist() == alone.sequences[0, :width].tolist()
        torch.testing.assert_close(
            out.logprobs[place, :length], alone.logprobs[0], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            out.model_logprobs[place, :length], alone.model_logprobs[0], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([0]), ValueError, r"rows of resample_fn must have shape \[B\] = \[2\]"),
        (torch.tensor([0.0, 1.0]), TypeError, "rows of resample_fn must be int64"),
        ([0, 1], TypeError, "rows of resample_fn must be a tensor, got list"),
    ],
)
def test_chosen_rows_of_another_kind_are_refused(
    rows: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(
            Ensemble([tiny.bigram(0)] * 2),
            input_ids=torch.ones(2, 1).long(),
            weights=[1.0],
            resample_fn=lambda *_: rows,
            use_cache=False,
        )


def test_bad_arguments_are_refused_before_any_model_runs() -> None:
    ran: list[Any] = []
    models = Ensemble([lambda tokens: ran.append(tokens)] * 2)
    options: dict[str, Any] = {"input_ids": torch.ones(2, 1).long(), "weights": [0.5]}
    with pytest.raises(ValueError, match="num_return_sequences must be at least 1, got 0"):
        generate(models, num_return_sequences=0, **options)
    with pytest.raises(TypeError, match="num_return_sequences must be an int, got float"):
        generate(models, num_return_sequences=2.0, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the reference is a callable that keeps its own state"):
        generate(models, num_return_sequences=2, **options)
    with pytest.raises(TypeError, match="use_cache=False"):
        generate(models, resample_fn=lambda *_: None, **options)
    assert not ran
