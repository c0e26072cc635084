"""What a streamer of `generate` is given, and that its end comes once, whatever happens."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny_models as tiny
import tiny_tokenizers
import torch

from mod_fused import Ensemble, generate

V = 8


class Recorder:
    """A streamer as transformers' are; `fails` names the call that raises."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[Any] = []
        self.fails = fails

    def put(self, tokens: torch.Tensor) -> None:
        self.calls.append(tokens.tolist())
        if self.fails == f"put {len(self.calls) - 1}":
            raise RuntimeError("the streamer failed")

    def end(self) -> None:
        self.calls.append("end")
        if self.fails == "end":
            raise RuntimeError("the streamer failed")


def flat(tokens: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(tokens), V)


def failing(at: int, error: BaseException) -> Any:
    """A step() that raises at a call."""
    calls: list[int] = []

    def step(tokens: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        if len(calls) == at:
            raise error
        return flat(tokens)

    return step


def fail(*args: Any) -> Any:
    raise RuntimeError("a function failed")


IDS = torch.tensor([[5, 6]])
RUN: dict[str, Any] = {"input_ids": IDS, "weights": [0.5], "seed": 0, "max_new_tokens": 4}


def test_a_streamer_gets_prompt_tokens_and_one_end() -> None:
    streamer = Recorder()
    out = generate(Ensemble([flat, flat]), streamer=streamer, **RUN)
    assert streamer.calls == [[[5, 6]], *([t] for t in out.tokens[0].tolist()), "end"]


@pytest.mark.parametrize(
    ("options", "error", "puts"),
    [
        ({"models": [failing(3, RuntimeError("out of memory")), flat]}, RuntimeError, 3),
        ({"models": [flat, failing(1, KeyboardInterrupt())]}, KeyboardInterrupt, 1),
        ({"mask_fn": fail}, RuntimeError, 1),
        ({"value_fn": fail}, RuntimeError, 1),
        ({"fails": "put 2"}, RuntimeError, 3),
        ({"fails": "put 0"}, RuntimeError, 1),
        ({"fails": "end"}, RuntimeError, 5),
        ({"models": [failing(2, KeyError("first")), flat], "fails": "end"}, KeyError, 2),
        ({"top_p": 2.0}, ValueError, 0),
        ({"max_new_tokens": 0}, ValueError, 0),
        ({"input_ids": None}, ValueError, 0),
        ({"input_ids": torch.ones(2, 1).long()}, ValueError, 0),
        ({"num_return_sequences": 2, "use_cache": False}, ValueError, 0),
        ({"resample_fn": lambda *_: None, "use_cache": False}, ValueError, 0),
        ({"models": None}, TypeError, 0),
    ],
)
def test_the_end_comes_once_whatever_is_raised(
    options: dict[str, Any], error: type[BaseException], puts: int
) -> None:
    options = {**RUN, **options}
    models, streamer = options.pop("models", [flat, flat]), Recorder(options.pop("fails", ""))
    ensemble = models if models is None else Ensemble(models)
    with pytest.raises(error):
        generate(ensemble, streamer=streamer, **options)
    assert streamer.calls[-1] == "end" and len(streamer.calls) == puts + 1
    assert streamer.calls.count("end") == 1


def test_a_reader_in_another_thread_is_released_by_an_error() -> None:
    from transformers import TextIteratorStreamer

    tokenizer = tiny_tokenizers.byte_level()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(streamer))
    reader.start()
    with pytest.raises(RuntimeError, match="out of memory"):
        ensemble = Ensemble([None, failing(3, RuntimeError("out of memory"))], tokenizer)
        generate(ensemble, streamer=streamer, **{**RUN, "weights": [1.0], "eos_token_id": []})
    reader.join(timeout=20)
    assert not reader.is_alive()


def test_a_token_that_was_not_drawn_is_not_streamed() -> None:
    def allowed(step: int, sequences: torch.Tensor) -> torch.Tensor:
        rows = torch.ones(len(sequences), V, dtype=torch.bool)
        rows[:, 3] = False
        rows[0] &= step < 2
        return rows & (step < 3)

    options: dict[str, Any] = {**RUN, "mask_fn": allowed, "pad_token_id": 3, "eos_token_id": []}
    streamer = Recorder()
    out = generate(Ensemble([flat, flat]), streamer=streamer, **options)
    assert out.finish_reasons == ["invalid"] and out.lengths.tolist() == [2]
    assert streamer.calls == [[[5, 6]], *([t] for t in out.tokens[0, :2].tolist()), "end"]

    calls: list[tuple[int, list[int]]] = []
    options["input_ids"] = IDS.expand(2, 2)
    out = generate(
        Ensemble([flat, flat]),
        streamer=lambda step, tokens: calls.append((step, tokens.tolist())),
        **options,
    )
    assert out.lengths.tolist() == [2, 3] and len(calls) == 3  # none drew at the last step
    assert calls == list(enumerate(out.tokens.T.tolist()))[:3]
    assert calls[2][1][0] == 3  # the ended row's place


def test_no_streamer_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"streamer must be a callable \(step, tokens\)"):
        generate(Ensemble([tiny.bigram(0)] * 2), streamer=3, **RUN)
