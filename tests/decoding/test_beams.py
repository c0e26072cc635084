"""Beam search: transformers' own at a corner, exhaustive elsewhere, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from tiny_models import by_hand

from mod_fused import Ensemble, generate
from mod_fused.guidance import Guidance

PROMPTS = tiny.PROMPTS
PAD = tiny.VOCAB["a"]
MIX: dict[str, Any] = {"weights": [0.6, 0.7], "max_new_tokens": 5}


@pytest.fixture(scope="module")
def corner() -> tuple[Ensemble, Any, Any]:
    """A reference and a policy, the policy, and the prompts as it reads them."""
    tokenizer = tiny.tokenizer(pad_token="a", padding_side="left")
    policy = tiny.gpt2(1)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return Ensemble([tiny.llama(0), policy], tokenizer), policy, batch


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny.three_models()


def compared(corner: Any, theirs: dict[str, Any], **options: Any) -> Any:
    """The search at a corner, once it has been found equal to the policy's own `generate`."""
    models, policy, batch = corner
    expected = policy.generate(
        **batch,
        **options,
        **theirs,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
    )
    out = generate(models, PROMPTS, weights=[1.0], pad_token_id=PAD, **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(
        out.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5
    )
    return out


ENDS = [[1], [6, 16], [1, 5, 7, 9, 11]]


@pytest.mark.parametrize("ends", ENDS, ids=len)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_at_a_corner_it_is_the_policys_own_beam_search(
    corner: Any, early_stopping: Any, ends: list[int]
) -> None:
    for beams, returned, penalty in [(2, 1, 1.0), (3, 3, -1.0), (4, 2, 0.0), (5, 5, 2.0)]:
        out = compared(
            corner,
            {},
            num_beams=beams,
            num_return_sequences=returned,
            length_penalty=penalty,
            early_stopping=early_stopping,
            max_new_tokens=9,
            eos_token_id=ends,
        )
        assert out.valid.all() and out.seeds is None
        total = out.logprobs.sum(1) / out.lengths.float() ** penalty
        torch.testing.assert_close(out.sequences_scores, total, atol=1e-5, rtol=1e-5)
        if len(ends) == 5 and penalty < 1.0:
            assert "eos" in out.finish_reasons


def test_what_stops_early_and_the_penalty_change_the_result(corner: Any) -> None:
    models, _, _ = corner
    found = {
        (stop, penalty): generate(
            models,
            PROMPTS,
            weights=[1.0],
            num_beams=3,
            num_return_sequences=3,
            length_penalty=penalty,
            early_stopping=stop,
            max_new_tokens=12,
            eos_token_id=ENDS[1],
        ).tokens.tolist()
        for stop in (False, True, "never")
        for penalty in (-1.0, 3.0)
    }
    assert found[True, 3.0] != found[False, 3.0] != found["never", 3.0]
    assert found["never", -1.0] != found["never", 3.0]


def test_the_search_ends_when_nothing_can_change() -> None:
    table, calls = tiny.bigram(0, 6), 0

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return table(tokens)

    steps = {}
    for stop in (True, "never"):
        calls = 0
        generate(
            Ensemble([counted, table]),
            input_ids=torch.tensor([[1], [2]]),
            weights=[0.5],
            num_beams=2,
            use_cache=False,
            eos_token_id=[0, 1, 2],
            early_stopping=stop,
            length_penalty=1.5,
            max_new_tokens=30,
        )
        steps[stop] = calls
    assert steps[True] < steps["never"] <= 30


def test_one_beam_is_the_greedy_search(corner: Any) -> None:
    models, _, _ = corner
    options: dict[str, Any] = {"weights": [1.0], "do_sample": False, "max_new_tokens": 8}
    one, greedy = (generate(models, PROMPTS, **options, **x) for x in ({"num_beams": 1}, {}))
    assert torch.equal(one.tokens, greedy.tokens) and one.sequences_scores is None


def test_excluded_tokens_are_those_of_transformers(corner: Any) -> None:
    excluded = [6, 16, 13]
    allowed = torch.ones(len(PROMPTS) * 3, tiny.V, dtype=torch.bool)
    allowed[:, excluded] = False
    bits = (allowed.long() << torch.arange(tiny.V)).sum(1)
    packed = torch.stack([bits - ((bits >> 31) << 32)], 1).to(torch.int32)
    models, policy, batch = corner
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "pad_token_id": PAD}
    expected = policy.generate(**batch, suppress_tokens=excluded, do_sample=False, **options)
    free = generate(models, PROMPTS, weights=[1.0], **options)
    assert not torch.equal(free.sequences, expected)
    for mask in (allowed, packed):
        out = generate(
            models, PROMPTS, weights=[1.0], mask_fn=lambda step, ids, m=mask: m, **options
        )
        assert torch.equal(out.sequences, expected)


