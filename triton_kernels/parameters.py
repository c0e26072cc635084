"""The records that the kernels get, made from a call's arguments, and the device functions that
read a row's weights, temperature, mask and seed from them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.outputs import Outputs
from ..divergence import alpha_of
from .constants import FLOAT32_ROUNDING, INFINITY, SMALLEST_WEIGHT, WEIGHT_ROUNDING
from .divergences import device_functions
from .elementary import split_mix


class Mixing(NamedTuple):
    """The record of the distribution. Pointers are tensors or None."""

    logits: tuple[Tensor, ...]  # reference first
    strides: tuple[int, ...]
    scales: tuple[float, ...] | None
    weights: tuple[float, ...]  # of the policies; read where weights_pointer is None
    weights_pointer: Tensor | None
    weights_strides: tuple[int, int]  # row (0: one for all), policy
    reference_weight: float  # 1 - sum w
    scores: Tensor | None  # [J, B, V or K], the values: Triton's tuples have an attribute `values`
    value_strides: tuple[int, int]  # J, B
    candidates: Tensor | None  # int64 [B, K], the tokens that the values belong to; None: all
    candidate_strides: tuple[int, int]
    candidate_count: int  # K
    value_weights: tuple[float, ...]
    value_weights_pointer: Tensor | None
    value_weights_strides: tuple[int, int]
    prefix: Tensor | None
    prefix_strides: tuple[int, int]
    own_prefix: Tensor | None  # the mixture's
    own_prefix_stride: int
    vocab: int
    log_plausibility: float  # read where plausibility_pointer is None
    plausibility_pointer: Tensor | None
    plausibility_stride: int
    alpha: float
    supremum: float  # sup f'; 0 where it is infinite


class Drawing(NamedTuple):
    """The record of the draw and the outputs. A parameter is one number for all rows, or a tensor
    if its pointer is given. The numbers `top_k`, `position` and `seed` are arguments of the kernels
    instead: they change from call to call, and no kernel is compiled for each."""

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
    bias: Tensor | None = None
    bias_stride: int = 0
    seed_pointer: Tensor | None = None
    seed_stride: int = 0
    position_pointer: Tensor | None = None
    position_stride: int = 0
    tokens: Tensor | None = None
    logprobs: Tensor | None = None
    valid: Tensor | None = None
    model_logprobs: Tensor | None = None
    proposal_logprobs: Tensor | None = None


def _strides(tensor: Tensor | None, rank: int) -> tuple[int, int]:
    """Row and column strides of a tensor [B, n], or of [n], which all rows share."""
    if tensor is None:
        return 0, 0
    return (0, tensor.stride(0)) if tensor.dim() < rank else (tensor.stride(0), tensor.stride(1))


def _weights(given: tuple[float, ...] | Tensor) -> tuple[tuple[float, ...], Tensor | None]:
    """The numbers of the record, and the pointer that replaces them where it is given."""
    return ((0.0,), given) if isinstance(given, Tensor) else (given or (0.0,), None)


def mixing_of(mixing: MixtureArguments) -> Mixing:
    """The record of the distribution."""
    divergence, logits, values = mixing.divergence, mixing.tensors(), mixing.values
    own_prefix, share = mixing.mixture_prefix_logprobs, mixing.plausibility
    shares = share if isinstance(share, Tensor) else None
    weights, weights_pointer = _weights(mixing.weights)
    value_weights, value_weights_pointer = _weights(mixing.value_weights)
    reference_weight = 1.0 - sum(weights)
    if device_functions(divergence).log_linear and abs(reference_weight) <= WEIGHT_ROUNDING.value:
        reference_weight = 0.0
    return Mixing(
        logits=tuple(logits),
        strides=tuple(x.stride(0) for x in logits),
        scales=mixing.logit_scales or None,
        weights=weights,
        weights_pointer=weights_pointer,
        weights_strides=_strides(weights_pointer, 2),
        reference_weight=reference_weight,
        scores=values,
        value_strides=(0, 0) if values is None else (values.stride(0), values.stride(1)),
        candidates=mixing.value_ids,
        candidate_strides=_strides(mixing.value_ids, 2),
        candidate_count=0 if mixing.value_ids is None else mixing.value_ids.shape[1],
        value_weights=value_weights,
        value_weights_pointer=value_weights_pointer,
        value_weights_strides=_strides(value_weights_pointer, 2),
        prefix=mixing.prefix_logprobs,
        prefix_strides=_strides(mixing.prefix_logprobs, 2),
        own_prefix=own_prefix,
        own_prefix_stride=0 if own_prefix is None else own_prefix.stride(0),
        vocab=mixing.vocab_size,
        log_plausibility=0.0 if shares is not None or not share else math.log(share),
        plausibility_pointer=shares,
        plausibility_stride=0 if shares is None else shares.stride(0),
        alpha=alpha_of(divergence),
        supremum=divergence.supremum if math.isfinite(divergence.supremum) else 0.0,
    )


def drawing_of(drawing: DrawArguments, outputs: Outputs) -> Drawing:
    """The record of the draw, for `outputs` as in `mod_fused.Sample`."""
    fields: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"):
        given = getattr(drawing, name)
        if isinstance(given, Tensor):
            fields[f"{name}_pointer"] = given
            fields[f"{name}_stride"] = given.stride(0)
        elif name in Drawing._fields:
            fields[name] = given
    mask = drawing.mask
    tokens, logprobs, valid, model_logprobs, proposal_logprobs = outputs
    return Drawing(
        **fields,
        mask=mask.view(torch.int8) if mask is not None and mask.dtype == torch.bool else mask,
        mask_strides=_strides(mask, 2),
        bias=drawing.bias,
        bias_stride=0 if drawing.bias is None else drawing.bias.stride(0),
        tokens=tokens,
        logprobs=logprobs,
        valid=valid.view(torch.int8),
        model_logprobs=model_logprobs,
        proposal_logprobs=proposal_logprobs,
    )


@triton.jit
def row_parameter(number, pointer, stride, row, DTYPE: tl.constexpr):
    """A row's parameter: the number, or the tensor's entry."""
    if pointer is None:
        return tl.full([], number, DTYPE)
    else:
        return tl.load(pointer + row.to(tl.int64) * stride).to(DTYPE)


@triton.jit
def temperature_of(drawing, row):
    return row_parameter(
        drawing.temperature,
        drawing.temperature_pointer,
        drawing.temperature_stride,
        row,
        tl.float32,
    )


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature, but finite for the smallest ones (0 times it is 0), and 1 for 0."""
    beta = tl.where(temperature > 1e-38, 1.0 / temperature, 1e38)
    return tl.where(temperature > 0.0, beta, 1.0)


