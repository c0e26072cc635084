"""Per-row parameters of a whole response: once to the device, and repeated for copies of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
