"""The source of a decode's value scores: a function, or a guide that keeps state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..divergence import Divergence
from ..ops import log_probs

Scores = Tensor | tuple[Tensor, Tensor]  # values [J, B, V], or (values [J, B, K], ids [B, K])
ValueFunction = Callable[[int, Tensor], Scores]


class ValueState(Protocol):
    """One batch of a `ValueGuide` in progress."""

    def step(self, tokens: Tensor | None, reference: Tensor | None, vocab_size: int) -> Scores:
        """The scores of the tokens that may come next.

        Args:
            tokens: int64 [B], drawn last; None at the first step.
            reference: the reference's logits [B, V_0] of this step, None if there is no reference;
                also with one_head, which takes no guide that reads them.
            vocab_size: V, how many tokens take part.
        """
        ...

    def fork(self, copies: int) -> None:
        """Let each row go on as `copies` adjacent rows once its prompt has been read. Called before
        the first step, whose reference logits already have the copies' rows."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [N]; each may occur any number of times."""
        ...


@runtime_checkable
class ValueGuide(Protocol):
    """The interface of a value_fn of `generate` that keeps state from step to step. With an
    attribute `reads_reference` that is False it may get other logits in place of the reference's,
    where that need not run."""

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


@runtime_checkable
class ValueWeighting(Protocol):
    """The interface of value_weights of `generate` that are chosen at each step."""

    def check(self, divergence: str | Divergence, num_values: int) -> None:
        """Raise ValueError for a divergence or a number of values that cannot be weighed."""
        ...

    def weigh(self, log_p: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [B, J] of a step, and the values to use with them.

        Args:
            log_p: float32 [B, K], log-probability of each candidate before the values; NaN
                throughout an invalid row, -inf for padding.
            values: [J, B, K], of the candidates; K = V without value_ids.
        """
        ...


def weighed(
    weighting: ValueWeighting,
    reference: Tensor | None,
    policies: Sequence[Tensor],
    given: dict[str, Any],
    mixing: dict[str, Any],
) -> dict[str, Any]:
    """The values and value_weights of a step.

    Args:
        weighting: chooses them.
        reference: its logits [B, V_0], or None.
        policies: logits [B, V_i] of each.
        given: what `ValueSource.step` returned.
        mixing: the other options of `mod_fused.log_probs`.
    """
    values, ids = given["values"], given.get("value_ids")
    count = len(values) if isinstance(values, Tensor) and values.ndim else 1
    # Values of weight 0 only say which tokens are candidates.
    log_p = log_probs(reference, policies, **mixing, **given, value_weights=[0.0] * count)
    if ids is not None:
        log_p = log_p.gather(1, ids.clamp(0, log_p.shape[1] - 1)).masked_fill(ids < 0, -torch.inf)
    weights, values = weighting.weigh(log_p, values)
    return {"value_weights": weights, "values": values}


def values_of(tokens: Tensor, given: dict[str, Any]) -> Tensor | None:
    """The values of one token per row, int64 [B], picked from what `ValueSource.step` returned:
    float64 [B, J]; None without values."""
    if (values := given.get("values")) is None:
        return None
    place = tokens[:, None]
    if (ids := given.get("value_ids")) is not None:
        place = (ids == place).byte().argmax(1, keepdim=True)
    return values.gather(2, place.expand(len(values), -1, -1))[..., 0].T.double()


def value_count(value_fn: ValueFunction | ValueGuide | None, value_weights: Any) -> int:
    """J, or what is known of it before anything runs; 0 without values."""
    if value_fn is None:
        return 0
    if isinstance(value_fn, ValueGuide):
        return value_fn.num_values
    if not callable(value_fn):
        raise TypeError(
            "value_fn must be a function (step, sequences) or have start() and num_values, "
            f"got {type(value_fn).__name__}"
        )
    # A function has not run yet: only the weights tell how many values it will give.
    if isinstance(value_weights, Tensor):
        return value_weights.shape[-1] if value_weights.ndim else 1
    row = value_weights
    while isinstance(row, list) and row and isinstance(row[0], list):
        row = row[0]
    return max(1, len(row)) if isinstance(row, list) else 1


class ValueSource:
    """The values of one decode, from a function, a guide or none. Made by `value_source`."""

    def __init__(
        self,
        function: ValueFunction | None = None,
        state: ValueState | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._function, self._state, self._vocab_size = function, state, vocab_size

    def step(
        self,
        step: int,
        sequences: Tensor,
        tokens: Tensor | None,
        reference: Tensor | None,
        policies: Sequence[Tensor],
    ) -> dict[str, Any]:
        """The values and value_ids of `mod_fused.sample`; empty without values."""
        if self._state is not None:
            given = policies if reference is None else [reference, *policies]
            width = min(x.shape[1] for x in given) if self._vocab_size is None else self._vocab_size
            return _named(self._state.step(tokens, reference, width))
        return {} if self._function is None else _named(self._function(step, sequences))

    def fork(self, copies: int) -> None:
        """See `ValueState.fork`. A function keeps nothing from step to step."""
        if self._state is not None:
            self._state.fork(copies)

    def select(self, rows: Tensor) -> None:
        """See `ValueState.select`."""
        if self._state is not None:
            self._state.select(rows)


def value_source(
    value_fn: ValueFunction | ValueGuide | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    vocab_size: int | None,
    has_reference: bool,
    **running: Any,
) -> ValueSource:
    """Start the values of a decode of prompts [B, n]; `running` goes to `ValueGuide.start`."""
    if not isinstance(value_fn, ValueGuide):
        return ValueSource(value_fn)
    state = value_fn.start(input_ids, attention_mask, has_reference=has_reference, **running)
    return ValueSource(state=state, vocab_size=vocab_size)


def _named(scores: Scores) -> dict[str, Any]:
    if isinstance(scores, tuple):
        return {"values": scores[0], "value_ids": scores[1]}
    return {"values": scores}
