"""Per-row parameters: a number, a list or a tensor on the way in, a tensor over a chunk of rows on
the way out."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scalar(
    host: list[float] | list[int],
    tensor: Tensor | None,
    rows: slice,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """A parameter that is one number or one per row, for a chunk of b rows: [b] of `dtype`."""
    if tensor is not None:
        return tensor[rows].to(dtype)
    if len(host) == 1:
        return torch.full((rows.stop - rows.start,), host[0], dtype=dtype, device=device)
    return torch.tensor(host[rows], dtype=dtype, device=device)


def row_vector(
    host: list[float], tensor: Tensor | None, count: int, rows: slice, device: torch.device
) -> Tensor:
    """Weights given as [M], or as [B, M] (flat on the host), for a chunk of b rows: float64 [b,
    M]."""
    chunk = rows.stop - rows.start
    if tensor is not None:
        return (tensor[rows] if tensor.dim() == 2 else tensor.expand(chunk, count)).double()
    if len(host) == count:
        # Fills instead of a copy from the host, which a CUDA graph could not capture.
        out = torch.empty((chunk, count), dtype=torch.float64, device=device)
        for i, weight in enumerate(host):
            out[:, i] = weight
        return out
    return torch.tensor(host, dtype=torch.float64, device=device).view(-1, count)[rows]
