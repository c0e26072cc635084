"""`loglikelihood`: log pi* of given responses, against full passes by hand and `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from small_models import small_model

import mod_fused
from mod_fused import Ensemble, generate, loglikelihood
from mod_fused.guidance import Guidance, robust

PROMPTS = tiny.PROMPTS
RESPONSES = [[3, 4, 5, 6, 7], [8], [9, 3, 9]]
LENGTHS = [5, 1, 3]
TOKENS = {"responses": torch.full((3, 2), 4)}


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny.three_models()


def bigrams() -> Ensemble:
    return Ensemble([tiny.bigram(0), tiny.bigram(1), tiny.bigram(2)])


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey"])
def test_padded_prompts_and_responses_of_any_length_are_read_as_by_hand(
    ensemble: Ensemble, divergence: str, history: bool
) -> None:
    options: dict[str, Any] = {
        "divergence": divergence,
        "weights": [0.5, 0.75],
        "plausibility": 1e-4,
    }
    found = loglikelihood(
        ensemble,
        PROMPTS,
        RESPONSES,
        sequence_history=history,
        return_model_logprobs=True,
        **options,
    )
    assert found.lengths.tolist() == LENGTHS
    for b, response in enumerate(RESPONSES):
        prompts = [tiny.ids_of(PROMPTS[b])] * 3
        own, each = tiny.by_hand(ensemble.models, prompts, response, history, **options)
        n = len(response)
        torch.testing.assert_close(
            found.logprobs[b, :n].double(), torch.from_numpy(own), atol=2e-4, rtol=0
        )
        torch.testing.assert_close(
            found.model_logprobs[b, :n].double(), torch.from_numpy(each), atol=1e-4, rtol=0
        )
        assert (found.logprobs[b, n:] == 0).all() and (found.model_logprobs[b, n:] == 0).all()
        assert abs(float(found.totals[b]) - own.sum()) < 1e-3 or own.sum() == found.totals[b]


@pytest.mark.parametrize("normalizer", ["exact", "zero"])
def test_responses_of_generate_have_the_log_probabilities_that_it_returned(
    ensemble: Ensemble, normalizer: str
) -> None:
    def values(step: int, sequences: torch.Tensor) -> torch.Tensor:
        return 0.1 * tiny.TASTE[: tiny.V].expand(1, len(sequences), -1) * (1 + sequences.shape[1])

    options: dict[str, Any] = {
        "weights": [[0.5, 0.4], [0.2, 0.7], [1.0, 0.0]], "divergence": "jeffrey",
        "normalizer": normalizer, "sequence_history": True, "plausibility": [1e-3, 0.0, 1e-2],
        "logit_scales": [1.0, 0.75, 1.5], "value_fn": values,
        "value_weights": [[0.5], [1.0], [0.0]],
        "return_model_logprobs": True,
    }  # fmt: skip
    out = generate(ensemble, PROMPTS, seed=5, max_new_tokens=6, **options)
    found = loglikelihood(ensemble, PROMPTS, out.tokens, lengths=out.lengths, **options)
    assert out.valid.all()
    torch.testing.assert_close(found.logprobs, out.logprobs, atol=2e-4, rtol=0)
    torch.testing.assert_close(found.model_logprobs, out.model_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("robustly", [False, True])
def test_scorers_and_weights_chosen_at_each_step_are_those_of_generate(
    ensemble: Ensemble, robustly: bool
) -> None:
    scorers = [tiny.llama(3), tiny.gpt2(4)]
    guide: dict[str, Any] = {"value_fn": Guidance(scorers), "value_weights": [0.3, -0.2]}
    if robustly:
        guide = robust(scorers, 0.5)
    out = generate(ensemble, PROMPTS, weights=[0.5, 0.5], seed=6, max_new_tokens=5, **guide)
    found = loglikelihood(
        ensemble, PROMPTS, out.tokens, lengths=out.lengths, weights=[0.5, 0.5], **guide
    )
    torch.testing.assert_close(found.logprobs, out.logprobs, atol=5e-4, rtol=0)


def test_greedy_responses_are_greedy_and_no_others(ensemble: Ensemble) -> None:
    out = generate(ensemble, PROMPTS, weights=[0.5, 0.5], do_sample=False, max_new_tokens=6)
    tokens = out.tokens.clone()
    tokens[1, 3] = (tokens[1, 3] + 1) % tiny.V
    found = loglikelihood(ensemble, PROMPTS, tokens, weights=[0.5, 0.5], lengths=[6, 6, 2])
    expected = torch.ones(3, 6, dtype=torch.bool)
    expected[1, 3:] = False
    assert torch.equal(found.greedy[0], expected[0]) and torch.equal(found.greedy[2], expected[2])
    assert found.greedy[1, :3].all() and not found.greedy[1, 3]


@pytest.mark.parametrize("use_cache", [True, False])
def test_callables_are_asked_token_by_token(use_cache: bool) -> None:
    ids = torch.tensor([[5], [9]])
    found = loglikelihood(
        bigrams(), input_ids=ids, responses=[[3, 4], [7]], weights=[0.5, 0.2], use_cache=use_cache
    )
    sequences = torch.tensor([[5, 3, 4], [9, 7, 0]])
    for step in range(2):
        now = [tiny.bigram(k)(sequences[:, : step + 1]) for k in range(3)]
        log_p = mod_fused.log_probs(now[0], now[1:], [0.5, 0.2])
        expected = log_p.gather(1, sequences[:, step + 1 : step + 2])[:, 0]
        assert torch.equal(found.logprobs[:, step], expected * (step < found.lengths))


def test_a_policy_with_prompts_of_its_own_and_no_reference() -> None:
    models, prompts = [tiny.llama(0), tiny.gpt2(1)], [["it"], ["it ran a"]]
    pair = Ensemble([None, *models], [None, tiny.tokenizer(), tiny.tokenizer()])
    found = loglikelihood(pair, prompts, [[4, 5, 6]], weights=[0.5, 0.75])
    logits = [
        tiny.teacher_forced(model, tiny.ids_of(text[0]), [4, 5, 6])
        for model, text in zip(models, prompts, strict=True)
    ]
    expected = mod_fused.log_probs(None, logits, [0.5, 0.75])[torch.arange(3), [4, 5, 6]]
    torch.testing.assert_close(found.logprobs[0], expected, atol=1e-4, rtol=0)


def test_what_pi_excludes_makes_the_total_minus_infinity(ensemble: Ensemble) -> None:
    first = tiny.teacher_forced(ensemble.models[0], tiny.ids_of(PROMPTS[0]), [3])[0, : tiny.V]
    response = [[int(first.argmin()), 3]]
    options: dict[str, Any] = {"weights": [0.5, 0.5], "divergence": "jsd"}
    free = loglikelihood(ensemble, PROMPTS[:1], response, **options)
    assert free.totals.isfinite().all()
    for history in (False, True):
        cut = loglikelihood(
            ensemble, PROMPTS[:1], response, plausibility=0.5, sequence_history=history, **options
        )
        assert cut.logprobs[0, 0] == -torch.inf and cut.totals[0] == -torch.inf


def test_a_response_in_two_parts_adds_up(ensemble: Ensemble) -> None:
    options: dict[str, Any] = {"weights": [0.6, 0.6], "divergence": "forward_kl"}
    options |= {"sequence_history": True, "return_model_logprobs": True}
    ids = torch.tensor([tiny.ids_of(PROMPTS[0])])
    whole = loglikelihood(ensemble, input_ids=ids, responses=[[3, 4, 5, 6]], **options)
    first = loglikelihood(ensemble, input_ids=ids, responses=[[3, 4]], **options)
    second = loglikelihood(
        ensemble, input_ids=torch.cat([ids, torch.tensor([[3, 4]])], 1), responses=[[5, 6]],
        prefix_logprobs=first.model_logprobs.sum(1), mixture_prefix_logprobs=first.totals,
        **options,
    )  # fmt: skip
    both = torch.cat([first.logprobs, second.logprobs], 1)
    torch.testing.assert_close(both, whole.logprobs, atol=2e-4, rtol=0)


def test_text_is_read_as_a_continuation(ensemble: Ensemble) -> None:
    text = loglikelihood(ensemble, ["it is"], ["a the"], weights=[0.5, 0.5])
    ids = loglikelihood(ensemble, ["it is"], [tiny.ids_of("a the")], weights=[0.5, 0.5])
    assert torch.equal(text.logprobs, ids.logprobs)


def test_a_step_that_is_invalid_is_not_greedy() -> None:
    def broken(tokens: torch.Tensor) -> torch.Tensor:
        return torch.full((len(tokens), tiny.V), torch.nan)

    models = Ensemble([tiny.bigram(0), broken])
    found = loglikelihood(
        models, input_ids=torch.tensor([[5]]), responses=[[0]], weights=[0.5], use_cache=False
    )
    assert found.totals.isnan().all() and not found.greedy.any()
    with pytest.raises(ValueError, match=f"hold the id {tiny.V}, expected 0 to {tiny.V - 1}"):
        loglikelihood(models, input_ids=torch.tensor([[5]]), responses=[[tiny.V]], weights=[0.5])


@pytest.mark.parametrize(
    "name", ["cpmant", "bamba", "zamba2", "phi3 (LongRoPE)", "llama (dynamic RoPE)", "xlnet"]
)
def test_models_that_one_pass_would_change_read_token_by_token(name: str) -> None:
    policy = small_model(name, 0)
    pair = Ensemble([None, policy])
    options: dict[str, Any] = {"weights": [1.0], "input_ids": torch.arange(3, 9)[None]}
    out = generate(pair, seed=2, max_new_tokens=12, eos_token_id=[], **options)
    found = loglikelihood(pair, responses=out.tokens, **options)
    torch.testing.assert_close(found.logprobs, out.logprobs, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"responses": [[3]]}, ValueError, "responses must be B = 3, one for each prompt, got 1"),
        ({"responses": [[3], [], [4]]}, ValueError, r"responses\[1\] has no token"),
        (
            {"responses": [[3], [4], [tiny.V + 9]]},
            ValueError,
            f"hold the id {tiny.V + 9}, expected",
        ),
        ({"responses": [[3], [4], [9]], "vocab_size": 9}, ValueError, "id 9, expected 0 to 8"),
        ({"responses": "fox"}, TypeError, "a list of B = 3 responses, got one string"),
        ({"responses": [3, 4, 5]}, TypeError, "a string or a list of token ids, got int"),
        (TOKENS | {"lengths": [-1, 1, 1]}, ValueError, "lengths must be at least 0, got -1"),
        (TOKENS | {"lengths": [3, 1, 1]}, ValueError, "lengths must be at most T = 2, got 3"),
        (TOKENS | {"lengths": [True, 1, 1]}, TypeError, "lengths must be an int, got bool"),
        (TOKENS | {"lengths": [1, 1]}, ValueError, "lengths must be B = 3 whole numbers"),
        (TOKENS | {"lengths": 2}, ValueError, "lengths must be B = 3 whole numbers, got 2"),
        ({"responses": [[3], [4], [-1]]}, ValueError, "a token id of responses must be at least 0"),
        ({"responses": torch.zeros(3, 2)}, TypeError, "responses must be int64, got torch.float32"),
        (
            {"responses": torch.zeros(2, 2).long()},
            ValueError,
            r"responses must have shape \[B,",
        ),
        ({"lengths": [1, 1, 1]}, ValueError, "lengths go with responses int64"),
        ({"weights": [0.5]}, ValueError, "weights"),
        ({"plausibility": 2.0}, ValueError, "plausibility"),
        ({"value_weights": [1.0]}, ValueError, "value_weights were given without value_fn"),
        ({"prefix_logprobs": [[0.0] * 3] * 3}, ValueError, "without sequence_history"),
        ({"ensemble": [1]}, TypeError, "ensemble must be a mod_fused.Ensemble, got list"),
    ],
)
def test_bad_input_is_refused_before_a_model_runs(
    ensemble: Ensemble, changed: dict[str, Any], error: type, message: str
) -> None:
    arguments: dict[str, Any] = {
        "ensemble": ensemble, "prompts": PROMPTS, "responses": RESPONSES, "weights": [0.5, 0.5],
    } | changed  # fmt: skip
    ran = []
    hooks = [m.register_forward_pre_hook(lambda *_: ran.append(1)) for m in ensemble.present]
    try:
        with pytest.raises(error, match=message):
            loglikelihood(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    assert not ran
