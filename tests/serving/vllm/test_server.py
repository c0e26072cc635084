"""The OpenAI server with a real client: answers, refusals, and an engine that is killed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

import mod_fused

from .conftest import WEIGHTS, Case, cases, expected, tokens
from .server import DEFAULTS, Server, body, prompt, serving

NAN, INF = math.nan, math.inf
DEFAULT = Case(prompt(), DEFAULTS["mod_weights"], seed=1, max_tokens=8)
#: What vLLM's client takes as its own, everything else goes into extra_body.
_CLIENTS = {"prompt", "temperature", "top_p", "seed", "max_tokens", "logprobs", "n", "stop"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


def client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """A body as arguments of the client."""
    extra = {name: value for name, value in given.items() if name not in _CLIENTS}
    return {name: given[name] for name in given.keys() & _CLIENTS} | {"extra_body": extra}


async def complete(api: openai.AsyncOpenAI, given: dict[str, Any]) -> Any:
    return await api.completions.create(model="mod", **arguments(given))


async def stream(api: openai.AsyncOpenAI, given: dict[str, Any]) -> tuple[str, list[int], int]:
    """Text, tokens and number of pieces of a streamed completion."""
    pieces: AsyncIterator[Any] = await api.completions.create(
        model="mod", stream=True, **arguments(given)
    )
    text, found, count = "", [], 0
    async for piece in pieces:
        text += piece.choices[0].text
        found += piece.choices[0].token_ids or []
        count += 1
    return text, found, count


def together(*awaitables: Awaitable[Any]) -> list[Any]:
    async def gathered() -> list[Any]:
        return await asyncio.gather(*awaitables)

    return asyncio.run(gathered())


def text_of(ensemble: mod_fused.Ensemble, found: list[int]) -> str:
    return ensemble.tokenizer.decode(found, skip_special_tokens=True)


def right(server: Server, ensemble: mod_fused.Ensemble, case: Case = DEFAULT) -> bool:
    """Whether the server's answer is that of `generate`."""
    answer = server.post("/v1/completions", body(case)).json()["choices"][0]
    return answer["token_ids"] == tokens(expected(ensemble, [case])[0])


def test_mixed_requests_at_once_streamed_and_not(
    server: Server, ensemble: mod_fused.Ensemble
) -> None:
    given = cases(48, seed=31)

    async def ask() -> tuple[list[Any], list[Any]]:
        async with client(server) as api:
            whole = asyncio.gather(*(complete(api, body(c)) for c in given))
            pieces = asyncio.gather(*(stream(api, body(c)) for c in given[:24]))
            return await whole, await pieces

    whole, pieces = asyncio.run(ask())
    wanted = [tokens(out) for out in expected(ensemble, given)]
    assert [answer.choices[0].token_ids for answer in whole] == wanted
    assert [piece[1] for piece in pieces] == wanted[:24]
    texts = [answer.choices[0].text for answer in whole]
    assert [piece[0] for piece in pieces] == texts[:24]
    assert sum(piece[2] for piece in pieces) > 200
    for answer, found in zip(whole, wanted, strict=True):
        assert answer.usage.completion_tokens == len(found)
        ended = found[-1] == 2
        assert answer.choices[0].finish_reason == ("stop" if ended else "length")
        assert answer.choices[0].text == text_of(ensemble, found)


def test_a_conversation(server: Server, ensemble: mod_fused.Ensemble) -> None:
    given = cases(8, seed=32)

    async def ask() -> list[Any]:
        async with client(server) as api:
            asked = []
            for case in given:
                whole = arguments(body(case, add_special_tokens=True))
                messages = [{"role": "user", "content": whole.pop("prompt")}]
                asked.append(api.chat.completions.create(model="mod", messages=messages, **whole))
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    wanted = [tokens(out) for out in expected(ensemble, given)]
    assert [answer.choices[0].token_ids for answer in answers] == wanted
    assert [answer.choices[0].message.content or "" for answer in answers] == [
        text_of(ensemble, found) for found in wanted
    ]


