"""The outputs of a call: allocated for it, or the caller's, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import DrawArguments, MixtureArguments
from .fields import check_tensor


class Sample(NamedTuple):
    """The result of `sample`, one entry per row.

    Attributes:
        tokens: int64 [B], the drawn ids; 0 where the row is invalid.
        logprobs: float32 [B], log pi*(token) before mask, temperature and filters, in nats; NaN
            where invalid.
        valid: bool [B], whether the row's inputs allowed a draw.
        model_logprobs: float32 [B, M+1], each model's own log-probability of the token, reference
            first (M columns without a reference); None unless asked for. Add it to
            `prefix_logprobs` after each token.
    """

    tokens: Tensor
    logprobs: Tensor
    valid: Tensor
    model_logprobs: Tensor | None


#: tokens, logprobs, valid and model_logprobs of a call, as in `Sample`.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def new_log_probs(mixing: MixtureArguments) -> Tensor:
    """Uninitialised float32 [B, V]."""
    batch = mixing.batch_tensor()
    return batch.new_empty((batch.shape[0], mixing.vocab_size), dtype=torch.float32)


def new_outputs(
    mixing: MixtureArguments, drawing: DrawArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised tensors as in `Sample`; the last has no columns where it is not asked for."""
    batch = mixing.batch_tensor()
    rows = batch.shape[0]
    columns = mixing.model_count() if drawing.return_model_logprobs else 0
    return (
        batch.new_empty((rows,), dtype=torch.int64),
        batch.new_empty((rows,), dtype=torch.float32),
        batch.new_empty((rows,), dtype=torch.bool),
        batch.new_empty((rows, columns), dtype=torch.float32),
    )


def _check_output(
    name: str,
    tensor: object,
    dtype: torch.dtype,
    device: torch.device,
    symbols: str,
    shape: tuple[int, ...],
) -> Tensor:
    tensor = check_tensor(name, tensor, (dtype,), device, {symbols: shape})
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    return tensor


def check_log_probs_out(mixing: MixtureArguments, out: object) -> Tensor:
    """`out` of `log_probs`, checked."""
    batch = mixing.batch_tensor()
    shape = batch.shape[0], mixing.vocab_size
    return _check_output("out", out, torch.float32, batch.device, "[B, V]", shape)


def check_out(
    mixing: MixtureArguments, drawing: DrawArguments, out: object
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors of `out` of `sample`, checked."""
    if not isinstance(out, Sample):
        raise TypeError(f"out must be a Sample, got {type(out).__name__}")
    batch = mixing.batch_tensor()
    rows, device = batch.shape[0], batch.device
    wanted = drawing.return_model_logprobs
    if wanted != (out.model_logprobs is not None):
        expected = "a tensor" if wanted else "None"
        got = "None" if wanted else "a tensor"
        raise ValueError(
            f"out.model_logprobs must be {expected} with return_model_logprobs={wanted}, got {got}"
        )
    model_logprobs = None
    if wanted:
        shape = rows, mixing.model_count()
        model_logprobs = _check_output(
            "out.model_logprobs",
            out.model_logprobs,
            torch.float32,
            device,
            "[B, models]",
            shape,
        )
    return (
        _check_output("out.tokens", out.tokens, torch.int64, device, "[B]", (rows,)),
        _check_output("out.logprobs", out.logprobs, torch.float32, device, "[B]", (rows,)),
        _check_output("out.valid", out.valid, torch.bool, device, "[B]", (rows,)),
        model_logprobs,
    )