@triton.jit
def row_seed(drawing, seed, row):
    """Row b's own seed, or SplitMix64(seed + b)."""
    if drawing.seed_pointer is None:
        return split_mix(row.to(tl.int64) + seed)
    else:
        return tl.load(drawing.seed_pointer + row.to(tl.int64) * drawing.seed_stride)


@triton.jit
def normal(weight):
    """A weight, or 0 if it is below the normal numbers of float32."""
    return tl.where(tl.abs(weight) < SMALLEST_WEIGHT, 0.0, weight)


@triton.jit
def weight(mixing, row, i: tl.constexpr):
    """The weight of policy i, counted from 0, float64."""
    if mixing.weights_pointer is None:
        return normal(tl.full([], mixing.weights[i], tl.float64))
    else:
        offset = row.to(tl.int64) * mixing.weights_strides[0] + i * mixing.weights_strides[1]
        return normal(tl.load(mixing.weights_pointer + offset).to(tl.float64))


@triton.jit
def value_weight(mixing, row, j: tl.constexpr):
    """The weight of value j, float64."""
    if mixing.value_weights_pointer is None:
        return normal(tl.full([], mixing.value_weights[j], tl.float64))
    else:
        offset = (
            row.to(tl.int64) * mixing.value_weights_strides[0] + j * mixing.value_weights_strides[1]
        )
        return normal(tl.load(mixing.value_weights_pointer + offset).to(tl.float64))


@triton.jit
def reference_weight(mixing, row, variant: tl.constexpr):
    """1 - sum w, float32; under reverse KL 0 where it is no more than rounding."""
    POLICIES: tl.constexpr = variant.models - 1
    if mixing.weights_pointer is None:
        return tl.full([], mixing.reference_weight, tl.float32)
    else:
        total = tl.zeros([], tl.float64)
        for i in tl.static_range(POLICIES):
            total += weight(mixing, row, i)
        own = 1.0 - total
        if variant.general == 0:
            rounding = tl.full([], WEIGHT_ROUNDING, tl.float64)
            if mixing.weights_pointer.dtype.element_ty == tl.float32:
                rounding = tl.full([], variant.models * FLOAT32_ROUNDING, tl.float64)
            own = tl.where(tl.abs(own) <= rounding, 0.0, own)
        return own.to(tl.float32)