def test_logprobs_are_those_of_the_mixture_and_of_each_model(
    server: Server, ensemble: mod_fused.Ensemble
) -> None:
    for case in cases(6, seed=33):
        given = body(case, logprobs=6, return_tokens_as_token_ids=True)
        given["vllm_xargs"]["mod_model_logprobs"] = True
        found = server.post("/v1/completions", given).json()["choices"][0]["logprobs"]
        want = expected(ensemble, [case])[0]
        count = int(want.lengths[0])
        assert found["token_logprobs"] == pytest.approx(want.logprobs[0, :count].tolist(), abs=2e-5)
        for step, entries in enumerate(found["top_logprobs"]):
            models = [entries[f"token_id:{ensemble.vocab_size + k}"] for k in range(4)]
            assert models == pytest.approx(want.model_logprobs[0, step].tolist(), abs=2e-5)


def test_a_client_that_knows_nothing_of_mixtures(
    server: Server, ensemble: mod_fused.Ensemble
) -> None:
    plain = {"prompt": DEFAULT.prompt, "seed": 1, "max_tokens": 8}
    (answer,) = together(complete(client(server), plain))
    whole = tokens(expected(ensemble, [DEFAULT])[0])
    assert answer.choices[0].text == text_of(ensemble, whole)
    # One argument of its own, the others by default.
    (answer,) = together(
        complete(client(server), plain | {"vllm_xargs": {"mod_divergence": "jeffrey"}})
    )
    other = tokens(expected(ensemble, [replace(DEFAULT, divergence="jeffrey")])[0])
    assert answer.choices[0].text == text_of(ensemble, other)


def test_several_answers_and_stop_strings(server: Server, ensemble: mod_fused.Ensemble) -> None:
    case = Case(prompt(1), WEIGHTS[0], "jsd", history=True, seed=11)
    children = [replace(case, seed=case.seed + k) for k in (0, 1)]
    wanted = [tokens(out) for out in expected(ensemble, children)]
    answer = server.post("/v1/completions", body(case, n=2)).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == wanted
    word = text_of(ensemble, [wanted[0][4]])
    answer = server.post("/v1/completions", body(case, stop=[word])).json()["choices"][0]
    text = text_of(ensemble, wanted[0])
    assert answer["text"] == text[: text.index(word)] and answer["finish_reason"] == "stop"


def test_several_prompts_and_tokens_as_prompts(
    server: Server, ensemble: mod_fused.Ensemble
) -> None:
    case = Case(prompt(2), WEIGHTS[0], "alpha:0.5", seed=5)
    ids = [ensemble.tokenizer(text).input_ids for text in (case.prompt, prompt(3))]
    answer = server.post("/v1/completions", body(case, prompt=ids)).json()
    wanted = expected(ensemble, [case, replace(case, prompt=prompt(3))])
    assert [c["token_ids"] for c in answer["choices"]] == [tokens(out) for out in wanted]


@pytest.mark.parametrize("kind", ["choice", "logit_bias", "bad_words", "min_tokens", "penalty"])
def test_vllms_own_fields_act_on_the_mixture(
    server: Server, ensemble: mod_fused.Ensemble, kind: str
) -> None:
    given = [replace(case, temperature=1.0, plausibility=None) for case in cases(4, seed=34)]
    plain = [tokens(out) for out in expected(ensemble, given)]
    first = plain[0][0]
    choices = [text_of(ensemble, found[:3]) for found in plain[:2]]
    fields: dict[str, Any] = {
        "choice": {"structured_outputs": {"choice": choices}},
        "logit_bias": {"logit_bias": {str(first): 100}},
        "bad_words": {"bad_words": [text_of(ensemble, [first]).strip() or ","]},
        "min_tokens": {"min_tokens": 32},
        "penalty": {"repetition_penalty": 1.5, "frequency_penalty": 2.0},
    }[kind]
    answers = [
        server.post("/v1/completions", body(case, **fields)).json()["choices"][0] for case in given
    ]
    if kind == "choice":
        assert {a["text"] for a in answers} <= set(choices)
    elif kind == "logit_bias":
        assert all(set(a["token_ids"]) == {first} for a in answers)
    elif kind == "bad_words":
        assert all(fields["bad_words"][0] not in a["text"].split() for a in answers)
    elif kind == "min_tokens":
        assert all(len(a["token_ids"]) == 32 for a in answers)
    else:
        assert [a["token_ids"] for a in answers] != plain
        repeated = [len(x) - len(set(x)) for x in plain]
        assert sum(len(a["token_ids"]) - len(set(a["token_ids"])) for a in answers) < sum(repeated)


