"""The Triton backend: whether its kernels can run here, and the ops' implementations."""

from __future__ import annotations

import importlib.util
from typing import Any

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


def log_probs(*packed: Any) -> Tensor:
    """Implementation of `torch.ops.mod_fused.log_probs_triton`; see `arguments.pack`."""
    from .triton_kernels import launch

    mixing, _ = unpack(*packed)
    return launch.log_probs(mixing)


def sample(*packed: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implementation of `torch.ops.mod_fused.sample_triton`; see `arguments.pack`."""
    from .triton_kernels import launch

    mixing, drawing = unpack(*packed)
    assert drawing is not None
    return launch.sample(mixing, drawing)


def log_probs_out(*arguments: Any) -> None:
    """Implementation of `torch.ops.mod_fused.log_probs_triton_out`."""
    from .triton_kernels import launch

    *packed, out, workspace = arguments
    mixing, _ = unpack(*packed)
    launch.log_probs_out(mixing, out, workspace)


def sample_out(*arguments: Any) -> None:
    """Implementation of `torch.ops.mod_fused.sample_triton_out`."""
    from .triton_kernels import launch

    packed, (*outputs, workspace) = arguments[:4], arguments[4:]
    mixing, drawing = unpack(*packed)
    assert drawing is not None
    launch.sample_out(mixing, drawing, tuple(outputs), workspace)
