"""Requests to vLLM against `mod_fused.generate`: Model Runner V1, float32, the same tokens."""

from __future__ import annotations

import sys
from dataclasses import replace

import cloudpickle
import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

import mod_fused

from .conftest import WEIGHTS, Case, cases, engine, expected, tokens


def drawn(outputs: list) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in outputs]


def test_hundreds_of_mixed_requests(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    given = cases(300, seed=1)
    outputs = llm.generate([c.prompt for c in given], [c.params() for c in given], use_tqdm=False)
    wanted = [tokens(out) for out in expected(ensemble, given)]
    different = [i for i, (a, b) in enumerate(zip(drawn(outputs), wanted, strict=True)) if a != b]
    assert not different, [(given[i], drawn(outputs)[i], wanted[i]) for i in different[:3]]


def test_logprobs_are_those_of_the_mixture_and_of_each_model(
    llm: LLM, ensemble: mod_fused.Ensemble
) -> None:
    given = cases(40, seed=2)
    params = [c.params(logprobs=3 if i % 2 else 6) for i, c in enumerate(given)]
    for p in params[::2]:
        p.extra_args["mod_model_logprobs"] = True
    outputs = llm.generate([c.prompt for c in given], params, use_tqdm=False)
    vocab = ensemble.vocab_size
    for i, (out, want) in enumerate(zip(outputs, expected(ensemble, given), strict=True)):
        answer = out.outputs[0]
        assert list(answer.token_ids) == tokens(want)
        for step, (token, entries) in enumerate(
            zip(answer.token_ids, answer.logprobs, strict=True)
        ):
            # The two round logits differently; a history adds the differences up.
            close = 1e-3 if given[i].history else 1e-4
            want_own = float(want.logprobs[0, step])
            assert entries[token].logprob == pytest.approx(want_own, abs=close)
            models = [entries[vocab + k].logprob for k in range(4) if vocab + k in entries]
            if i % 2:
                assert not models
                best = [e.logprob for t, e in entries.items() if t != token]
                assert best == sorted(best, reverse=True) and len(best) >= 2
            else:
                assert models == pytest.approx(want.model_logprobs[0, step].tolist(), abs=1e-4)


def test_the_best_tokens_are_those_of_log_probs(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    case = replace(cases(1, seed=3)[0], divergence="jsd", weights=WEIGHTS[0], history=False)
    out = llm.generate([case.prompt], [case.params(logprobs=5, max_tokens=1)], use_tqdm=False)[0]
    ids = ensemble.tokenizer(case.prompt, return_tensors="pt").input_ids
    logits = [model(ids).logits[:, -1].detach() for model in ensemble.models]
    cut = {"auto": 1e-3}.get(case.plausibility, case.plausibility)
    every = mod_fused.log_probs(
        logits[0],
        logits[1:],
        list(case.weights),
        divergence="jsd",
        normalizer=case.normalizer,
        plausibility=cut,
    )[0]
    best = every.topk(5)
    entries = out.outputs[0].logprobs[0]
    for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        assert entries[token].logprob == pytest.approx(value, abs=2e-5)


def test_children_of_one_request_have_the_next_seeds(
    llm: LLM, ensemble: mod_fused.Ensemble
) -> None:
    case = Case(cases(1, seed=4)[0].prompt, WEIGHTS[0], "jeffrey", seed=7)
    out = llm.generate([case.prompt], [case.params(n=4)], use_tqdm=False)[0]
    wanted = expected(ensemble, [replace(case, seed=case.seed + k) for k in range(4)])
    assert [list(x.token_ids) for x in out.outputs] == [tokens(want) for want in wanted]


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    case = Case(cases(1, seed=5)[0].prompt, WEIGHTS[0])
    outputs = llm.generate([case.prompt] * 8, [case.params(seed=None)] * 8, use_tqdm=False)
    assert len({tuple(x) for x in drawn(outputs)}) > 4


def test_stop_strings_and_stop_tokens(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    case = Case(cases(1, seed=6)[0].prompt, WEIGHTS[0], "jsd", seed=3)
    whole = tokens(expected(ensemble, [case])[0])
    out = llm.generate([case.prompt], [case.params(stop_token_ids=[whole[5]])], use_tqdm=False)
    assert drawn(out)[0] == whole[: whole.index(whole[5]) + 1]
    word = ensemble.tokenizer.decode(whole[4]).strip()
    text = llm.generate([case.prompt], [case.params(stop=[word])], use_tqdm=False)[0].outputs[0]
    assert text.finish_reason == "stop" and word not in text.text


def test_an_end_of_sequence_ends_a_request(llm: LLM) -> None:
    case = Case(cases(1, seed=7)[0].prompt, WEIGHTS[0])
    params = case.params(max_tokens=100)
    out = llm.generate([case.prompt], [params], use_tqdm=False)[0].outputs[0]
    assert out.finish_reason == "stop" and out.token_ids[-1] == 2
    out = llm.generate([case.prompt], [case.params(ignore_eos=True)], use_tqdm=False)[0].outputs[0]
    assert out.finish_reason == "length" and len(out.token_ids) == case.max_tokens


def test_a_prompt_in_the_prefix_cache_changes_nothing(
    llm: LLM, ensemble: mod_fused.Ensemble
) -> None:
    long = " ".join(c.prompt for c in cases(8, seed=8))[:700]
    given = [replace(c, prompt=f"{long} {c.prompt}", max_tokens=16) for c in cases(12, seed=9)]
    wanted = [tokens(out) for out in expected(ensemble, given)]
    prompts, params = [c.prompt for c in given], [c.params() for c in given]
    first = llm.generate(prompts, params, use_tqdm=False)
    second = llm.generate(prompts, params, use_tqdm=False)
    assert sum(out.num_cached_tokens or 0 for out in second) > 0
    assert drawn(first) == wanted and drawn(second) == wanted


def test_histories_survive_preemption_and_chunked_prefill(ensemble: mod_fused.Ensemble) -> None:
    small = engine(
        max_num_batched_tokens=64, block_size=32, num_gpu_blocks_override=14, max_num_seqs=16
    )
    long = " ".join(c.prompt for c in cases(8, seed=10))[:400]
    given = [
        replace(c, prompt=f"{long} {c.prompt}", history=True, max_tokens=60)
        for c in cases(24, seed=11)
    ]
    outputs = small.generate([c.prompt for c in given], [c.params() for c in given], use_tqdm=False)
    preemptions = [m.value for m in small.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preemptions[0] > 0
    assert drawn(outputs) == [tokens(out) for out in expected(ensemble, given)]
    # One more request, whose step tells the worker which of the others have ended.
    small.generate([given[0].prompt], [given[0].params(max_tokens=1)], use_tqdm=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the worker cannot import it
    slots, parked = small.collective_rpc(_left)[0]
    assert slots <= 1 and parked == 0


def _left(worker: object) -> tuple[int, int]:
    """In the worker: how many requests it knows, and how many histories it has parked."""
    slots = worker.model_runner.sampler.slots  # type: ignore[attr-defined]
    return len(slots.of_request), len(slots._parked)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"extra_args": None}, "mod_weights is missing"),
        ({"extra_args": {"mod_weights": [1.0]}}, "3 finite numbers"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_a_bad_request_is_refused_and_the_others_answered(
    llm: LLM, ensemble: mod_fused.Ensemble, more: dict, word: str
) -> None:
    case = cases(1, seed=12)[0]
    with pytest.raises((ValueError, VLLMValidationError), match=word):
        llm.generate([case.prompt], [case.params(**more)], use_tqdm=False)
    out = llm.generate([case.prompt], [case.params()], use_tqdm=False)
    assert drawn(out)[0] == tokens(expected(ensemble, [case])[0])


def test_a_grammar_holds(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    choices = [" Take a break.", " Dim the lights."]
    given = [Case(c.prompt, c.weights, c.divergence, seed=i) for i, c in enumerate(cases(6, 13))]
    params = [c.params(structured_outputs=StructuredOutputsParams(choice=choices)) for c in given]
    outputs = llm.generate([c.prompt for c in given], params, use_tqdm=False)
    assert {out.outputs[0].text for out in outputs} <= set(choices)


def test_params_are_not_shared_between_requests(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    case = Case(cases(1, seed=14)[0].prompt, WEIGHTS[0], "alpha:0.5", history=True, seed=5)
    params: SamplingParams = case.params()
    outputs = llm.generate([case.prompt] * 3, params, use_tqdm=False)
    want = tokens(expected(ensemble, [case])[0])
    assert drawn(outputs) == [want] * 3