def test_a_grammar_that_no_token_can_go_on_with_ends_its_request_alone(
    server: Server, ensemble: mod_fused.Ensemble
) -> None:
    # No token of this vocabulary begins with "T": vLLM's words for it are these.
    answer = server.post("/v1/completions", body(DEFAULT, structured_outputs={"choice": ["Take"]}))
    assert (answer.status_code, "Internal server error" in answer.text) == (500, True)
    assert right(server, ensemble)


def xargs(**given: Any) -> dict[str, Any]:
    return {"vllm_xargs": given}


def raw(extra: Any = None, **params: Any) -> dict[str, Any]:
    """A body for /inference/v1/generate, where a client writes SamplingParams itself."""
    more = {} if extra is None else {"extra_args": extra}
    return {"token_ids": [1, 20, 30], "sampling_params": {"max_tokens": 4, **params, **more}}


PIXEL = "data:image/png;base64,iVBORw0KGgo="
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]
HELLO = [{"role": "user", "content": "How do I bake bread?"}]

#: What a client can get wrong in a completion: what it sends and a word of the answer.
COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (xargs(mod_weight=[1, 0, 0]), "mod_weight'"),
    "seed as a key": (xargs(mod_seed=1), "mod_seed"),
    "empty key": (xargs(mod_=1), "unknown arguments"),
    "key of nobody": (xargs(other="x", repetition=[1, "a"]), "unknown arguments"),
    "key without its prefix": (xargs(weights=[1, 0, 0]), "unknown arguments"),
    "key that looks internal": (xargs(_mod_row=0, mod_weights=[1, 0, 0]), "unknown arguments"),
    "values": (xargs(mod_values=[1]), "trained scorers"),
    "xargs a list": ({"vllm_xargs": [1]}, "vllm_xargs"),
    "too few weights": (xargs(mod_weights=[1]), "3 finite numbers"),
    "too many weights": (xargs(mod_weights=[1, 0, 0, 0]), "3 finite numbers"),
    "no weights": (xargs(mod_weights=[]), "3 finite numbers"),
    "weights a string": (xargs(mod_weights="1,0,0"), "list of 3 numbers"),
    "weights strings": (xargs(mod_weights=["1", "0", "0"]), "list of 3 numbers"),
    "weights a number": (xargs(mod_weights=1), "list of 3 numbers"),
    "weights nested": (xargs(mod_weights=[[1, 0, 0]]), "mod_weights"),
    "weights null": (xargs(mod_weights=None), "mod_weights"),
    "weights NaN": (xargs(mod_weights=[NAN, 0, 0]), "3 finite numbers"),
    "weights infinite": (xargs(mod_weights=[-INF, 0, 0]), "3 finite numbers"),
    "weights huge": (xargs(mod_weights=[1e300, 0, 0]), "3 finite numbers"),
    "weights huge integers": (xargs(mod_weights=[10**400, 0, 0]), "integers"),
    "total variation": (xargs(mod_divergence="tv"), "barrier"),
    "divergence unknown": (xargs(mod_divergence="no such"), "divergence"),
    "divergence a number": (xargs(mod_divergence=1), "mod_divergence"),
    "divergence a list": (xargs(mod_divergence=["jsd"]), "mod_divergence"),
    "alpha above 1": (xargs(mod_divergence="alpha:2"), "between 0 and 1"),
    "alpha NaN": (xargs(mod_divergence="alpha:nan"), "between 0 and 1"),
    "alpha without number": (xargs(mod_divergence="alpha:"), "alpha:A"),
    "normalizer": (xargs(mod_normalizer="none"), "mod_normalizer"),
    "normalizer a list": (xargs(mod_normalizer=[1]), "mod_normalizer"),
    "history a word": (xargs(mod_sequence_history="yes"), "true or false"),
    "history 2": (xargs(mod_sequence_history=2), "true or false"),
    "history a list": (xargs(mod_sequence_history=[1]), "true or false"),
    "plausibility NaN": (xargs(mod_plausibility=NAN), "mod_plausibility"),
    "plausibility above 1": (xargs(mod_plausibility=2), "mod_plausibility"),
    "plausibility a word": (xargs(mod_plausibility="x"), "mod_plausibility"),
    "plausibility a list": (xargs(mod_plausibility=[0.1]), "mod_plausibility"),
    "plausibility null": (xargs(mod_plausibility=None), "mod_plausibility"),
    "models without logprobs": (xargs(mod_model_logprobs=True), "at least 4"),
    "models, few logprobs": ({"logprobs": 3} | xargs(mod_model_logprobs=True), "at least 4"),
    "models a word": ({"logprobs": 4} | xargs(mod_model_logprobs="yes"), "true or false"),
    "logprobs of all": ({"logprobs": -1}, "logprobs"),
    "many logprobs": ({"logprobs": 21}, "logprobs"),
    "logprobs of no token": ({"logprobs": 1, "logprob_token_ids": [904]}, "out-of-vocab"),
    "prompt_logprobs": ({"prompt_logprobs": 1}, "prompt_logprobs"),
    "echo and logprobs": ({"echo": True, "logprobs": 1}, "prompt_logprobs"),
    "beam search": ({"use_beam_search": True, "n": 2}, "beam search"),
    "beam search, weights": (
        {"use_beam_search": True, "n": 2} | xargs(mod_weights=[1, 0, 0]),
        "beam search",
    ),
    "prompt empty": ({"prompt": ""}, "prompt"),
    "prompt no tokens": ({"prompt": [[]]}, "empty"),
    "prompt null": ({"prompt": None}, "prompt"),
    "prompt a number": ({"prompt": 3}, "prompt"),
    "prompt too long": ({"prompt": "bread " * 400}, "maximum context length"),
    "prompt of a half character": ({"prompt": "\ud800"}, "TextEncodeInput"),
    "token beyond": ({"prompt": [1, 904]}, "out of vocabulary"),
    "token huge": ({"prompt": [1, 10**30]}, "out of vocabulary"),
    "token negative": ({"prompt": [1, -1]}, "greater than or equal to 0"),
    "embeddings as prompt": ({"prompt_embeds": "AAAA"}, "enable-prompt-embeds"),
    "n 0": ({"n": 0}, "n must be at least 1"),
    "n huge": ({"n": 10**6}, "n must be at most"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens huge": ({"max_tokens": 10**9}, "max_tokens"),
    "min_tokens above": ({"min_tokens": 9}, "min_tokens"),
    "seed too large": ({"seed": 2**63}, "seed"),
    "seed too large for n": ({"seed": 2**63 - 1, "n": 3}, "seed"),
    "seed a word": ({"seed": "x"}, "seed"),
    "temperature NaN": ({"temperature": NAN}, "temperature"),
    "temperature infinite": ({"temperature": INF}, "temperature"),
    "temperature negative": ({"temperature": -1}, "temperature"),
    "top_p 0": ({"top_p": 0}, "top_p"),
    "top_p NaN": ({"top_p": NAN}, "top_p"),
    "top_k -2": ({"top_k": -2}, "top_k"),
    "top_k huge": ({"top_k": 10**30}, "top_k"),
    "min_p NaN": ({"min_p": NAN}, "min_p"),
    "bias of no token": ({"logit_bias": {"904": 1}}, "logit_bias"),
    "bias of a word": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "penalty NaN": ({"presence_penalty": NAN}, "presence_penalty"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty"),
    "repetitions huge": (
        {"repetition_detection": {"max_pattern_size": 10**30, "min_count": 2}},
        "max_pattern_size",
    ),
    "stop empty": ({"stop": [""]}, "stop"),
    "stop token beyond": ({"stop_token_ids": [904]}, "stop_token_ids"),
    "no token allowed": ({"allowed_token_ids": []}, "allowed_token_ids"),
    "allowed beyond": ({"allowed_token_ids": [904]}, "allowed_token_ids"),
    "bad word empty": ({"bad_words": [""]}, "bad_words"),
    "schema": ({"structured_outputs": {"json": {"type": "nope"}}}, "rammar"),
    "regular expression": ({"structured_outputs": {"regex": "("}}, "rammar"),
    "no choices": ({"structured_outputs": {"choice": []}}, "hoice"),
    "kv_transfer_params huge": ({"kv_transfer_params": {"a": 10**30}}, "integers"),
    "thinking": ({"thinking_token_budget": 3}, "thinking_token_budget"),
    "suffix": ({"suffix": "x"}, "suffix"),
}

#: The same at the other endpoints.
OTHERS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "name of a LoRA": ("completions", {"prompt": "x", "model": "lora"}, 404, "lora"),
    "chat weights": (
        "chat/completions",
        {"messages": HELLO} | xargs(mod_weights=[1]),
        400,
        "3 finite",
    ),
    "chat picture": ("chat/completions", {"messages": PICTURE}, 400, "multimodal"),
    "chat beams": (
        "chat/completions",
        {"messages": HELLO, "use_beam_search": True, "n": 2},
        400,
        "beam search",
    ),
    "chat prompt_logprobs": (
        "chat/completions",
        {"messages": HELLO, "prompt_logprobs": 1},
        400,
        "prompt_logprobs",
    ),
    "chat nothing": ("chat/completions", {"messages": []}, 400, "empty"),
    "chat batch": (
        "chat/completions/batch",
        {"messages": [HELLO]} | xargs(mod_weights=[1]),
        400,
        "3 finite",
    ),
    "responses": ("responses", {"input": "x"} | xargs(mod_weights=[1]), 400, "3 finite"),
    "responses nested": ("responses", {"input": "x"} | xargs(mod_weights=[[1]]), 400, "weights"),
    "messages": (
        "messages",
        {"max_tokens": 4, "messages": HELLO} | xargs(mod_weights=[1]),
        400,
        "3 finite",
    ),
    "embeddings": ("embeddings", {"input": "x"}, 404, "Not Found"),
    "score": ("score", {"text_1": "a", "text_2": "b"}, 404, "Not Found"),
    "rerank": ("rerank", {"query": "a", "documents": ["b"]}, 404, "Not Found"),
    "transcription": ("audio/transcriptions", {}, 404, "Not Found"),
    "adapter": ("load_lora_adapter", {"lora_name": "a", "lora_path": "b"}, 404, "Not Found"),
    "pooling": ("/pooling", {"input": "x"}, 404, "Not Found"),
    "classify": ("/classify", {"input": "x"}, 404, "Not Found"),
}

