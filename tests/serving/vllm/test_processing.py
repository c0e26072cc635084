"""Masks, biases and penalties of vLLM's own, against a decode by hand with the op's `bias`."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import replace

import cloudpickle
import pytest
import torch
from torch import Tensor
from vllm import LLM
from vllm.sampling_params import StructuredOutputsParams

import mod_fused

from .conftest import DIVERGENCES, WEIGHTS, Case, cases, engine, expected, tokens


def by_hand(
    ensemble: mod_fused.Ensemble,
    case: Case,
    bias: Callable[[list[int], list[int], Tensor], Tensor],
    eos: int | None = 2,
) -> list[int]:
    """Decode without caches; `bias(prompt, response, log_pi)` returns [V]."""
    prompt = ensemble.tokenizer(case.prompt).input_ids
    response: list[int] = []
    while len(response) < case.max_tokens and (not response or response[-1] != eos):
        ids = torch.tensor([prompt + response])
        logits = [model(ids).logits[:, -1].detach() for model in ensemble.models]
        mixing = {
            "weights": list(case.weights),
            "divergence": case.divergence,
            "normalizer": case.normalizer,
            "plausibility": case.plausibility,
        }
        log_pi = mod_fused.log_probs(logits[0], logits[1:], **mixing)[0]
        out = mod_fused.sample(
            logits[0],
            logits[1:],
            **mixing,
            bias=bias(prompt, response, log_pi)[None],
            temperature=case.temperature,
            top_k=case.top_k,
            top_p=case.top_p,
            min_p=case.min_p,
            seed=[case.seed],
            position=len(response),
            backend="torch",
        )
        response.append(int(out.tokens) if out.valid else 2)  # nothing is left: it ends
    return response


def given(count: int, seed: int) -> list[Case]:
    """Without histories, and with a support cut that no mask turns off."""
    return [
        replace(
            c,
            history=False,
            normalizer="exact",
            divergence=DIVERGENCES[i % 5],
            plausibility=[None, 1e-4][i % 2],
            weights=WEIGHTS[i % 5],
            max_tokens=12,
            min_tokens=0,
            repetition_penalty=1.0,
            logit_bias=(),
        )
        for i, c in enumerate(cases(count, seed))
    ]


def answers(llm: LLM, requests: list[Case], **more: object) -> list[list[int]]:
    params = [c.params(**more) for c in requests]
    outputs = llm.generate([c.prompt for c in requests], params, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outputs]


def test_logit_bias(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    biases = {898: -100.0, 173: 2.5, 40: 4.0, 2: -3.0}
    dense = torch.zeros(904)
    dense[list(biases)] = torch.tensor(list(biases.values()))
    requests = given(10, seed=41)
    wanted = [by_hand(ensemble, c, lambda *_: dense) for c in requests]
    assert answers(llm, requests, logit_bias=biases) == wanted
    assert wanted != [tokens(out) for out in expected(ensemble, requests)]


def test_penalties(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    def bias(prompt: list[int], response: list[int], log_pi: Tensor) -> Tensor:
        counts = torch.bincount(torch.tensor(response, dtype=torch.int64), minlength=904)
        out = -0.7 * counts - 0.4 * (counts > 0)
        seen = torch.tensor(sorted({*prompt, *response}))
        scaled = (1.5 - 1.0) * log_pi[seen]
        # vLLM scales log pi* first, then takes the other penalties off.
        out[seen] += torch.where(scaled.isfinite(), scaled, 0.0)
        return out

    requests = given(10, seed=42)
    wanted = [by_hand(ensemble, c, bias) for c in requests]
    penalties = {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.5}
    assert answers(llm, requests, **penalties) == wanted
    assert wanted != [tokens(out) for out in expected(ensemble, requests)]


def test_min_tokens_allowed_tokens_and_banned_words(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    requests = given(6, seed=43)
    banned = ensemble.tokenizer.decode([tokens(expected(ensemble, requests[:1])[0])[1]]).strip()
    ids = {
        x
        for w in (banned, f" {banned}")
        for x in [ensemble.tokenizer.encode(w, add_special_tokens=False)[-1]]
    }

    def without(ids: set[int]) -> Tensor:
        out = torch.zeros(904)
        out[list(ids)] = -torch.inf
        return out

    assert answers(llm, requests, bad_words=[banned]) == [
        by_hand(ensemble, c, lambda *_: without(ids)) for c in requests
    ]
    assert answers(llm, requests, min_tokens=10) == [
        by_hand(ensemble, c, lambda _, r, __: without({2} if len(r) < 10 else set()))
        for c in requests
    ]
    allowed = list(range(2, 904, 3))
    assert answers(llm, requests, allowed_token_ids=allowed) == [
        by_hand(ensemble, c, lambda *_: without(set(range(904)) - set(allowed))) for c in requests
    ]


def test_a_grammar_dead_end_ends_the_request(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    case = given(1, seed=44)[0]
    # The vocabulary has " Take" alone: no token begins this answer.
    params = case.params(structured_outputs=StructuredOutputsParams(choice=["Take a break."]))
    out = llm.generate([case.prompt], [params], use_tqdm=False)[0].outputs[0]
    assert out.finish_reason == "error" and list(out.token_ids) == [2] and not out.text
    # The engine goes on.
    assert answers(llm, [case]) == [tokens(expected(ensemble, [case])[0])]


def test_banned_words_are_those_of_generate(llm: LLM, ensemble: mod_fused.Ensemble) -> None:
    requests = [replace(c, logit_bias=()) for c in cases(20, seed=46)]
    words = ["a", "the", "good", "you can"]
    params = [c.params(bad_words=words) for c in requests]
    outputs = llm.generate([c.prompt for c in requests], params, use_tqdm=False)
    spaced = [text for word in words for text in (word, f" {word}")]  # vLLM bans both
    ids = [ensemble.tokenizer.encode(text, add_special_tokens=False) for text in spaced]
    wanted = [tokens(expected(ensemble, [c], bad_words_ids=ids)[0]) for c in requests]
    assert [list(out.outputs[0].token_ids) for out in outputs] == wanted
    assert wanted != [tokens(out) for out in expected(ensemble, requests)]


def _capture(worker: object) -> None:
    """In the worker: keep the logits of every step and the requests of its rows."""
    step, runner = worker.model_runner.model.step, worker.model_runner  # type: ignore[attr-defined]
    publish, step.seen = step.publish, []

    def kept(logits: list[Tensor]) -> Tensor:
        names = list(runner.input_batch.req_ids)
        at = [len(runner.requests[name].output_token_ids) for name in names]
        step.seen.append((names, at, [x.clone() for x in logits]))
        return publish(logits)

    step.publish = kept


def _captured(worker: object) -> bytes:
    return pickle.dumps(worker.model_runner.model.step.seen)  # type: ignore[attr-defined]


def test_in_bfloat16_the_draws_are_those_of_the_op(
    ensemble: mod_fused.Ensemble,
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the worker cannot import it
    llm = engine(dtype="bfloat16")
    llm.collective_rpc(_capture)
    requests = [
        replace(c, history=False, min_tokens=0, repetition_penalty=1.0, logit_bias=())
        for c in cases(60, seed=45)
    ]
    params = [c.params(logprobs=0) for c in requests]
    outputs = llm.generate([c.prompt for c in requests], params, use_tqdm=False)
    found = {out.request_id: (c, out.outputs[0]) for c, out in zip(requests, outputs, strict=True)}
    last = {}  # a prompt that is read in parts draws at its first position more than once
    for names, positions, logits in pickle.loads(llm.collective_rpc(_captured)[0]):
        assert logits[0].dtype == torch.bfloat16
        for row, at in enumerate(zip(names, positions, strict=True)):
            last[at] = [x[row : row + 1] for x in logits]
    checked = 0
    for (name, position), one in last.items():
        case, answer = found[name.split("-")[0]]
        if position >= len(answer.token_ids):
            continue
        cut = case.plausibility
        if cut == "auto":
            corner = sorted(case.weights)[-2:] == [0, 1]
            cut = None if corner or case.divergence == "reverse_kl" else 1e-3
        out = mod_fused.sample(
            one[0],
            one[1:],
            list(case.weights),
            divergence=case.divergence,
            normalizer=case.normalizer,
            plausibility=cut,
            temperature=case.temperature,
            top_k=case.top_k,
            top_p=case.top_p,
            min_p=case.min_p,
            seed=[case.seed],
            position=position,
        )
        token = answer.token_ids[position]
        assert int(out.tokens) == token, (case, position)
        reported = answer.logprobs[position][token].logprob
        assert reported == pytest.approx(float(out.logprobs), abs=2e-5)
        checked += 1
    assert checked == sum(len(answer.token_ids) for _, answer in found.values())
