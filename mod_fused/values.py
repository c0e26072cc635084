"""Where the value scores of a decode come from: a function, or a guide that keeps state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Scores = Tensor | tuple[Tensor, Tensor]  # values [J, B, V], or (values [J, B, K], ids [B, K])
ValueFunction = Callable[[int, Tensor], Scores]


class ValueState(Protocol):
    """One batch of a `ValueGuide` in progress."""

    def step(self, tokens: Tensor | None, reference: Tensor | None, vocab_size: int) -> Scores:
        """The scores of the tokens that may come next.

        Args:
            tokens: int64 [B], drawn last; None at the first step.
            reference: the reference's logits [B, V_0] of this step, None if there is no reference.
            vocab_size: V, how many tokens take part.
        """
        ...


@runtime_checkable
class ValueGuide(Protocol):
    """What `generate` takes as value_fn beside plain functions."""

    @property
    def num_values(self) -> int:
        """J, how many scores each token gets."""
        ...

    def start(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        has_reference: bool,
        max_new_tokens: int,
        use_cache: bool,
    ) -> ValueState:
        """Begin a batch of prompts [B, n] (mask None: no padding); runs no model yet."""
        ...


def value_count(value_fn: ValueFunction | ValueGuide | None, value_weights: Any) -> int:
    """J as far as it is known before anything runs; 0 without values."""
    if value_fn is None:
        return 0
    if isinstance(value_fn, ValueGuide):
        return value_fn.num_values
    if not callable(value_fn):
        raise TypeError(
            "value_fn must be a function (step, sequences) or have start() and num_values, "
            f"got {type(value_fn).__name__}"
        )
    # How many values a function will give is known from their weights alone.
    return 1 if value_weights is None else torch.as_tensor(value_weights).shape[-1]


class ValueSource:
    """No values, and the interface of the two kinds; the results are arguments of the op."""

    def step(
        self,
        step: int,
        sequences: Tensor,
        tokens: Tensor | None,
        reference: Tensor | None,
        policies: Sequence[Tensor],
    ) -> dict[str, Any]:
        return {}


class FunctionSource(ValueSource):
    def __init__(self, function: ValueFunction) -> None:
        self.function = function

    def step(self, step: int, sequences: Tensor, *_: Any) -> dict[str, Any]:
        return _named(self.function(step, sequences))


class GuideSource(ValueSource):
    def __init__(self, state: ValueState, vocab_size: int | None) -> None:
        self.state = state
        self.vocab_size = vocab_size

    def step(
        self,
        step: int,
        sequences: Tensor,
        tokens: Tensor | None,
        reference: Tensor | None,
        policies: Sequence[Tensor],
    ) -> dict[str, Any]:
        given = policies if reference is None else [reference, *policies]
        width = self.vocab_size or min(logits.shape[1] for logits in given)
        return _named(self.state.step(tokens, reference, width))


def value_source(
    value_fn: ValueFunction | ValueGuide | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    vocab_size: int | None,
    **running: Any,
) -> ValueSource:
    """The values of one batch of prompts; `running` goes to `ValueGuide.start`."""
    if value_fn is None:
        return ValueSource()
    if isinstance(value_fn, ValueGuide):
        return GuideSource(value_fn.start(input_ids, attention_mask, **running), vocab_size)
    return FunctionSource(value_fn)


def _named(scores: Scores) -> dict[str, Any]:
    if isinstance(scores, tuple):
        return {"values": scores[0], "value_ids": scores[1]}
    return {"values": scores}
