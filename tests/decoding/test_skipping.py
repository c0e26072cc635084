"""Models of coefficient 0 do not run, and the tokens are those of a decode that runs them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble, custom_generate, generate, loglikelihood
from mod_fused.decoding import memory
from mod_fused.guidance import Guidance

PROMPTS = tiny.PROMPTS
IDS = torch.tensor([[2, 3, 4], [5, 6, 7]])
THIRD = 1.0 / 3.0
ROWS = [[0.25, 0.0, 0.75], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]


def models(**options: Any) -> list[Any]:
    seeds = {0: tiny.llama, 1: tiny.gpt2, 2: tiny.llama, 3: tiny.gpt2}
    return [make(seed, eos=None, **options) for seed, make in seeds.items()]


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble(models(), tiny.tokenizer(eos_token=None))


def fails(tokens: torch.Tensor) -> torch.Tensor:
    raise AssertionError("it ran")


def ran(ensemble: Ensemble, call: Any, *args: Any, **options: Any) -> tuple[set[int], Any]:
    """The models that a call runs, and its result."""
    seen: set[int] = set()
    hooks = [
        model.register_forward_pre_hook(lambda *_, i=i: seen.add(i))
        for i, model in enumerate(ensemble.models)
    ]
    try:
        out = call(ensemble, *args, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, out


def agree(out: Any, full: Any) -> None:
    for name in ("sequences", "tokens", "lengths", "valid", "attention_mask", "seeds", "weights"):
        mine, theirs = getattr(out, name), getattr(full, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs), name
    torch.testing.assert_close(out.logprobs, full.logprobs, atol=2e-5, rtol=0)


SKIPPING: list[tuple[set[int], dict[str, Any]]] = [
    ({1, 2, 3}, {"weights": [0.5, 0.25, 0.25]}),
    ({1, 3}, {"weights": ROWS}),
    ({1, 2, 3}, {"weights": torch.tensor([THIRD, THIRD, THIRD])}),
    ({1, 2, 3}, {"weights": torch.tensor([[2.0, -1.5, 0.5]]).expand(3, 3)}),
    ({2}, {"weights": [0.0, 1.0, 1e-40]}),
    ({0, 2}, {"weights": torch.tensor([0.0, 0.7, 0.0])}),
    ({0, 1, 3}, {"weights": ROWS, "divergence": "jsd"}),
    ({0, 3}, {"weights": [0.0, 0.0, 0.6], "divergence": "forward_kl"}),
    ({0, 3}, {"weights": [0.0, 0.0, 0.6], "divergence": "alpha:0.5", "normalizer": "zero"}),
    ({0, 1}, {"weights": [0.8, 0.0, 0.0], "divergence": "jeffrey", "plausibility": 0.01}),
]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("runs", "mixing"), SKIPPING)
def test_tokens_are_those_of_a_decode_that_runs_all(
    ensemble: Ensemble, runs: set[int], mixing: dict[str, Any], sampled: bool
) -> None:
    options = mixing | {"do_sample": sampled, "max_new_tokens": 12, "repetition_penalty": 1.1}
    options |= {"num_return_sequences": 20 if sampled else 1, "seed": 3, "min_new_tokens": 2}
    seen, out = ran(ensemble, generate, PROMPTS, **options)
    everything, full = ran(ensemble, generate, PROMPTS, return_model_logprobs=True, **options)
    assert seen == runs and everything == {0, 1, 2, 3}
    agree(out, full)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_candidates": 6, "num_return_sequences": 2, "seed": 5},
        {"num_candidates": 6, "resample_below": 0.9, "seed": 5},
        {"sequence_history": True, "seed": 5},
        {"sequence_history": True, "seed": 5, "normalizer": "zero"},
        {"output_scores": True, "seed": 5, "top_k": 4, "logit_scales": [0.5, 1.0, 7.0, 1.5]},
    ],
)
def test_every_way_to_decode_skips(
    ensemble: Ensemble, divergence: str, how: dict[str, Any]
) -> None:
    options = how | {"weights": [0.75, 0.0, 0.25], "divergence": divergence, "max_new_tokens": 8}
    seen, out = ran(ensemble, generate, PROMPTS, **options)
    everything, full = ran(ensemble, generate, PROMPTS, return_model_logprobs=True, **options)
    assert seen == ({1, 3} if divergence == "reverse_kl" else {0, 1, 3})
    assert everything == {0, 1, 2, 3}
    agree(out, full)
    for mine, theirs in zip(out.scores or (), full.scores or (), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_callable_of_coefficient_0_is_never_called(use_cache: bool) -> None:
    a, b = tiny.llama(1, eos=None), tiny.llama(2, eos=None)
    options: dict[str, Any] = {"input_ids": IDS, "seed": 1, "num_return_sequences": 2}
    skipped = Ensemble([fails, a, fails, b])  # rows of a callable that runs could not be copied
    out = generate(skipped, weights=[0.5, 0.0, 0.5], use_cache=use_cache, **options)
    agree(out, generate(Ensemble([None, a, b]), weights=[0.5, 0.5], **options))


NEEDED: list[tuple[int, dict[str, Any]]] = [
    (0, {"weights": [0.5, 0.5], "return_model_logprobs": True}),
    (0, {"weights": [0.5, 0.5], "plausibility": 0.1}),
    (0, {"weights": [0.5, 0.5], "plausibility": [0.0, 0.1]}),
    (2, {"weights": [1.0, 0.0], "plausibility": 0.1, "plausibility_tensor": 2}),
    (2, {"weights": [0.5, 0.0], "plausibility_tensor": 2, "divergence": "jsd"}),
    (0, {"weights": [[0.5, 0.5], [0.5, 0.4]]}),
    (2, {"weights": [[0.5, 0.0], [0.5, 0.1]]}),
    (0, {"weights": [0.5, 0.5], "divergence": "jsd"}),
    (0, {"weights": [0.5, 0.5 - 2.0**-38]}),
    (0, {"weights": torch.tensor([0.5, 0.5 - 2.0**-22])}),
    (0, {"weights": torch.tensor([0.5, 0.5 - 2.0**-24]).double()}),
]


@pytest.mark.parametrize(("model", "options"), NEEDED)
def test_a_model_that_something_needs_runs(model: int, options: dict[str, Any]) -> None:
    places = [tiny.bigram(seed) for seed in range(3)]
    places[model] = fails
    with pytest.raises(AssertionError, match="it ran"):
        generate(Ensemble(places), input_ids=IDS, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [0.5, 0.5 - 2.0**-42]},
        {"weights": torch.tensor([0.5, 0.5 - 2.0**-24])},
        {"weights": [0.5, 0.5], "plausibility": 0.0},
    ],
)
def test_rounding_and_a_cut_that_is_off_need_no_reference(options: dict[str, Any]) -> None:
    models = [fails, tiny.bigram(1), tiny.bigram(2)]
    assert generate(Ensemble(models), input_ids=IDS, max_new_tokens=3, **options).valid.all()


def test_a_resampler_sees_every_models_log_probabilities(ensemble: Ensemble) -> None:
    class Looks:
        def resample(self, step: int, *args: Any) -> None:
            assert args[-1].models.shape[1] == 4

    options: dict[str, Any] = {"weights": [1.0, 0.0, 0.0], "resample_fn": Looks()}
    assert ran(ensemble, generate, PROMPTS, max_new_tokens=2, **options)[0] == {0, 1, 2, 3}


def test_scorers_need_the_reference_for_their_candidates_alone(ensemble: Ensemble) -> None:
    scorer = tiny.llama(9, eos=None)
    options: dict[str, Any] = {"weights": [0.5, 0.0, 0.5], "max_new_tokens": 6, "seed": 2}
    dense, few = Guidance([scorer]), Guidance([scorer], candidates=5)
    unknown = SimpleNamespace(num_values=1, start=dense.start)  # it does not say what it reads
    for guide, runs in ((dense, {1, 3}), (few, {0, 1, 3}), (unknown, {0, 1, 3})):
        seen, out = ran(ensemble, generate, PROMPTS, value_fn=guide, **options)
        full = generate(ensemble, PROMPTS, value_fn=guide, return_model_logprobs=True, **options)
        assert seen == runs
        agree(out, full)


def test_a_model_that_does_not_run_refuses_nothing(ensemble: Ensemble) -> None:
    _, a, b, _ = ensemble.models
    training, short = tiny.llama(5).train(), tiny.gpt2(6)
    short.config.max_position_embeddings = 1
    plain = tiny.tokenizer(eos_token=None)
    chat = tiny.tokenizer(eos_token=None, chat_template="{{ messages[0].content }}")
    talks = [[{"role": "user", "content": "fox ran"}], [{"role": "user", "content": "dog"}]]
    options: dict[str, Any] = {"weights": [0.4, 0.0, 0.6], "max_new_tokens": 6, "seed": 4}
    expected = generate(Ensemble([None, a, b], chat), talks, **options | {"weights": [0.4, 0.6]})
    for rests in (training, short):
        for tokenizer in (plain, None):
            mixed = Ensemble([training, a, rests, b], [chat, chat, tokenizer, chat])
            agree(generate(mixed, talks, **options), expected)


def test_a_model_that_does_not_run_takes_no_memory(
    ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 100 * (3 + 40) * memory.cached_numbers(ensemble.models[1], 1) * 4  # 100 rows of float32
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * one)
    options: dict[str, Any] = {"max_new_tokens": 40, "num_return_sequences": 50, "input_ids": IDS}
    generate(ensemble, weights=[1.0, 0.0, 0.0], **options)
    with pytest.raises(ValueError, match="of memory"):
        generate(ensemble, weights=[1.0, 0.0, 0.5], **options)


def test_transformers_own_loop_skips_too(ensemble: Ensemble) -> None:
    reference, *policies = ensemble.models
    options: dict[str, Any] = {"custom_generate": custom_generate, "policies": policies}
    options |= {"weights": [0.5, 0.0, 0.5], "seed": 3, "do_sample": True, "top_k": 0}
    seen, tokens = ran(ensemble, lambda _: reference.generate(IDS, max_new_tokens=9, **options))
    assert seen == {1, 3}
    own: dict[str, Any] = {"weights": options["weights"], "seed": 3, "return_model_logprobs": True}
    full = generate(ensemble, input_ids=IDS, max_new_tokens=9, **own)
    assert torch.equal(tokens, full.sequences)


def test_prompts_of_the_first_model_count_though_it_does_not_run(ensemble: Ensemble) -> None:
    own = [["the old fox"] * 2, ["dog", "it ran"], ["cat"] * 2, ["the bird sat", "over it"]]
    options: dict[str, Any] = {"weights": [0.5, 0.0, 0.5], "repetition_penalty": 3.0, "seed": 4}
    out = generate(ensemble, own, **options)
    assert out.sequences[:, :3].tolist() == [tiny.ids_of("the old fox")] * 2
    agree(out, generate(ensemble, own, return_model_logprobs=True, **options))


@pytest.mark.parametrize("smallest", [0, 2])
def test_the_vocabulary_stays_that_of_all_models(smallest: int) -> None:
    models = [tiny.llama(i, tiny.V + 40 * (i != smallest), eos=None) for i in range(3)]
    options: dict[str, Any] = {"weights": [1.0, 0.0], "seed": 0, "num_return_sequences": 50}
    out = generate(Ensemble(models), input_ids=IDS, output_logits=True, **options)
    assert out.logits is not None and out.logits[0].shape[1] == tiny.V
    agree(out, generate(Ensemble(models), input_ids=IDS, return_model_logprobs=True, **options))


def test_every_models_end_of_sequence_counts() -> None:
    reference, policy = tiny.llama(0, eos=None), tiny.llama(1, eos=None)
    ends = int(policy(IDS[:1]).logits[0, -1].argmax())
    reference.generation_config.eos_token_id = ends
    out = generate(Ensemble([reference, policy]), input_ids=IDS[:1], weights=[1.0], do_sample=False)
    assert out.finish_reasons == ["eos"] and out.tokens.tolist() == [[ends]]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("history", [False, True])
def test_the_likelihood_of_responses_skips_too(
    ensemble: Ensemble, divergence: str, history: bool
) -> None:
    tokens = torch.randint(0, tiny.V, (3, 7), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"divergence": divergence, "sequence_history": history}
    call = {"weights": [0.75, 0.0, 0.25], "responses": tokens, **options}
    seen, found = ran(ensemble, loglikelihood, PROMPTS, **call)
    full = loglikelihood(ensemble, PROMPTS, return_model_logprobs=True, **call)
    assert seen == ({1, 3} if divergence == "reverse_kl" else {0, 1, 3})
    torch.testing.assert_close(found.logprobs, full.logprobs, atol=2e-5, rtol=0)
    assert torch.equal(found.greedy, full.greedy)


def test_where_no_model_counts_all_run() -> None:
    models = [None, tiny.bigram(0), tiny.bigram(1, tiny.V - 4)]
    out = generate(
        Ensemble(models), input_ids=IDS, weights=[0.0, 0.0], output_logits=True, max_new_tokens=2
    )
    assert out.logits is not None and out.logits[0].shape[1] == tiny.V - 4
    assert torch.allclose(out.logits[0].exp(), torch.tensor(1.0 / (tiny.V - 4)))


@pytest.mark.parametrize("weights", [[0.5], [[0.5, 0.5]] * 3, "half", [[0.5], [0.5, 0.5]], None])
def test_weights_that_do_not_fit_are_refused_before_a_model_runs(weights: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="weights"):
        generate(Ensemble([fails] * 3), input_ids=IDS, weights=weights)