#: SamplingParams as a client may write them, by the server's option --enable-scale-out.
PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "weights nested": (raw({"mod_weights": [[1], 0, 0]}), "list of 3 numbers"),
    "weights null": (raw({"mod_weights": None}), "missing"),
    "weights an object": (raw({"mod_weights": {"a": 1}}), "list of 3 numbers"),
    "weights NaN": (raw({"mod_weights": [NAN, 0, 0]}), "3 finite numbers"),
    "plausibility an object": (raw({"mod_plausibility": {}}), "mod_plausibility"),
    "history null": (raw({"mod_sequence_history": None}), "true or false"),
    "divergence null": (raw({"mod_divergence": None}), "mod_divergence"),
    "normalizer an object": (raw({"mod_normalizer": {"a": 1}}), "mod_normalizer"),
    "bias NaN": (raw(logit_bias={"5": NAN}), "logit_bias"),
    "bias huge": (raw(logit_bias={"5": 1e300}), "logit_bias"),
    "seed": (raw(seed=2**63), "seed"),
    "seed too small": (raw(seed=-(2**63) - 1), "ints"),
    "top_k": (raw(top_k=2**64 - 1), "top_k"),
    "prompt_logprobs": (raw(prompt_logprobs=1), "prompt_logprobs"),
    "tokens to repeat": (raw(trace_decode_token_ids=[5]), "trace_decode_token_ids"),
    "stop token": (raw(stop_token_ids=[2**40]), "stop_token_ids"),
    "extra_args a list": (raw([1]), "sampling_params"),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_bad_completion_is_refused(server: Server, name: str) -> None:
    given, word = COMPLETIONS[name]
    plain = {"prompt": DEFAULT.prompt, "seed": 1, "max_tokens": 8}
    answer = server.post("/v1/completions", plain | given)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_endpoints_refuse(server: Server, name: str) -> None:
    path, given, status, word = OTHERS[name]
    answer = server.post(path if path.startswith("/") else f"/v1/{path}", given)
    assert (answer.status_code, word in answer.text) == (status, True), answer.text


