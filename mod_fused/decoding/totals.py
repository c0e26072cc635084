"""`Totals` of the responses so far, and `Resampler`, which reads them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Totals(NamedTuple):
    """Sums over the tokens that this call has drawn, float64, one row per response. A token of an
    invalid step counts for nothing.

    Attributes:
        models: [B, M+1], log-probability of the response so far under each model (its logits times
            its scale), reference first; M columns without a reference.
        proposal: [B], log of the probability with which its tokens were drawn, after mask,
            bias, temperature and filters. What a resample_fn chose before is not part of it.
        values: [B, J], not a sum: the values of the last token of each response, 0 where there is
            none; None without value_fn.
    """

    models: Tensor
    proposal: Tensor
    values: Tensor | None


@runtime_checkable
class Resampler(Protocol):
    """The interface of a resample_fn of `generate` that reads log-probabilities."""

    def resample(
        self, step: int, sequences: Tensor, lengths: Tensor, reasons: Tensor, totals: Totals
    ) -> Tensor | None:
        """The rows to go on with, int64 [B], or None for all of them. See `generate`."""
        ...


def check_resample_fn(resample_fn: Any, streaming: bool) -> None:
    """Refuse what cannot resample, and to take back what a stream has shown.

    Raises:
        TypeError, ValueError: says so.
    """
    if resample_fn is None:
        return
    if not (callable(resample_fn) or isinstance(resample_fn, Resampler)):
        raise TypeError(
            "resample_fn must be a function (step, sequences, lengths, reasons) or have "
            f"resample(), got {type(resample_fn).__name__}"
        )
    if streaming:
        raise ValueError("a streamer cannot take back the tokens that resample_fn drops")
