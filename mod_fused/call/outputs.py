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
        logprobs: float32 [B], log pi*(token) before mask, bias, temperature and filters, in
            nats; NaN where invalid.
        valid: bool [B], whether the row's inputs allowed a draw.
        model_logprobs: float32 [B, M+1], each model's own log-probability of the token, reference
            first (M columns without a reference); None unless asked for. Add it to
            `prefix_logprobs` after each token.
        proposal_logprobs: float32 [B], the log of the probability with which the token was drawn,
            after mask, bias, temperature, top-k, top-p and min-p, in nats: `logprobs` where all of
            them are off, 0 at temperature 0; NaN where invalid. None unless asked for.
    """

    tokens: Tensor
    logprobs: Tensor
    valid: Tensor
    model_logprobs: Tensor | None
    proposal_logprobs: Tensor | None = None


#: The fields of a call's `Sample`.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def new_log_probs(mixing: MixtureArguments) -> Tensor:
    """Uninitialised float32 [B, V]."""
    batch = mixing.batch_tensor()
    return batch.new_empty((batch.shape[0], mixing.vocab_size), dtype=torch.float32)


def new_outputs(mixing: MixtureArguments, drawing: DrawArguments) -> Outputs:
    """Uninitialised tensors as in `Sample`; model_logprobs has no columns where it is not asked
    for."""
    batch = mixing.batch_tensor()
    rows = batch.shape[0]
    columns = mixing.model_count() if drawing.return_model_logprobs else 0
    return (
        batch.new_empty((rows,), dtype=torch.int64),
        batch.new_empty((rows,), dtype=torch.float32),
        batch.new_empty((rows,), dtype=torch.bool),
        batch.new_empty((rows, columns), dtype=torch.float32),
        batch.new_empty((rows,), dtype=torch.float32) if drawing.return_proposal_logprobs else None,
    )


def as_sample(outputs: Outputs, drawing: DrawArguments) -> Sample:
    """The outputs of a call as its caller gets them."""
    tokens, logprobs, valid, model_logprobs, proposal_logprobs = outputs
    wanted = model_logprobs if drawing.return_model_logprobs else None
    return Sample(tokens, logprobs, valid, wanted, proposal_logprobs)


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


def check_out(mixing: MixtureArguments, drawing: DrawArguments, out: object) -> Outputs:
    """The tensors of `out` of `sample`, checked."""
    if not isinstance(out, Sample):
        raise TypeError(f"out must be a Sample, got {type(out).__name__}")
    batch = mixing.batch_tensor()
    rows, device = batch.shape[0], batch.device

    def optional(field: str, wanted: bool, symbols: str, shape: tuple[int, ...]) -> Tensor | None:
        given = getattr(out, field)
        if wanted != (given is not None):
            expected, got = ("a tensor", "None") if wanted else ("None", "a tensor")
            raise ValueError(
                f"out.{field} must be {expected} with return_{field}={wanted}, got {got}"
            )
        if not wanted:
            return None
        return _check_output(f"out.{field}", given, torch.float32, device, symbols, shape)

    shape = rows, mixing.model_count()
    model_logprobs = optional("model_logprobs", drawing.return_model_logprobs, "[B, models]", shape)
    proposal_logprobs = optional(
        "proposal_logprobs", drawing.return_proposal_logprobs, "[B]", (rows,)
    )
    return (
        _check_output("out.tokens", out.tokens, torch.int64, device, "[B]", (rows,)),
        _check_output("out.logprobs", out.logprobs, torch.float32, device, "[B]", (rows,)),
        _check_output("out.valid", out.valid, torch.bool, device, "[B]", (rows,)),
        model_logprobs,
        proposal_logprobs,
    )
