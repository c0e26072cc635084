"""Per-row parameters: a number, a list or a tensor on the way in, a tensor over a chunk of rows on
the way out."""

from __future__ import annotations

from typing import Any

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


def placed(name: str, value: Any, device: torch.device) -> Any:
    """A parameter with one entry per row on the device: as a list it would be copied every step."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not isinstance(value, (list, tuple)) or not value:
        return value
    if name == "seed":
        signed = [x - 2**64 if x >= 2**63 else x for x in value]  # int64 of the same 64 bits
        return torch.tensor(signed, dtype=torch.int64, device=device)
    if name == "top_k":
        fitting = [min(k, 2**63 - 1) for k in value]  # any integer, however large, is fine
        return torch.tensor(fitting, dtype=torch.int64, device=device)
    if name in ("temperature", "top_p", "min_p") or isinstance(value[0], (list, tuple)):
        return torch.tensor(value, dtype=torch.float64, device=device)
    return value


def repeated(name: str, value: Any, copies: int) -> Any:
    """A placed parameter for `copies` copies of each row, next to each other."""
    per_row = 2 if name in ("weights", "value_weights") else 1  # dimensions, where rows differ
    if isinstance(value, Tensor) and value.ndim == per_row:
        return value.repeat_interleave(copies, dim=0)
    return value