@triton.jit
def log_plausibility(mixing, row):
    """The logarithm of a row's plausibility, float32; -inf where it is off."""
    if mixing.plausibility_pointer is None:
        return tl.full([], mixing.log_plausibility, tl.float32)
    else:
        share = tl.load(mixing.plausibility_pointer + row.to(tl.int64) * mixing.plausibility_stride)
        positive = share > 0.0
        return tl.where(
            positive, tl.log(tl.where(positive, share, 1.0).to(tl.float64)), -INFINITY
        ).to(tl.float32)


@triton.jit
def load_candidates(mixing, row, begin, variant: tl.constexpr):
    """The row's candidates from `begin` on, int64 [variant.candidates]; -1 behind the last."""
    k = begin + tl.arange(0, variant.candidates)
    pointers = mixing.candidates + row.to(tl.int64) * mixing.candidate_strides[0]
    pointers += k.to(tl.int64) * mixing.candidate_strides[1]
    return tl.load(pointers, mask=k < mixing.candidate_count, other=-1)


@triton.jit
def good_mixture(mixing, row, variant: tl.constexpr):
    """Whether the parameters of the distribution in tensors are in range; the host has checked the
    numbers."""
    POLICIES: tl.constexpr = variant.models - variant.first_policy
    VALUES: tl.constexpr = variant.scores
    good = tl.full([], True, tl.int1)
    if mixing.weights_pointer is not None:
        for i in tl.static_range(POLICIES):
            good = good & (tl.abs(weight(mixing, row, i)) < INFINITY)
    if mixing.value_weights_pointer is not None:
        for j in tl.static_range(VALUES):
            good = good & (tl.abs(value_weight(mixing, row, j)) < INFINITY)
    if mixing.plausibility_pointer is not None:
        share = tl.load(mixing.plausibility_pointer + row.to(tl.int64) * mixing.plausibility_stride)
        good = good & (share >= 0.0)  # above 1 no token is plausible
    if variant.candidates:
        for begin in range(0, mixing.candidate_count, variant.candidates):
            ids = load_candidates(mixing, row, begin, variant)
            good = good & (tl.min(ids, 0) >= -1) & (tl.max(ids, 0) < mixing.vocab)
    return good


@triton.jit
def good_parameters(mixing, drawing, row, variant: tl.constexpr):
    """Whether the parameters in tensors are in range; the host has checked the numbers."""
    good = good_mixture(mixing, row, variant)
    if drawing.temperature_pointer is not None:
        t = temperature_of(drawing, row)
        good = good & (t >= 0.0) & (t < INFINITY)
    if drawing.top_k_pointer is not None:
        good = good & (
            tl.load(drawing.top_k_pointer + row.to(tl.int64) * drawing.top_k_stride) >= 0
        )
    if drawing.top_p_pointer is not None:
        p = tl.load(drawing.top_p_pointer + row.to(tl.int64) * drawing.top_p_stride)
        good = good & (p > 0.0) & (p <= 1.0)
    if drawing.min_p_pointer is not None:
        p = tl.load(drawing.min_p_pointer + row.to(tl.int64) * drawing.min_p_stride)
        good = good & (p >= 0.0) & (p <= 1.0)
    return good


@triton.jit
def allowed(mixing, drawing, row, offsets, variant: tl.constexpr):
    """Whether the mask allows the tokens at `offsets`."""
    inside = offsets < mixing.vocab
    columns = offsets.to(tl.int64)
    row_mask = drawing.mask + row.to(tl.int64) * drawing.mask_strides[0]
    if variant.packed_mask:
        word = tl.load(row_mask + (columns // 32) * drawing.mask_strides[1], mask=inside, other=0)
        return ((word >> (offsets % 32)) & 1) != 0
    else:
        return tl.load(row_mask + columns * drawing.mask_strides[1], mask=inside, other=0) != 0


@triton.jit
def masked_key(mixing, drawing, key, row, offsets, variant: tl.constexpr):
    """The keys of the tokens at `offsets`; -inf for those that the mask forbids."""
    if variant.mask:
        key = tl.where(allowed(mixing, drawing, row, offsets, variant), key, -INFINITY)
    return key
