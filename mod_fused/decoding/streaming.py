"""Streams show tokens while they are drawn: to a callable, or a streamer of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor


class Stream:
    """The interface of the two kinds below; itself it shows nothing."""

    active = False

    def begin(self, prompts: Tensor) -> None:
        """Called once, with the prompts int64 [B, n], when a model is about to run."""

    def put(self, step: int, tokens: Tensor, drawn: Tensor) -> None:
        """The tokens of a step, int64 [B] on the CPU, and which of them were drawn, bool [B]."""

    def end(self) -> None:
        """Called once at the end, after an error too."""


class CallbackStream(Stream):
    active = True

    def __init__(self, callback: Callable[[int, Tensor], Any]) -> None:
        self.callback = callback

    def put(self, step: int, tokens: Tensor, drawn: Tensor) -> None:
        if drawn.any():
            self.callback(step, tokens)


class TransformersStream(Stream):
    """Calls put(prompt), put(token) ..., end(), as transformers' own generate does.

    Attributes:
        prompt_is_shown: transformers has put the prompt into it, and so accepted its rows.
    """

    active = True

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.prompt_is_shown = False

    def begin(self, prompts: Tensor) -> None:
        if self.prompt_is_shown:
            return
        if len(prompts) != 1:
            raise ValueError(
                f"a transformers streamer takes one row, got {len(prompts)}; pass a callable "
                "instead"
            )
        self.streamer.put(prompts.cpu())

    def put(self, step: int, tokens: Tensor, drawn: Tensor) -> None:
        if drawn.any():
            self.streamer.put(tokens)

    def end(self) -> None:
        self.streamer.end()


class BlockStream(Stream):
    """Passes on the prompts of a decode with `copies` adjacent rows for each, and none of its
    tokens: who chooses among the rows puts the chosen ones into the stream itself."""

    def __init__(self, stream: Stream, copies: int) -> None:
        self._stream, self._copies = stream, copies

    def begin(self, prompts: Tensor) -> None:
        self._stream.begin(prompts[:: self._copies])


@contextmanager
def streaming(streamer: Any) -> Iterator[Stream]:
    """The stream to a streamer, a callable or nothing (None). It ends once, after an error too: a
    thread that reads it must not wait for ever. A `Stream` is ended where it was made.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(streamer, Stream):
        yield streamer
        return
    stream = _stream_to(streamer)
    try:
        yield stream
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            stream.end()
        raise
    stream.end()


def _stream_to(streamer: Any) -> Stream:
    if streamer is None:
        return Stream()
    if hasattr(streamer, "put") and hasattr(streamer, "end"):
        return TransformersStream(streamer)
    if not callable(streamer):
        raise TypeError(
            "streamer must be a callable (step, tokens) or have put() and end(), "
            f"got {type(streamer).__name__}"
        )
    return CallbackStream(streamer)
