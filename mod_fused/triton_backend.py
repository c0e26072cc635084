"""The Triton backend: whether its kernels can run here, and the ops' implementations."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .arguments import unpack
from .dispatch import AVAILABLE, INTERPRETED


def status() -> str:
    """`AVAILABLE`, or why this backend cannot run."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return AVAILABLE


def log_probs(
    tensors: list[Tensor], integers: list[int], numbers: list[float], divergence: str
) -> Tensor:
    """Implementation of `torch.ops.mod_fused.log_probs_triton`; see `arguments.pack`."""
    from .triton_kernels import launch

    mixing, _ = unpack(tensors, integers, numbers, divergence)
    return launch.log_probs(mixing)


def sample(
    tensors: list[Tensor], integers: list[int], numbers: list[float], divergence: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implementation of `torch.ops.mod_fused.sample_triton`; see `arguments.pack`."""
    from .triton_kernels import launch

    mixing, drawing = unpack(tensors, integers, numbers, divergence)
    assert drawing is not None
    return launch.sample(mixing, drawing)


def log_probs_out(
    tensors: list[Tensor],
    integers: list[int],
    numbers: list[float],
    divergence: str,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """Implementation of `torch.ops.mod_fused.log_probs_triton_out`."""
    from .triton_kernels import launch

    mixing, _ = unpack(tensors, integers, numbers, divergence)
    launch.log_probs_out(mixing, out, workspace)


def sample_out(
    tensors: list[Tensor],
    integers: list[int],
    numbers: list[float],
    divergence: str,
    tokens: Tensor,
    logprobs: Tensor,
    valid: Tensor,
    model_logprobs: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """Implementation of `torch.ops.mod_fused.sample_triton_out`."""
    from .triton_kernels import launch

    mixing, drawing = unpack(tensors, integers, numbers, divergence)
    assert drawing is not None
    launch.sample_out(mixing, drawing, (tokens, logprobs, valid, model_logprobs), workspace)
