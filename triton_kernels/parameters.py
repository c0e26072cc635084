"""From the op's arguments to plain data that the kernels read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import DrawArguments, MixtureArguments
from ..divergence import get_divergence


class Mixing(NamedTuple):
    """The distribution, as the kernels read it. Pointers are tensors or None."""

    logits: tuple[Tensor, ...]  # reference first
    strides: tuple[int, ...]
    scales: tuple[float, ...] | None
    weights: tuple[float, ...]  # of the policies; read where weights_pointer is None
    weights_pointer: Tensor | None
    weights_strides: tuple[int, int]  # row (0: one for all), policy
    reference_weight: float  # 1 - sum w
    scores: Tensor | None  # [J, B, V]
    value_strides: tuple[int, int]  # J, B
    value_weights: tuple[float, ...]
    value_weights_pointer: Tensor | None
    value_weights_strides: tuple[int, int]
    prefix: Tensor | None
    prefix_strides: tuple[int, int]
    vocab: int
    log_plausibility: float
    alpha: float
    supremum: float  # sup f'; 0 where it is infinite


class Drawing(NamedTuple):
    """What is done with it, and the outputs. A parameter of a row is a number, or where its pointer
    is given the tensor's entry; `top_k`, `position` and `seed` of a launch are the kernels' own
    arguments: they change from call to call, and nothing is compiled for each."""

    temperature: float = 1.0
    temperature_pointer: Tensor | None = None
    temperature_stride: int = 0
    top_k_pointer: Tensor | None = None
    top_k_stride: int = 0
    top_p: float = 1.0
    top_p_pointer: Tensor | None = None
    top_p_stride: int = 0
    min_p: float = 0.0
    min_p_pointer: Tensor | None = None
    min_p_stride: int = 0
    mask: Tensor | None = None
    mask_strides: tuple[int, int] = (0, 0)
    seed_pointer: Tensor | None = None
    seed_stride: int = 0
    position_pointer: Tensor | None = None
    position_stride: int = 0
    tokens: Tensor | None = None
    logprobs: Tensor | None = None
    valid: Tensor | None = None
    model_logprobs: Tensor | None = None


#: The parameters of a row, and what numbers that differ from row to row become.
_ROW_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float32,
    "position": torch.int64,
}


def _strides(tensor: Tensor | None, rank: int) -> tuple[int, int]:
    """Row and column strides of [n] (rank 1 stored for every row) or [B, n]."""
    if tensor is None:
        return 0, 0
    return (0, tensor.stride(0)) if tensor.dim() < rank else (tensor.stride(0), tensor.stride(1))


def dense(mixing: MixtureArguments) -> tuple[MixtureArguments, Tensor | None]:
    """With candidates' values as [J, B, V], -inf for every other token, and the rows with bad
    ids."""
    if mixing.values is None or mixing.value_ids is None:
        return mixing, None
    ids, vocab = mixing.value_ids, mixing.vocab_size
    values = mixing.values.float()
    weights, tensor = mixing.value_weights, mixing.value_weights_tensor
    if 0.0 in weights or not weights:
        # A weight of 0 hides its values, but not which tokens are candidates: one plane more.
        count = values.shape[0]
        values = torch.cat([values, torch.zeros_like(ids[None], dtype=torch.float32)])
        rows = [weights[i : i + count] for i in range(0, len(weights), max(1, count))]
        weights = [v for row in rows for v in (*row, 1.0)]
        if tensor is not None:
            tensor = torch.cat([tensor, torch.ones_like(tensor[..., :1])], -1)
    inside = (ids >= 0) & (ids < vocab)
    dense = values.new_full((*values.shape[:2], vocab + 1), -torch.inf)
    dense.scatter_(2, torch.where(inside, ids, vocab).expand(values.shape), values)
    mixing = mixing._replace(
        values=dense[:, :, :vocab],
        value_ids=None,
        value_weights=weights,
        value_weights_tensor=tensor,
    )
    return mixing, ~(inside | (ids == -1)).all(1)


def _per_row(host: list[float], tensor: Tensor | None, count: int, like: Tensor) -> Tensor | None:
    """The tensor of some weights; numbers that differ from row to row become one."""
    if tensor is None and len(host) > count:
        tensor = torch.tensor(host, dtype=torch.float64, device=like.device).view(-1, count)
    return tensor


def mixing_of(mixing: MixtureArguments) -> Mixing:
    """The distribution's part; `mixing` is `dense`."""
    divergence = get_divergence(mixing.divergence)
    logits, values = mixing.tensors(), mixing.values
    weights = _per_row(mixing.weights, mixing.weights_tensor, len(mixing.policy_logits), logits[0])
    value_weights = _per_row(
        mixing.value_weights,
        mixing.value_weights_tensor,
        0 if values is None else values.shape[0],
        logits[0],
    )
    supremum = getattr(divergence, "supremum", 0.0)
    return Mixing(
        logits=tuple(logits),
        strides=tuple(x.stride(0) for x in logits),
        scales=tuple(mixing.logit_scales) or None,
        weights=tuple(mixing.weights) or (0.0,),
        weights_pointer=weights,
        weights_strides=_strides(weights, 2),
        reference_weight=1.0 - sum(mixing.weights),
        scores=values,
        value_strides=(0, 0) if values is None else (values.stride(0), values.stride(1)),
        value_weights=tuple(mixing.value_weights) or (0.0,),
        value_weights_pointer=value_weights,
        value_weights_strides=_strides(value_weights, 2),
        prefix=mixing.prefix_logprobs,
        prefix_strides=_strides(mixing.prefix_logprobs, 2),
        vocab=mixing.vocab_size,
        log_plausibility=math.log(mixing.plausibility) if mixing.plausibility > 0.0 else 0.0,
        alpha=getattr(divergence, "alpha", 1.0),
        supremum=supremum if math.isfinite(supremum) else 0.0,
    )


def drawing_of(
    drawing: DrawArguments, like: Tensor, outputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> Drawing:
    """The draw's part, for `outputs` as in `mod_fused.Sample`; `like` names the device."""
    fields: dict[str, Any] = {}
    for name, dtype in _ROW_DTYPES.items():
        host, tensor = getattr(drawing, name), getattr(drawing, f"{name}_tensor")
        if tensor is None and len(host) > 1:
            tensor = torch.tensor(host, dtype=dtype, device=like.device)
        if name in Drawing._fields:
            fields[name] = host[0]
        fields[f"{name}_pointer"] = tensor
        fields[f"{name}_stride"] = 0 if tensor is None else tensor.stride(0)
    mask, seeds = drawing.mask, drawing.seed_tensor
    tokens, logprobs, valid, model_logprobs = outputs
    return Drawing(
        **fields,
        mask=mask.view(torch.int8) if mask is not None and mask.dtype == torch.bool else mask,
        mask_strides=_strides(mask, 2),
        seed_pointer=seeds,
        seed_stride=0 if seeds is None else seeds.stride(0),
        tokens=tokens,
        logprobs=logprobs,
        valid=valid.view(torch.int8),
        model_logprobs=model_logprobs,
    )
