"""What a call writes to: outputs and a workspace, allocated for it or its caller's own."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import DrawArguments, MixtureArguments
from .check_helpers import check_tensor, number

#: Bytes: a workspace begins at a multiple.
ALIGNMENT = 16
_TRITON = importlib.util.find_spec("triton") is not None


class Sample(NamedTuple):
    """What `sample` returns, one entry a row.

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


@torch.compiler.assume_constant_result  # not to be traced: it imports triton
def _workspace_bytes(rows: int, vocab_size: int, models: int, filters: bool) -> int:
    if not _TRITON:
        return 0
    from .triton_kernels.workspace import workspace_bytes

    return workspace_bytes(rows, vocab_size, models, filters)


def check_workspace(mixing: MixtureArguments, filters: bool, workspace: object) -> Tensor:
    """`workspace` of a call, with `filters` or not, checked."""
    batch = mixing.batch_tensor()
    if not isinstance(workspace, Tensor):
        raise TypeError(f"workspace must be a tensor, got {type(workspace).__name__}")
    needed = _workspace_bytes(batch.shape[0], mixing.vocab_size, mixing.model_count(), filters)
    expected = f"workspace must be a contiguous uint8 vector of at least {needed} bytes"
    if workspace.dtype != torch.uint8:
        raise TypeError(f"{expected}, got {workspace.dtype}")
    if workspace.device != batch.device:
        raise ValueError(f"{expected} on {batch.device} like the logits, got {workspace.device}")
    if workspace.dim() != 1 or not workspace.is_contiguous():
        raise ValueError(
            f"{expected}, got shape {list(workspace.shape)}, strides {list(workspace.stride())}"
        )
    if workspace.numel() < needed:
        raise ValueError(f"{expected}, got {workspace.numel()}")
    # Dynamo cannot trace the offset. In compiled code Triton sees for itself what it may assume.
    if not torch.compiler.is_compiling() and workspace.storage_offset() % ALIGNMENT:
        raise ValueError(
            f"{expected} that begins at a multiple of {ALIGNMENT}, "
            f"got a view from byte {workspace.storage_offset()} on"
        )
    return workspace


def workspace_size(batch: int, vocab_size: int, policies: int = 2, *, filters: bool = True) -> int:
    """Bytes of a `workspace` that is large enough for every call of `sample` and `log_probs`, of
    any divergence, with at most so many rows, token ids and policies.

    Not covered are candidates: `values` with `value_ids` become [J, B, V] float32, which torch's
    allocator provides.

    Args:
        batch: B, the most rows of a call.
        vocab_size: V, the most token ids.
        policies: M, the most policies; a reference model beside them is covered.
        filters: also for calls with top-k, top-p or min-p, which need 4 B V bytes for keys.

    Returns:
        The bytes; 0 where triton is not installed: the other backends need no workspace.

    Raises:
        ValueError: negative numbers, or no token ids.
        TypeError: what is not an integer.
    """
    sizes = {"batch": batch, "vocab_size": vocab_size, "policies": policies}
    for name, size in sizes.items():
        least = int(name == "vocab_size")
        if number(name, size, int) < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    return _workspace_bytes(batch, vocab_size, policies + 1, filters)