def test_a_stop_string_ends_hypotheses_as_an_end_token_does(corner: Any) -> None:
    models, _, _ = corner
    word = "under"
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}
    ended = compared(corner, {}, eos_token_id=[tiny.VOCAB[word]], length_penalty=0.0, **options)
    stopped = generate(
        models,
        PROMPTS,
        weights=[1.0],
        pad_token_id=PAD,
        eos_token_id=[],
        stop_strings=word,
        length_penalty=0.0,
        **options,
    )
    assert torch.equal(stopped.sequences, ended.sequences)
    assert torch.equal(stopped.sequences_scores, ended.sequences_scores)
    assert "eos" in ended.finish_reasons
    reasons = [reason.replace("eos", "stop") for reason in ended.finish_reasons]
    assert stopped.finish_reasons == reasons


def test_each_beam_remembers_its_own_part_of_a_stop_string(ensemble: Ensemble) -> None:
    stops = ["the the", "under under", "old over"]
    out = generate(
        ensemble,
        PROMPTS,
        weights=[1.0, 0.0],
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=8,
        stop_strings=stops,
        length_penalty=0.0,
    )
    assert "stop" in out.finish_reasons and "length" in out.finish_reasons
    for text, reason in zip(out.texts, out.finish_reasons, strict=True):
        earlier = text.rsplit(" ", 1)[0]
        assert any(stop in text for stop in stops) == (reason == "stop")
        assert not any(stop in earlier for stop in stops)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey"])
@pytest.mark.parametrize("history", [False, True])
def test_enough_beams_find_the_likeliest_of_all_responses(divergence: str, history: bool) -> None:
    vocab, length = 4, 3
    models = [tiny.llama(3, vocab, None), tiny.gpt2(4, vocab, None), tiny.llama(5, vocab, None)]
    options: dict[str, Any] = {"weights": [0.6, 0.3], "divergence": divergence}
    beams = vocab ** (length - 1)
    out = generate(
        Ensemble(models),
        input_ids=torch.tensor([[1, 2]]),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=length,
        sequence_history=history,
        return_model_logprobs=True,
        length_penalty=0.0,
        **options,
    )
    enumerated = {
        response: by_hand(models, [[1, 2]] * 3, list(response), history, **options)
        for response in itertools.product(range(vocab), repeat=length)
    }
    best = sorted(enumerated, key=lambda response: -enumerated[response][0].sum())[:beams]
    assert [tuple(row) for row in out.tokens.tolist()] == best
    for row, response in enumerate(best):
        drawn, each = enumerated[response]
        np.testing.assert_allclose(out.logprobs[row], drawn, atol=1e-4)
        np.testing.assert_allclose(out.model_logprobs[row], each, atol=1e-4)
        np.testing.assert_allclose(out.sequences_scores[row], drawn.sum(), atol=2e-4)


@pytest.mark.parametrize("history", [False, True])
def test_a_batch_equals_one_by_one_and_caches_follow_the_beams(
    ensemble: Ensemble, history: bool
) -> None:
    options: dict[str, Any] = {
        "divergence": "jsd",
        "sequence_history": history,
        "num_beams": 4,
        "num_return_sequences": 2,
        "max_new_tokens": 7,
    }
    weights = [[0.6, 0.3], [1.0, 0.0], [0.2, 0.7]]
    together = generate(ensemble, PROMPTS, weights=weights, **options)
    recomputed = generate(ensemble, PROMPTS, weights=weights, use_cache=False, **options)
    assert torch.equal(together.tokens, recomputed.tokens)
    for row in range(3):
        alone = generate(ensemble, PROMPTS[row], weights=weights[row], **options)
        both = slice(2 * row, 2 * row + 2)
        assert torch.equal(alone.tokens, together.tokens[both])
        assert alone.texts == together.texts[both]
        torch.testing.assert_close(
            alone.sequences_scores, together.sequences_scores[both], atol=1e-4, rtol=0
        )


def test_a_scorer_with_a_cache_guides_the_beams_as_a_function_does() -> None:
    models = Ensemble([tiny.llama(0, eos=None)], tiny.tokenizer(eos_token=None))
    scorer = tiny.gpt2(3, eos=None)

    def values(step: int, sequences: torch.Tensor) -> torch.Tensor:
        return scorer(input_ids=sequences, use_cache=False).logits[None, :, -1]

    options: dict[str, Any] = {"weights": [], "value_weights": [1.5], "num_beams": 3}
    ids = torch.tensor([[3, 4, 9], [7, 2, 5]])
    guided = generate(models, input_ids=ids, value_fn=Guidance([scorer]), **options)
    by_function = generate(models, input_ids=ids, value_fn=values, **options)
    assert torch.equal(guided.tokens, by_function.tokens)
    plain = generate(models, input_ids=ids, weights=[], value_fn=Guidance([scorer]), num_beams=3)
    assert not torch.equal(guided.tokens, plain.tokens)


