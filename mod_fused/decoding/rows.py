"""Per-row parameters: copied to the device once per call, and repeated for copies of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def placed(name: str, value: Any, device: torch.device) -> Any:
    """A per-row parameter as a tensor on the device: a list would be copied at every step."""
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
    if name in ("temperature", "top_p", "min_p", "plausibility") or isinstance(
        value[0], (list, tuple)
    ):
        return torch.tensor(value, dtype=torch.float64, device=device)
    return value


def repeated(name: str, value: Any, copies: int) -> Any:
    """A parameter of `placed`, for `copies` adjacent copies of each row."""
    per_row = 2 if name in ("weights", "value_weights") else 1  # dimensions of a per-row tensor
    if isinstance(value, Tensor) and value.ndim == per_row:
        return value.repeat_interleave(copies, dim=0)
    return value
