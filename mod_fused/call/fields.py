"""Checks of one tensor, one number, one per-row parameter; `checks.py` combines them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64)
_INTS = (torch.int64, torch.int32)


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _describe(shapes: Mapping[str, Sequence[int]]) -> str:
    # Call it for an error only: under torch.compile it would make the sizes constants.
    return " or ".join(f"{symbols} = {list(sizes)}" for symbols, sizes in shapes.items())


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(
    name: str,
    tensor: object,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    shapes: Mapping[str, Sequence[int]],
) -> Tensor:
    """The tensor detached, once its dtype, device and shape have been checked."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the logits, got {tensor.device}")
    if not any(tensor.shape == torch.Size(s) for s in shapes.values()):
        raise ValueError(f"{name} must have shape {_describe(shapes)}, got {shape_of(tensor)}")
    return tensor.detach() if tensor.requires_grad else tensor


def check_logits(
    name: str, logits: object, rows: int | None, device: torch.device | None
) -> tuple[Tensor, torch.Size]:
    """The checked logits, detached, and their shape. `rows` and `device` are those of the logits
    checked before; None for the first."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be {_names(LOGIT_DTYPES)}, got {logits.dtype}")
    shape = logits.shape
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"{name} must have shape [B, V] with V >= 1, got {shape_of(logits)}")
    if not logits.is_contiguous() and logits.stride(1) != 1 and shape[1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got stride "
            f"{logits.stride(1)}"
        )
    if rows is not None:
        if shape[0] != rows:
            raise ValueError(
                f"{name} must have as many rows as the other logits ({rows}), got {shape[0]}"
            )
        if logits.device != device:
            raise ValueError(
                f"{name} must be on {device} like the other logits, got {logits.device}"
            )
    return (logits.detach() if logits.requires_grad else logits), shape


def number(name: str, x: object, kind: type = float) -> Any:
    """x as a float or an int (`kind`); x may be Python's, NumPy's or a traced number."""
    if type(x) is kind:  # the usual case: faster than isinstance of an abstract class
        return x
    if isinstance(x, np.ndarray) and x.ndim == 0:
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if kind is int:
        if not isinstance(x, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name} must be an integer, got {type(x).__name__} {x}")
        return int(x)
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer beyond float64") from None


def row_parameter(
    name: str,
    given: object,
    off: float | int,
    batch: int,
    device: torch.device,
    good: Callable[[Any], bool],
    expected: str,
    kind: type = float,
) -> Any:
    """One number, or one per row as a tensor [B]. A tensor [] is expanded to all rows."""
    if given is None:
        return off
    if type(given) is kind and good(given):
        return given
    if isinstance(given, Tensor):
        dtypes = FLOATS if kind is float else _INTS
        tensor = check_tensor(name, given, dtypes, device, {"[]": [], "[B]": [batch]})
        return tensor.expand(batch) if tensor.dim() == 0 else tensor
    given = given.tolist() if isinstance(given, np.ndarray) else given
    if isinstance(given, (list, tuple)):
        if len(given) != batch:
            raise ValueError(f"{name} must be one number or B = {batch} of them, got {len(given)}")
        host = [number(f"{name}[{i}]", x, kind) for i, x in enumerate(given)]
    else:
        host = [number(name, given, kind)]
    for x in host:
        if not good(x):
            raise ValueError(f"{name} must be {expected}, got {x}")
    if kind is int:
        host = [min(x, 2**63 - 1) for x in host]  # any top_k, however large, is fine
    if len(host) == 1:
        return host[0]
    return on_device(name, host, torch.float64 if kind is float else torch.int64, device)


def on_device(name: str, host: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list of numbers by row as a tensor, with one copy to the device."""
    capturing = device.type == "cuda" and not torch.compiler.is_compiling()
    if capturing and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{name} by row must be a tensor on {device} while a CUDA graph is captured, got a list"
        )
    if any_symbol(host):
        return tensor_of(host, dtype, device)
    return torch.tensor(host, dtype=dtype, device=device)


def weights_of(
    name: str, given: object, count: int, batch: int, device: torch.device
) -> tuple[float, ...] | Tensor:
    """Weights [count] as numbers or a tensor, [B, count] as a tensor."""
    if type(given) is list and len(given) == count:  # the usual case
        for x in given:
            if type(x) is not float or not is_finite(x):
                break
        else:
            return tuple(given)
    shapes: Mapping[str, Sequence[int]] = {f"[{count}]": [count], f"[B, {count}]": [batch, count]}
    if isinstance(given, Tensor):
        return check_tensor(name, given, FLOATS, device, shapes)
    given = given.tolist() if isinstance(given, np.ndarray) else given
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{name} must be a list of numbers or a tensor of shape {_describe(shapes)}, "
            f"got {type(given).__name__}"
        )
    rows = [row.tolist() if isinstance(row, np.ndarray) else row for row in given]
    by_row = all(isinstance(row, (list, tuple)) for row in rows) and (bool(rows) or batch == 0)
    if by_row and (len(rows) != batch or any(len(row) != count for row in rows)):
        lengths = sorted({len(row) for row in rows})
        raise ValueError(
            f"{name} must have shape {_describe(shapes)}, got {len(rows)} rows of {lengths} numbers"
        )
    if not by_row and len(rows) != count:
        raise ValueError(f"{name} must have shape {_describe(shapes)}, got {len(rows)} numbers")
    host = [number(name, x) for row in (rows if by_row else [rows]) for x in row]
    for x in host:
        if not is_finite(x):
            raise ValueError(f"{name} must be finite, got {x}")
    if not by_row or batch == 1:
        return tuple(host)
    return on_device(name, host, torch.float64, device).view(batch, count)


def is_finite(x: float) -> bool:
    """Like math.isfinite, which cannot be traced."""
    return -math.inf < x < math.inf


def any_symbol(numbers: Sequence[Any]) -> bool:
    """Whether torch.compile traces and one of the numbers is a symbol, not a constant."""
    return torch.compiler.is_compiling() and not all([has_static_value(x) for x in numbers])


def tensor_of(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers [N], symbols or not, as a tensor."""
    # Multiply: torch.full and torch.tensor would make a constant of a traced float.
    one = torch.ones((), dtype=dtype, device=device)
    return torch.stack([one * x for x in numbers])
