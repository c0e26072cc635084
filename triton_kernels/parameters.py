"""From the op's arguments to plain data that the kernels read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..divergence import alpha_of


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
    values, weights = mixing.values.float(), mixing.value_weights
    if isinstance(weights, Tensor) or 0.0 in weights:
        # A weight of 0 hides its values, but not which tokens are candidates: one plane more.
        values = torch.cat([values, torch.zeros_like(ids[None], dtype=torch.float32)])
        if isinstance(weights, Tensor):
            weights = torch.cat([weights, torch.ones_like(weights[..., :1])], -1)
        else:
            weights = (*weights, 1.0)
    inside = (ids >= 0) & (ids < vocab)
    dense = values.new_full((*values.shape[:2], vocab + 1), -torch.inf)
    dense.scatter_(2, torch.where(inside, ids, vocab).expand(values.shape), values)
    mixing = mixing._replace(values=dense[:, :, :vocab], value_ids=None, value_weights=weights)
    return mixing, ~(inside | (ids == -1)).all(1)


def _weights(given: tuple[float, ...] | Tensor) -> tuple[tuple[float, ...], Tensor | None]:
    """Numbers for the launch, and the pointer that counts where it is given."""
    return ((0.0,), given) if isinstance(given, Tensor) else (given or (0.0,), None)


def mixing_of(mixing: MixtureArguments) -> Mixing:
    """The distribution's part; `mixing` is `dense`."""
    divergence, logits, values = mixing.divergence, mixing.tensors(), mixing.values
    weights, weights_pointer = _weights(mixing.weights)
    value_weights, value_weights_pointer = _weights(mixing.value_weights)
    return Mixing(
        logits=tuple(logits),
        strides=tuple(x.stride(0) for x in logits),
        scales=mixing.logit_scales or None,
        weights=weights,
        weights_pointer=weights_pointer,
        weights_strides=_strides(weights_pointer, 2),
        reference_weight=1.0 - sum(weights),
        scores=values,
        value_strides=(0, 0) if values is None else (values.stride(0), values.stride(1)),
        value_weights=value_weights,
        value_weights_pointer=value_weights_pointer,
        value_weights_strides=_strides(value_weights_pointer, 2),
        prefix=mixing.prefix_logprobs,
        prefix_strides=_strides(mixing.prefix_logprobs, 2),
        vocab=mixing.vocab_size,
        log_plausibility=math.log(mixing.plausibility) if mixing.plausibility > 0.0 else 0.0,
        alpha=alpha_of(divergence),
        supremum=divergence.supremum if math.isfinite(divergence.supremum) else 0.0,
    )


def drawing_of(
    drawing: DrawArguments, outputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> Drawing:
    """The draw's part, for `outputs` as in `mod_fused.Sample`."""
    fields: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"):
        given = getattr(drawing, name)
        if isinstance(given, Tensor):
            fields[f"{name}_pointer"] = given
            fields[f"{name}_stride"] = given.stride(0)
        elif name in Drawing._fields:
            fields[name] = given
    mask = drawing.mask
    tokens, logprobs, valid, model_logprobs = outputs
    return Drawing(
        **fields,
        mask=mask.view(torch.int8) if mask is not None and mask.dtype == torch.bool else mask,
        mask_strides=_strides(mask, 2),
        tokens=tokens,
        logprobs=logprobs,
        valid=valid.view(torch.int8),
        model_logprobs=model_logprobs,
    )
