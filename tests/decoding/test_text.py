"""The text of responses: what decoding them whole gives, at a cost that does not grow."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny_models as tiny
import tiny_tokenizers
import torch

from mod_fused import Ensemble, generate
from mod_fused.app.terminal import TextStream
from mod_fused.decoding.text import Decoder, GrowingText, StopStrings

KINDS = pytest.mark.parametrize("kind", tiny_tokenizers.ALL)


def streams_of(tokenizer: Any, count: int) -> list[list[int]]:
    """Random token streams: of all tokens, of a few of them (so that texts repeat), and, where the
    tokenizer has bytes, of characters of one to four bytes."""
    streams = []
    for seed in range(count):
        rng = random.Random(seed)
        ids = list(range(len(tokenizer)))
        if seed % 3 == 1:
            ids = rng.sample(ids, min(len(ids), rng.choice([2, 4, 6])))
        stream = [rng.choice(ids) for _ in range(rng.choice([20, 120]))]
        if seed % 3 == 2:
            text = "".join(rng.choice("a é€😀漢.") for _ in range(60))
            written = tokenizer(text, add_special_tokens=False)["input_ids"]
            stream = written[: rng.randint(1, len(written))]
        streams.append(stream)
    return streams


def brute_force(tokenizer: Any, ids: list[int], skip: bool) -> str:
    """A response decoded whole behind a text: what it adds to the text of a prompt."""
    prompt = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    assert before == "a" and whole.startswith("a")
    return whole[1:]


@KINDS
@pytest.mark.parametrize("skip", [True, False])
def test_growing_text_is_the_whole_text_and_what_lasts_does(kind: str, skip: bool) -> None:
    tokenizer = tiny_tokenizers.ALL[kind]()
    for ids in streams_of(tokenizer, 30):
        decoder = Decoder(tokenizer, skip_special_tokens=skip)
        text, settled, lasting = GrowingText(decoder), "", ""
        for step, token in enumerate(ids):
            settled += text.add(token)
            whole = brute_force(tokenizer, ids[: step + 1], skip)
            assert settled + text.open == whole
            assert whole.startswith(lasting)
            lasting = whole[: max(len(lasting), len(settled) + text.lasting())]
        assert len(lasting) >= len(settled)


@KINDS
def test_stop_strings_stop_where_the_whole_text_first_holds_one(kind: str) -> None:
    tokenizer = tiny_tokenizers.ALL[kind]()
    found = 0
    for seed, ids in enumerate(streams_of(tokenizer, 45)):
        rng = random.Random(1000 + seed)
        texts = [brute_force(tokenizer, ids[: n + 1], False) for n in range(len(ids))]
        stops = ["\u2603 never"]
        for _ in range(2):  # pieces of the text as it is in the end, short and very long
            begin = rng.randrange(len(texts[-1]))
            stops.append(texts[-1][begin : begin + rng.choice([1, 6, 12, 80])])
        first = next((n for n, t in enumerate(texts) if any(s in t for s in stops)), None)
        watch = StopStrings(stops, Decoder(tokenizer, skip_special_tokens=False))
        got = next((n for n, token in enumerate(ids) if watch.add(token)), None)
        assert got == first
        found += first is not None and first > 20
    assert found > 3  # beyond the tokens that are decoded whole


def test_the_cost_of_a_token_does_not_grow() -> None:
    class Counting:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer, self.decoded = tokenizer, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.tokenizer(*args, **kwargs)

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            self.decoded += len(ids)
            return self.tokenizer.decode(ids, **kwargs)

    for make in tiny_tokenizers.ALL.values():
        counting = Counting(make())
        word = make()("a cat", add_special_tokens=False)["input_ids"]
        decoder = Decoder(counting, skip_special_tokens=False)
        watch, text, costs = StopStrings(["never"], decoder), GrowingText(decoder), []
        for _ in range(2):
            counting.decoded = 0
            for token in word * (600 // len(word)):
                watch.add(token)
                text.add(token)
                text.lasting()
            costs.append(counting.decoded)
        assert costs[1] < 1.1 * costs[0] and costs[0] < 2 * 600 * 64


@pytest.mark.parametrize("kind", ["metaspace", "byte_fallback"])
def test_the_space_in_front_of_the_first_word_belongs_to_the_response(kind: str) -> None:
    tokenizer = tiny_tokenizers.ALL[kind]()
    cat, s, dog = tokenizer.convert_tokens_to_ids(["▁cat", "s", "▁dog"])
    script = iter([cat, s, dog, cat])

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return 100.0 * torch.eye(len(tokenizer))[[next(script)]]

    prompt = tokenizer("the a", add_special_tokens=False)["input_ids"]
    out = generate(
        Ensemble([None, step], tokenizer),
        "the a",
        weights=[1.0],
        seed=0,
        stop_strings=["a cat", " cats d"],  # the first would need the end of the prompt
    )
    assert out.tokens.tolist() == [[cat, s, dog]] and out.finish_reasons == ["stop"]
    assert out.texts == [" cats dog"]
    assert tokenizer.decode(prompt) + out.texts[0] == tokenizer.decode(out.sequences[0])


def test_special_tokens_are_text_for_stop_strings_alone() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    script = iter(tokenizer("hi</s>there", add_special_tokens=False)["input_ids"])

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return 100.0 * torch.eye(len(tokenizer))[[next(script)]]

    out = generate(
        Ensemble([None, step], tokenizer),
        "a",
        weights=[1.0],
        seed=0,
        eos_token_id=[],
        stop_strings="i</s>t",
    )
    assert out.finish_reasons == ["stop"] and out.lengths.tolist() == [4]
    assert out.texts == ["hit"]


@KINDS
def test_streamed_text_is_the_final_text(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizers.ALL[kind]()
    size = len(tokenizer)
    models = Ensemble([lambda tokens: torch.zeros(len(tokens), size)] * 2, tokenizer)
    for seed in range(12):
        out = generate(
            models,
            input_ids=torch.tensor([[5]]),
            weights=[0.5],
            seed=seed,
            max_new_tokens=40,
            eos_token_id=[],
            streamer=TextStream(tokenizer),
        )
        assert capsys.readouterr().out == out.texts[0]
        assert out.texts[0] == brute_force(tokenizer, out.tokens[0].tolist(), True)


def test_a_stream_shows_text_as_soon_as_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizers.byte_level(clean_up_tokenization_spaces=True)  # no effect on BPE
    stream = TextStream(tokenizer)
    stream.put(torch.zeros(1, 3))
    shown = []
    for token in tokenizer("a é.", add_special_tokens=False)["input_ids"]:
        stream.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert shown == ["a", " ", "", "é", "."]


def test_a_tokenizer_without_words_decodes_responses_alone() -> None:
    assert Decoder(tiny.tokenizer({"<unk>": 0, "<eos>": 1, "?": 2, "!": 3}))([2, 3]) == "? !"
