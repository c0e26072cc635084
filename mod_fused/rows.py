"""Per-row parameters: a number or a tensor on the way in, a tensor over a chunk of rows on the way
out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def row_scalar(
    given: float | Tensor, rows: slice, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A parameter that is one number, or one per row, for a chunk of b rows: [b] of `dtype`."""
    if isinstance(given, Tensor):
        return given[rows].to(dtype)
    return torch.full((rows.stop - rows.start,), given, dtype=dtype, device=device)


def row_vector(given: tuple[float, ...] | Tensor, rows: slice, device: torch.device) -> Tensor:
    """Weights given as [M], or as [B, M], for a chunk of b rows: float64 [b, M]."""
    chunk = rows.stop - rows.start
    if isinstance(given, Tensor):
        return (given[rows] if given.dim() == 2 else given.expand(chunk, -1)).double()
    # Fills instead of a copy from the host, which a CUDA graph could not capture.
    out = torch.empty((chunk, len(given)), dtype=torch.float64, device=device)
    for i, weight in enumerate(given):
        out[:, i] = weight
    return out


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