@pytest.mark.parametrize("name", PARAMS)
def test_bad_sampling_params_are_refused(server: Server, name: str) -> None:
    given, word = PARAMS[name]
    answer = server.post("/inference/v1/generate", given)
    assert (answer.status_code, word in answer.text) == (400, True), answer.text


@pytest.mark.parametrize(
    "given",
    [
        xargs(session_id="x"),
        {"vllm_xargs": None},
        {"temperature": None},
        {"top_k": -1},
        {"kv_transfer_params": {"a": 1, "do_remote_prefill": True}},
        {"seed": 1, "priority": 0, "cache_salt": "x"},
    ],
    ids=str,
)
def test_what_is_not_ours_changes_nothing(
    server: Server, ensemble: mod_fused.Ensemble, given: dict[str, Any]
) -> None:
    plain = {"prompt": DEFAULT.prompt, "seed": 1, "max_tokens": 8, "return_token_ids": True}
    answer = server.post("/v1/completions", plain | given).json()["choices"][0]
    assert answer["token_ids"] == tokens(expected(ensemble, [DEFAULT])[0])


def test_negative_weights_and_extreme_draws_are_served(
    server: Server, ensemble: mod_fused.Ensemble
) -> None:
    for more in (
        {"weights": [0.6, 0.6, -0.2]},
        {"seed": -(2**63)},
        {"temperature": 0.0},
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"top_k": 2**40},
    ):
        assert right(server, ensemble, replace(DEFAULT, **more)), more


