"""The bias of a call: checked, and dense whatever form it came in."""

from __future__ import annotations

import torch
from torch import Tensor

from .fields import LOGIT_DTYPES, check_tensor, shape_of


def check_bias(
    bias: object, ids: object, batch: int, vocab_size: int, device: torch.device
) -> Tensor:
    """The bias as a tensor [B, V]. A row whose `ids` are no such list holds NaN."""
    if ids is not None:
        return dense_bias(*check_listed_bias(bias, ids, batch, device), vocab_size)
    shapes = {"[B, V]": [batch, vocab_size], "[V]": [vocab_size]}
    bias = check_tensor("bias", bias, LOGIT_DTYPES, device, shapes)
    if vocab_size > 1 and bias.stride(-1) != 1:
        raise ValueError(
            "bias must be contiguous in the last dimension (stride 1), "
            f"got stride {bias.stride(-1)}"
        )
    return bias.expand(batch, -1)


def check_listed_bias(
    bias: object, ids: object, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The bias of listed tokens [B, K], and their `ids` [B, K], whose range is not looked at."""
    if bias is None:
        raise ValueError("bias_ids needs bias, got bias=None")
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    if bias.dim() not in (1, 2):
        raise ValueError(f"bias must have shape [B, K] or [K] with bias_ids, got {shape_of(bias)}")
    width = bias.shape[-1]
    shapes = {"[B, K]": [batch, width], "[K]": [width]}
    bias = check_tensor("bias", bias, LOGIT_DTYPES, device, shapes)
    like = {"that of bias": shape_of(bias)}
    ids = check_tensor("bias_ids", ids, (torch.int64,), device, like)
    return bias.expand(batch, -1), ids.expand(batch, -1)


def dense_bias(bias: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """bias [B, K] of the tokens `ids` [B, K] as float32 [B, V]; other tokens have 0."""
    inside = (ids >= 0) & (ids < vocab_size)
    ordered = ids.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    bad = (~(inside | (ids == -1))).any(1, keepdim=True) | twice.any(1, keepdim=True)
    # Padding writes to a column that is cut off, a bad row NaN to column 0. Rows stay aligned.
    width = (vocab_size // 16 + 1) * 16
    target = torch.where(bad, 0, torch.where(inside, ids, vocab_size))
    dense = torch.zeros((ids.shape[0], width), dtype=torch.float32, device=ids.device)
    return dense.scatter(1, target, bias.float().masked_fill(bad, torch.nan))[:, :vocab_size]
