"""logit_bias, bad_words_ids and repetition_penalty of `generate`: against transformers' processors
on log pi*, against the float64 oracle step by step, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process

from mod_fused import Ensemble, generate, reference

IDS = torch.tensor([[3, 4, 5, 9], [7, 8, 9, 3]])
BAD = [[6], [9, 10], [4, 5, 12], [3, 3], [1, 2, 3, 4, 5, 6, 7]]
LISTED = {7: 1.5, 11: -2.0, 20: 0.75}


@pytest.fixture(scope="module")
def models() -> list[Any]:
    kinds = (tiny.gpt2(1, eos=None), tiny.llama(0, eos=None), tiny.llama(2, eos=None))
    return [tiny.vivid(model, seed) for seed, model in enumerate(kinds)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 3.0},
        {"repetition_penalty": 0.7},
        {"bad_words_ids": BAD},
        {"logit_bias": LISTED},
        {"repetition_penalty": 1.4, "bad_words_ids": BAD, "logit_bias": LISTED},
    ],
    ids=str,
)
def test_at_a_corner_it_is_the_policy_with_transformers_processors_on_log_probabilities(
    models: list[Any], beams: int, options: dict[str, Any]
) -> None:
    processors: list[Any] = [logits_process.LogitNormalization()]
    if "repetition_penalty" in options:
        penalty = options["repetition_penalty"]
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    if "bad_words_ids" in options:
        processors.append(logits_process.NoBadWordsLogitsProcessor(options["bad_words_ids"]))
    if "logit_bias" in options:
        sequences = {(token,): x for token, x in options["logit_bias"].items()}
        processors.append(logits_process.SequenceBiasLogitsProcessor(sequences))
    both: dict[str, Any] = {"num_beams": beams, "do_sample": False, "max_new_tokens": 12}
    policy = models[1]
    expected = policy.generate(
        input_ids=IDS,
        logits_processor=LogitsProcessorList(processors),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **both,
    )
    out = generate(Ensemble(models[:2]), input_ids=IDS, weights=[1.0], **options, **both)
    assert torch.equal(out.sequences, expected.sequences)
    free = generate(Ensemble(models[:2]), input_ids=IDS, weights=[1.0], **both)
    assert not torch.equal(out.tokens, free.tokens)
    for row in range(2):  # what is returned stays log pi*
        log_p = tiny.teacher_forced(policy, IDS[row].tolist(), out.tokens[row].tolist())
        own = log_p.log_softmax(-1).gather(1, out.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(out.logprobs[row], own, atol=1e-4, rtol=0)
    if beams > 1:
        torch.testing.assert_close(
            out.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4
        )


def expected_bias(log_p: np.ndarray, text: list[int], options: dict[str, Any]) -> np.ndarray:
    """The bias [V] of a step by its definition, token by token."""
    bias = np.zeros(len(log_p))
    for token in set(text):
        if log_p[token] > -np.inf:
            bias[token] = (options.get("repetition_penalty", 1.0) - 1.0) * log_p[token]
    for token, x in options.get("logit_bias", {}).items():
        bias[token] += x
    for *before, last in options.get("bad_words_ids", []):
        if before == text[len(text) - len(before) :]:
            bias[last] = -np.inf
    return bias


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_sampled_tokens_are_the_oracle_s_race_on_log_pi_with_each_row_s_bias(
    models: list[Any], divergence: str
) -> None:
    rows: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5, "logit_bias": LISTED, "bad_words_ids": BAD},
        {"repetition_penalty": 0.8, "logit_bias": {}, "bad_words_ids": BAD},
    ]
    mixture: dict[str, Any] = {"weights": [0.6, 0.3], "divergence": divergence}
    out = generate(
        Ensemble(models), input_ids=IDS, **mixture, plausibility=None, temperature=0.8, top_p=0.95,
        bad_words_ids=BAD, logit_bias=[row["logit_bias"] for row in rows],
        repetition_penalty=[row["repetition_penalty"] for row in rows], num_return_sequences=2,
        seed=[5, 6], max_new_tokens=12, output_scores=True,
    )  # fmt: skip
    for row, seed in enumerate(out.seeds.tolist()):
        prompt, response = IDS[row // 2].tolist(), out.tokens[row].tolist()
        logits = [tiny.teacher_forced(model, prompt, response).double() for model in models]
        for step, token in enumerate(response):
            log_p = reference.log_probs_row(
                logits[0][step], [x[step] for x in logits[1:]], **mixture
            )
            bias = expected_bias(log_p, prompt + response[:step], rows[row // 2])
            final = reference.filtered_log_probs(log_p, bias=bias, temperature=0.8, top_p=0.95)
            assert token == reference.race(np.exp(final), seed, step)
            assert abs(out.logprobs[row, step] - log_p[token]) <= 1e-4
            shown = out.scores[step][row].double().numpy()
            assert ((shown > -np.inf) == (final > -np.inf)).all()
            assert np.abs(np.exp(shown) - np.exp(final)).max() <= 1e-4


def test_padding_is_no_token_and_a_row_is_the_same_alone(models: list[Any]) -> None:
    pad, prompts = 9, [[3, 4, 5, 7, 8], [4, 5]]
    ids = torch.tensor([prompts[0], [pad] * 3 + prompts[1]])
    mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
    # The third forbids a token after padding alone.
    options: dict[str, Any] = {"repetition_penalty": 1.8, "max_new_tokens": 8, "top_k": 5}
    for token in range(tiny.V):
        options["bad_words_ids"] = [[5, 6], [pad, 4, 5, token]]
        batch = generate(
            Ensemble(models), input_ids=ids, attention_mask=mask, weights=[0.6, 0.3],
            seed=[3, 4], pad_token_id=pad, **options,
        )  # fmt: skip
        for row in range(2):
            alone = generate(
                Ensemble(models), input_ids=torch.tensor([prompts[row]]), weights=[0.6, 0.3],
                seed=[3 + row], pad_token_id=pad, **options,
            )  # fmt: skip
            assert torch.equal(alone.tokens[0], batch.tokens[row])


def test_rows_that_resample_fn_chooses_take_their_prompts_and_padding_along(
    models: list[Any],
) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options: dict[str, Any] = {"weights": [0.6, 0.3], "repetition_penalty": 0.2}
    options |= {"do_sample": False, "max_new_tokens": 5}
    for pad in range(tiny.V):  # taken for a token of the prompt it would come again
        ids = torch.tensor([[3, 4, 5, 7], [pad, pad, 4, 5]])
        both = generate(
            Ensemble(models), input_ids=ids, attention_mask=mask, **options, pad_token_id=pad,
            resample_fn=lambda step, *_: torch.tensor([1, 1]) if step == 1 else None,
        )  # fmt: skip
        alone = generate(Ensemble(models), input_ids=ids[1:, 2:], **options)
        assert torch.equal(both.tokens, alone.tokens.expand(2, -1))


def test_a_bias_lifts_and_lowers_what_the_automatic_cut_would_decide(models: list[Any]) -> None:
    # Off reverse KL only tokens within 1e-3 of the reference's peak are left, here one.
    def table(favourite: int) -> Any:
        row = torch.zeros(tiny.V)
        row[favourite] = 30.0
        return lambda tokens: row.expand(len(tokens), -1)

    ensemble = Ensemble([table(5), table(5)])
    options: dict[str, Any] = {
        "input_ids": IDS, "weights": [0.5], "divergence": "jsd", "seed": 1, "max_new_tokens": 6,
    }  # fmt: skip
    assert (generate(ensemble, **options).tokens == 5).all()
    out = generate(ensemble, **options, logit_bias=[{5: -100.0}, {}])
    assert (out.tokens[0] != 5).all() and (out.tokens[1] == 5).all() and out.valid.all()
    out = generate(ensemble, **options, logit_bias={8: 100.0})
    assert (out.tokens == 8).all()
    out = generate(ensemble, **options, bad_words_ids=[[5], [6]])
    assert out.valid.all() and not torch.isin(out.tokens, torch.tensor([5, 6])).any()


def test_candidates_that_hold_no_bad_word_weigh_as_under_a_mask(models: list[Any]) -> None:
    options: dict[str, Any] = {
        "input_ids": IDS, "weights": [0.6, 0.3], "num_candidates": 5, "seed": 2,
        "max_new_tokens": 5,
    }  # fmt: skip
    allowed = torch.ones(10, tiny.V, dtype=torch.bool)
    allowed[:, [4, 6]] = False
    masked = generate(Ensemble(models), **options, mask_fn=lambda step, sequences: allowed)
    banned = generate(Ensemble(models), **options, bad_words_ids=[[4], [6]])
    assert torch.equal(banned.tokens, masked.tokens)
    assert torch.equal(banned.weights, masked.weights)


def test_a_lone_end_of_sequence_is_no_bad_word_as_in_transformers(models: list[Any]) -> None:
    options: dict[str, Any] = {"weights": [0.5, 0.5], "eos_token_id": [3, 4, 5], "seed": 1}
    plain = generate(Ensemble(models), input_ids=IDS, **options)
    same = generate(Ensemble(models), input_ids=IDS, **options, bad_words_ids=[[3], [4], [5]])
    assert torch.equal(plain.sequences, same.sequences) and "eos" in plain.finish_reasons


def test_a_generation_config_may_ask_for_them(models: list[Any]) -> None:
    config = GenerationConfig(
        repetition_penalty=1.7, bad_words_ids=[[6], [9, 10]], max_new_tokens=9
    )
    args: dict[str, Any] = {"input_ids": IDS, "weights": [0.5, 0.5], "max_new_tokens": 9}
    got = generate(Ensemble(models), **args, generation_config=config)
    asked: dict[str, Any] = {"repetition_penalty": 1.7, "bad_words_ids": [[6], [9, 10]]}
    assert torch.equal(
        got.tokens, generate(Ensemble(models), **args, **asked, do_sample=False).tokens
    )
    mine = {**asked, "bad_words_ids": [[4]]}
    got = generate(
        Ensemble(models), **args, generation_config=config, bad_words_ids=mine["bad_words_ids"]
    )
    assert torch.equal(
        got.tokens, generate(Ensemble(models), **args, **mine, do_sample=False).tokens
    )


REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "logit_bias must be a dict", {"logit_bias": [1.0, 2.0]}),
    (TypeError, "logit_bias must be a dict", {"logit_bias": 5}),
    (ValueError, "one dict or B = 2", {"logit_bias": [{3: 1.0}]}),
    (TypeError, "token id of logit_bias must be an int, got str", {"logit_bias": {"3": 1.0}}),
    (ValueError, "token id of logit_bias", {"logit_bias": {-1: 1.0}}),
    (ValueError, "token id of logit_bias must be below", {"logit_bias": {tiny.V: 1.0}}),
    (ValueError, "finite in float32, got inf for token 3", {"logit_bias": {3: float("inf")}}),
    (ValueError, "bad_words_ids and mask_fn exclude", {"logit_bias": {3: -float("inf")}}),
    (ValueError, "finite in float32, got nan", {"logit_bias": {3: float("nan")}}),
    (TypeError, "logit_bias must be a number", {"logit_bias": {3: "1"}}),
    (TypeError, "bad_words_ids must be a list of lists", {"bad_words_ids": [3]}),
    (ValueError, "empty list", {"bad_words_ids": [[3], []]}),
    (TypeError, "token id of bad_words_ids", {"bad_words_ids": [["a"]]}),
    (ValueError, "bad_words_ids must be below", {"bad_words_ids": [[3, tiny.V]]}),
    (ValueError, "positive and finite, got 0.0", {"repetition_penalty": 0.0}),
    (ValueError, "positive and finite", {"repetition_penalty": torch.tensor([1.0, -1.0])}),
    (ValueError, "positive and finite", {"repetition_penalty": [1.0, float("inf")]}),
    (ValueError, "B = 2", {"repetition_penalty": [1.0, 1.0, 1.0]}),
    (TypeError, "repetition_penalty must be a number", {"repetition_penalty": "1.2"}),
    (ValueError, "with logit_bias", {"logit_bias": {3: 1.0}, "num_candidates": 3}),
    (ValueError, "with repetition_penalty", {"repetition_penalty": 1.2, "num_candidates": 3}),
]


@pytest.mark.parametrize(("error", "message", "given"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused_before_a_model_runs(
    models: list[Any], error: type[Exception], message: str, given: dict[str, Any]
) -> None:
    calls = []
    for model in models:
        model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=message):
        generate(Ensemble(models), input_ids=IDS, weights=[0.5, 0.5], **given)
    assert not calls


def test_ids_beyond_the_width_of_a_callable_s_logits_are_refused() -> None:
    ensemble = Ensemble([tiny.bigram(0, 12), tiny.bigram(1, 12)])
    for given in (
        {"logit_bias": {12: 1.0}},
        {"bad_words_ids": [[12]]},
        {"bad_words_ids": [[1, 40]]},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must be below"):
            generate(ensemble, input_ids=IDS, weights=[0.5], **given)