def test_after_all_that_the_engine_answers(server: Server, ensemble: mod_fused.Ensemble) -> None:
    assert server.process.poll() is None
    given = cases(16, seed=35)
    answers = together(*(complete(client(server), body(c)) for c in given))
    wanted = [tokens(out) for out in expected(ensemble, given)]
    assert [answer.choices[0].token_ids for answer in answers] == wanted


@pytest.mark.parametrize("name", ["VLLM::Worker", "VLLM::EngineCore"])
def test_a_killed_engine_hangs_nobody_and_a_restart_answers(
    server: Server, ensemble: mod_fused.Ensemble, name: str
) -> None:
    # More than run at once: however fast the machine is, some are under way.
    given = [replace(case, max_tokens=200) for case in cases(200, seed=36)]

    async def ask() -> list[Any]:
        async with client(server) as api:
            first = asyncio.Event()

            async def one(case: Case) -> str:
                pieces = await api.completions.create(
                    model="mod", stream=True, **arguments(body(case, ignore_eos=True))
                )
                ended = "nothing"
                async for piece in pieces:
                    first.set()
                    ended = piece.choices[0].finish_reason
                return ended

            tasks = [asyncio.ensure_future(one(case)) for case in given]
            await asyncio.wait_for(first.wait(), 60)
            server.kill(name)
            return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 120)

    answers = asyncio.run(ask())
    assert any(answer != "length" for answer in answers)
    server.process.wait(timeout=60)  # with exit code 0: a supervisor must restart it always
    server.start()
    assert right(server, ensemble)
