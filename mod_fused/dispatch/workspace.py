"""The memory of a call: the size of its workspace, and the checks of what the caller gives."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.fields import number
from ..call.outputs import Outputs, Sample, check_out, new_outputs

#: A workspace begins at a multiple of so many bytes.
ALIGNMENT = 16
_TRITON = importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # not to be traced: it imports triton
def _workspace_bytes(rows: int, vocab_size: int, models: int, filters: bool) -> int:
    if not _TRITON:
        return 0
    from ..triton_kernels.workspace import workspace_bytes

    return workspace_bytes(rows, vocab_size, models, filters)


def _check_vector(workspace: object, expected: str) -> Tensor:
    """A contiguous uint8 vector; `expected` begins the message of an error."""
    if not isinstance(workspace, Tensor):
        raise TypeError(f"workspace must be a tensor, got {type(workspace).__name__}")
    if workspace.dtype != torch.uint8:
        raise TypeError(f"{expected}, got {workspace.dtype}")
    if workspace.dim() != 1 or not workspace.is_contiguous():
        raise ValueError(
            f"{expected}, got shape {list(workspace.shape)}, strides {list(workspace.stride())}"
        )
    return workspace


def check_workspace(mixing: MixtureArguments, filters: bool, workspace: object) -> Tensor:
    """The caller's `workspace`, checked; a call with `filters` needs a larger one."""
    batch = mixing.batch_tensor()
    needed = _workspace_bytes(batch.shape[0], mixing.vocab_size, mixing.model_count(), filters)
    expected = f"workspace must be a contiguous uint8 vector of at least {needed} bytes"
    workspace = _check_vector(workspace, expected)
    if workspace.device != batch.device:
        raise ValueError(f"{expected} on {batch.device} like the logits, got {workspace.device}")
    if workspace.numel() < needed:
        raise ValueError(f"{expected}, got {workspace.numel()}")
    # Dynamo cannot trace the offset. In compiled code Triton looks at the alignment itself.
    if not torch.compiler.is_compiling() and workspace.storage_offset() % ALIGNMENT:
        raise ValueError(
            f"{expected} that begins at a multiple of {ALIGNMENT}, "
            f"got a view from byte {workspace.storage_offset()} on"
        )
    return workspace


def new_workspace(mixing: MixtureArguments, filters: bool) -> Tensor:
    """A workspace as `check_workspace` wants it."""
    batch = mixing.batch_tensor()
    size = _workspace_bytes(batch.shape[0], mixing.vocab_size, mixing.model_count(), filters)
    return torch.zeros(size, dtype=torch.uint8, device=batch.device)


def check_memory(
    mixing: MixtureArguments, drawing: DrawArguments, out: Sample | None, workspace: Tensor | None
) -> tuple[Outputs, Tensor | None]:
    """The outputs and the workspace of a call of `sample`: the caller's, checked, or new outputs
    and no workspace."""
    if workspace is not None:
        workspace = check_workspace(mixing, drawing.needs_keys(), workspace)
    outputs = new_outputs(mixing, drawing) if out is None else check_out(mixing, drawing, out)
    return outputs, workspace


def workspace_size(batch: int, vocab_size: int, policies: int = 2, *, filters: bool = True) -> int:
    """Bytes of a `workspace` for every call of `sample` and `log_probs`, of any divergence, with at
    most so many rows, token ids and policies.

    It does not cover `bias` with `bias_ids`, which becomes float32 [B, V] that torch allocates.

    Args:
        batch: B, the most rows of a call.
        vocab_size: V, the most token ids.
        policies: M, the most policies; room for a reference model is included.
        filters: whether calls may have a bias, top-k, top-p or min-p: they need about 4.5 B V bytes
            more, for a float32 of each token and of every 8 tokens, and 4 bytes more of each of at
            most 4096 tokens.

    Returns:
        The bytes; 0 where triton is not installed: the other backends need no workspace.

    Raises:
        ValueError: negative numbers, or no token ids.
        TypeError: an argument that is not an integer.
    """
    sizes = {"batch": batch, "vocab_size": vocab_size, "policies": policies}
    for name, size in sizes.items():
        least = int(name == "vocab_size")
        if number(name, size, int) < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    return _workspace_bytes(batch, vocab_size, policies + 1, filters)


def reset_workspace(workspace: Tensor) -> None:
    """Zero the counters at the beginning of a workspace, on the current stream of its device, as
    its owner did at first.

    Needed where the workspace was never zeroed, or a launch on it was stopped or overlapped
    another: rows of the calls that use it are invalid until then. Reverse KL without plausibility
    does not see every launch that was stopped or overlapped.

    Args:
        workspace: uint8 vector as in `sample`; no launch may be using it.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: not a contiguous vector.
    """
    _check_vector(workspace, "workspace must be a contiguous uint8 vector")
    if _TRITON:
        from ..triton_kernels.workspace import counter_bytes

        workspace[: counter_bytes(workspace)].zero_()
