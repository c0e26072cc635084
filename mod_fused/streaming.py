"""Showing tokens while they are drawn: to a callable, or to one of transformers' streamers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Stream:
    """No streaming, and the interface of the two kinds."""

    active = False

    def begin(self, prompt: Tensor) -> None:
        pass

    def put(self, step: int, tokens: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


class CallbackStream(Stream):
    active = True

    def __init__(self, callback: Callable[[int, Tensor], Any]) -> None:
        self.callback = callback

    def put(self, step: int, tokens: Tensor) -> None:
        self.callback(step, tokens)


class TransformersStream(Stream):
    """put(prompt), put(token) ..., end(), as transformers' own generate calls them."""

    active = True

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer

    def begin(self, prompt: Tensor) -> None:
        self.streamer.put(prompt.cpu())

    def put(self, step: int, tokens: Tensor) -> None:
        self.streamer.put(tokens)

    def end(self) -> None:
        self.streamer.end()


def streaming(streamer: Any, batch: int) -> Stream:
    if streamer is None:
        return Stream()
    if hasattr(streamer, "put") and hasattr(streamer, "end"):
        if batch != 1:
            raise ValueError(
                f"a transformers streamer takes one row, got {batch}; pass a callable instead"
            )
        return TransformersStream(streamer)
    if not callable(streamer):
        raise TypeError(
            "streamer must be a callable (step, tokens) or have put() and end(), "
            f"got {type(streamer).__name__}"
        )
    return CallbackStream(streamer)
