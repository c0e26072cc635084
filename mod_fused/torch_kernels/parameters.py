"""Per-row parameters, a number or a tensor, as a tensor over a chunk of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_scalar(
    given: float | Tensor, rows: slice, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A parameter that is one number, or one per row, for a chunk of b rows: [b] of `dtype`."""
    if isinstance(given, Tensor):
        return given[rows].to(dtype)
    return torch.full((rows.stop - rows.start,), given, dtype=dtype, device=device)


def row_vector(given: Sequence[float] | Tensor, rows: slice, device: torch.device) -> Tensor:
    """Weights given as [M], or as [B, M], for a chunk of b rows: float64 [b, M]."""
    chunk = rows.stop - rows.start
    if isinstance(given, Tensor):
        return (given[rows] if given.dim() == 2 else given.expand(chunk, -1)).double()
    # Fills instead of a copy from the host, which a CUDA graph could not capture.
    out = torch.empty((chunk, len(given)), dtype=torch.float64, device=device)
    for i, weight in enumerate(given):
        out[:, i] = weight
    return out
