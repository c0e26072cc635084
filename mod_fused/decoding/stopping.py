"""What ends responses beside their own tokens: stopping criteria as transformers has them, and a
limit of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call.fields import check_tensor, number

#: `criterion(input_ids, scores)`: which rows end, bool [B] or one bool for all.
StoppingCriterion = Callable[[Tensor, Any], Tensor | bool]


class Stopping:
    """Stopping criteria and a limit of time, whose clock starts here.

    Args:
        criteria: see `generate`.
        max_time: seconds; None: no limit.
    """

    def __init__(
        self, criteria: Sequence[StoppingCriterion] = (), max_time: float | None = None
    ) -> None:
        self._criteria, self._max_time = criteria, max_time
        self._start = time.monotonic()

    @property
    def active(self) -> bool:
        """Whether anything can end a row here."""
        return bool(self._criteria) or self._max_time is not None

    @property
    def timed(self) -> bool:
        """Whether the clock may end a row."""
        limits = (_name(criterion) == "MaxTimeCriteria" for criterion in self._criteria)
        return self._max_time is not None or any(limits)

    def met(self, sequences: Tensor, scores: tuple[Tensor, ...] | None) -> Tensor:
        """Which rows meet a criterion, bool [B], given sequences int64 [B, n + steps]."""
        rows, device = len(sequences), sequences.device
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        for criterion in self._criteria:
            found = criterion(sequences, scores)
            if isinstance(found, Tensor):
                found = check_tensor(
                    f"the result of {_name(criterion)} in stopping_criteria",
                    found.to(device),
                    (torch.bool,),
                    device,
                    {"[B]": [rows], "[]": []},
                )
            elif not isinstance(found, bool):
                raise TypeError(
                    f"{_name(criterion)} in stopping_criteria must return a bool tensor [B], "
                    f"got {type(found).__name__}"
                )
            ended = ended | found
        return ended

    def out_of_time(self) -> bool:
        """Whether more than max_time has passed."""
        return self._max_time is not None and time.monotonic() - self._start > self._max_time


def check_stopping(stopping_criteria: Any, max_time: Any, with_scores: bool) -> Stopping:
    """The arguments of `generate`, checked; `with_scores`: criteria are given scores.

    Raises:
        TypeError, ValueError: for what is no criterion, one that needs scores that it does not get,
            and a time below 0.
    """
    if max_time is not None:
        max_time = number("max_time", max_time)
        if not max_time >= 0.0:
            raise ValueError(f"max_time must be 0 or more seconds, got {max_time}")
    if stopping_criteria is None:
        return Stopping((), max_time)
    # transformers' list of criteria can be called, too.
    is_list = isinstance(stopping_criteria, (list, tuple))
    criteria = list(stopping_criteria) if is_list else [stopping_criteria]
    for criterion in criteria:
        if not callable(criterion):
            raise TypeError(
                "stopping_criteria must be functions (input_ids, scores) -> bool [B], "
                f"got {type(criterion).__name__}"
            )
        if _name(criterion) == "ConfidenceCriteria" and not with_scores:
            raise ValueError("ConfidenceCriteria reads scores: pass output_scores=True")
    return Stopping(criteria, max_time)


def _name(criterion: Any) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)
