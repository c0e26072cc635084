"""Packing: all fields of a call in the four arguments of a registered op.

Four, because torch's dispatcher takes time for every argument, about a microsecond for a list. No
strings, because torch's stable ABI leaks the memory of every string that crosses it. In C++
csrc/cpu/binding.cpp reads the four lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..divergence import alpha_of, divergence_of, number_of

_PACKED = "Tensor[] logits, Tensor?[] tensors, int[] integers, float[] numbers"
LOG_PROBS_SCHEMA = f"({_PACKED}) -> Tensor"
SAMPLE_SCHEMA = f"({_PACKED}) -> (Tensor, Tensor, Tensor, Tensor)"
# The caller passes the outputs and may pass a workspace. Only this way has proposal_logprobs: one
# more result would cost every call half a microsecond.
LOG_PROBS_OUT_SCHEMA = f"({_PACKED}, Tensor(a!) out, Tensor(b!)? workspace) -> ()"
SAMPLE_OUT_SCHEMA = (
    f"({_PACKED}, Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!) valid, "
    "Tensor(d!)? model_logprobs, Tensor(e!)? proposal_logprobs, Tensor(f!)? workspace) -> ()"
)

Packed = tuple[list[Tensor], list[Tensor | None], list[int], list[float]]

#: How many slots of each list belong to the mixture; those of the draw follow.
_TENSORS, _INTEGERS, _NUMBERS = 7, 5, 2
#: The slots of two integers that may change while all else stays; one follows the other.
SEED, POSITION = _INTEGERS + 1, _INTEGERS + 2


def pack(mixing: MixtureArguments, drawing: DrawArguments | None = None) -> Packed:
    """All fields as the four arguments of an op: of `log_probs` without `drawing`.

    A field that is a number leaves its slot among the tensors empty, and the other way round. After
    the slots, `numbers` goes on with the weights, the value weights and the scales.
    """
    (
        ref, policies, weights, divergence, normalizer, values, value_ids, value_weights, prefix,
        own_prefix, scales, vocab, plausibility, plausible,
    ) = mixing  # fmt: skip
    # `checks.py` makes fields of exactly these types; `type(x) is` is faster than isinstance.
    w, v = type(weights) is tuple, type(value_weights) is tuple
    c = type(plausibility) is float
    logits = list(policies) if ref is None else [ref, *policies]
    tensors: list[Any] = [
        None if w else weights,
        values,
        value_ids,
        None if v else value_weights,
        prefix,
        own_prefix,
        None if c else plausibility,
    ]
    exact = int(normalizer == "exact")
    integers: list[Any] = [int(ref is not None), vocab, plausible, exact, number_of(divergence)]
    numbers: list[Any] = [plausibility if c else 0.0, alpha_of(divergence)]
    if drawing is not None:
        (
            temperature, top_k, top_p, min_p, mask, bias, seed, position, of_models, of_proposal,
        ) = drawing  # fmt: skip
        t, p, m = type(temperature) is float, type(top_p) is float, type(min_p) is float
        k, s, n = type(top_k) is int, type(seed) is int, type(position) is int
        tensors += (mask, bias, None if t else temperature, None if k else top_k)
        tensors += (None if p else top_p, None if m else min_p)
        tensors += (None if s else seed, None if n else position)
        integers += (min(top_k, vocab) if k else 0, seed if s else 0, position if n else 0)
        integers += (int(of_models), int(of_proposal))
        numbers += (temperature if t else 0.0, top_p if p else 0.0, min_p if m else 0.0)
    if w:
        numbers += weights
    if v:
        numbers += value_weights
    numbers += scales
    return logits, tensors, integers, numbers


def unpack(
    logits: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    integers: Sequence[int],
    numbers: Sequence[float],
) -> tuple[MixtureArguments, DrawArguments | None]:
    """The inverse of `pack`."""
    weights, values, value_ids, value_weights, prefix, own_prefix, cuts = tensors[:_TENSORS]
    reference, vocab, plausible, exact, number = integers[:_INTEGERS]
    plausibility, alpha = numbers[:_NUMBERS]
    slots, drawing = _NUMBERS, None
    if len(tensors) > _TENSORS:
        mask, bias, temperature, top_k, top_p, min_p, seed, position = tensors[_TENSORS:]
        k, seed_number, position_number, of_models, of_proposal = integers[_INTEGERS:]
        slots += 3
        t, p, least = numbers[_NUMBERS:slots]
        drawing = DrawArguments(
            t if temperature is None else temperature,
            k if top_k is None else top_k,
            p if top_p is None else top_p,
            least if min_p is None else min_p,
            mask,
            bias,
            seed_number if seed is None else seed,
            position_number if position is None else position,
            bool(of_models),
            bool(of_proposal),
        )
    policies = list(logits[reference:])
    weighted = slots + (len(policies) if weights is None else 0)
    scored = weighted + (0 if values is None or value_weights is not None else len(values))
    mixing = MixtureArguments(
        logits[0] if reference else None,
        policies,
        tuple(numbers[slots:weighted]) if weights is None else weights,
        divergence_of(number, alpha),
        "exact" if exact else "zero",
        values,
        value_ids,
        tuple(numbers[weighted:scored]) if value_weights is None else value_weights,
        prefix,
        own_prefix,
        tuple(numbers[scored:]),
        vocab,
        plausibility if cuts is None else cuts,
        plausible,
    )
    return mixing, drawing