def test_ties_go_to_the_earlier_beam_and_the_lower_id() -> None:
    even = Ensemble([lambda tokens: torch.zeros(len(tokens), 7)] * 2)
    out = generate(
        even,
        input_ids=torch.tensor([[1]]),
        weights=[1.0],
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=3,
        use_cache=False,
    )
    assert out.tokens.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


def test_a_beam_without_a_next_token_is_dropped_and_disturbs_no_other() -> None:
    table = tiny.bigram(0, 6)

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        logits = table(tokens).clone()
        logits[tokens[:, -1] == best] = torch.nan
        return logits

    ids = torch.tensor([[1], [2]])
    best = int(table(ids)[0].argmax())
    options: dict[str, Any] = {
        **{"weights": [1.0], "use_cache": False, "num_beams": 2, "max_new_tokens": 3},
        **{"input_ids": ids, "length_penalty": 0.0},
    }
    out = generate(Ensemble([broken] * 2), **options)
    enumerated = {}
    for response in itertools.product(range(6), repeat=3):
        if best not in response[:2]:
            path = torch.tensor([[1], *([x] for x in response[:2])])
            logs = table(path).log_softmax(1)
            enumerated[response] = float(sum(logs[i, x] for i, x in enumerate(response)))
    assert out.valid.all() and best not in out.tokens[0, :2].tolist()
    assert tuple(out.tokens[0].tolist()) in enumerated

    def nothing(step: int, sequences: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[:2] = step < 1  # the first prompt comes to a dead end
        return mask

    whole = Ensemble([table] * 2)
    dead = generate(whole, mask_fn=nothing, **options)
    free = generate(whole, **options)
    assert dead.valid.tolist() == [False, True] and dead.finish_reasons[0] == "invalid"
    assert dead.lengths[0] == 0 and dead.sequences_scores[0] == -torch.inf
    assert torch.equal(dead.tokens[1], free.tokens[1])


def test_places_for_which_there_is_no_response_are_invalid() -> None:
    out = generate(
        Ensemble([tiny.bigram(0, 3)] * 2),
        input_ids=torch.tensor([[1]]),
        weights=[1.0],
        num_beams=5,
        num_return_sequences=5,
        max_new_tokens=1,
        use_cache=False,
    )
    assert out.valid.tolist() == [True] * 3 + [False] * 2
    assert sorted(out.tokens[:3, 0].tolist()) == [0, 1, 2]
    assert out.sequences_scores[3:].tolist() == [-torch.inf] * 2 and out.logprobs[3:].isnan().all()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"do_sample": True}, ValueError, "do_sample"),
        ({"temperature": 0.5}, ValueError, "temperature"),
        ({"temperature": [1.0]}, ValueError, "temperature"),
        ({"top_k": 5}, ValueError, "top_k"),
        ({"top_p": torch.tensor([0.5])}, ValueError, "top_p"),
        ({"min_p": 0.1}, ValueError, "min_p"),
        ({"seed": 0}, ValueError, "seed"),
        ({"position": 3}, ValueError, "position"),
        ({"streamer": lambda step, tokens: None}, ValueError, "streamer"),
        ({"resample_fn": lambda *args: None}, ValueError, "resample_fn"),
        ({"num_return_sequences": 4}, ValueError, "at most num_beams = 3, got 4"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences"),
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an int"),
        ({"early_stopping": "always"}, ValueError, "False, True or 'never'"),
        ({"early_stopping": 1}, ValueError, "False, True or 'never'"),
        ({"length_penalty": float("nan")}, ValueError, "length_penalty"),
        ({"length_penalty": 1e3}, ValueError, "length_penalty"),
        ({"length_penalty": "long"}, TypeError, "length_penalty"),
        ({"num_beams": 1, "length_penalty": 2.0}, ValueError, "num_beams > 1"),
        ({"num_beams": 1, "early_stopping": True}, ValueError, "num_beams > 1"),
        ({"use_cache": True}, TypeError, "keeps its own state"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_runs(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    def never(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a model ran")

    given: dict[str, Any] = {"weights": [1.0], "num_beams": 3, "use_cache": False, **options}
    with pytest.raises(error, match=said):
        generate(Ensemble([never] * 2), input_ids=torch.tensor([[1]]), **given)


def test_a_search_draws_no_random_numbers(ensemble: Ensemble) -> None:
    before = torch.random.get_rng_state()
    out = generate(ensemble, PROMPTS, num_beams=2, **MIX)
    assert torch.equal(before, torch.random.get_rng_state())
    off = {"do_sample": False, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}
    again = generate(ensemble, PROMPTS, num_beams=2, **off, **MIX)
    assert torch.equal(out.tokens, again.tokens)
