"""What the registered ops take: the contract between `ops.py` and every backend.

A field that may differ from row to row is a number (for weights a tuple of them), which is copied
to no device, or a tensor.

The dispatcher charges for every argument, about a microsecond each for lists, so `pack` sends all
fields in four, each in its slot, and `unpack` reads them again (in C++: csrc/cpu/binding.cpp). No
string is among them: torch's stable ABI loses the memory of every one that crosses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .divergence import Divergence, alpha_of, divergence_of, number_of

_PACKED = "Tensor[] logits, Tensor?[] tensors, int[] integers, float[] numbers"
LOG_PROBS_SCHEMA = f"({_PACKED}) -> Tensor"
SAMPLE_SCHEMA = f"({_PACKED}) -> (Tensor, Tensor, Tensor, Tensor)"
# With outputs and a workspace that are the caller's.
LOG_PROBS_OUT_SCHEMA = f"({_PACKED}, Tensor(a!) out, Tensor(b!)? workspace) -> ()"
SAMPLE_OUT_SCHEMA = (
    f"({_PACKED}, Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!) valid, "
    "Tensor(d!)? model_logprobs, Tensor(e!)? workspace) -> ()"
)

Packed = tuple[list[Tensor], list[Tensor | None], list[int], list[float]]


class MixtureArguments(NamedTuple):
    """The distribution. B rows, M policies, V = vocab_size; fields documented in
    `mod_fused.sample`."""

    ref_logits: Tensor | None  # [B, >= V]
    policy_logits: list[Tensor]  # M of [B, >= V]
    weights: tuple[float, ...] | Tensor  # M numbers; float32 or float64 [M] or [B, M]
    divergence: Divergence  # of `get_divergence`
    normalizer: str  # "exact" or "zero"
    values: Tensor | None  # [J, B, V], or [J, B, K] with value_ids
    value_ids: Tensor | None  # int64 [B, K]
    value_weights: tuple[float, ...] | Tensor  # J numbers; [J] or [B, J]
    prefix_logprobs: Tensor | None  # float32 or float64 [B, models]
    logit_scales: tuple[float, ...]  # one per model, or empty
    vocab_size: int
    plausibility: float  # 0: off
    plausibility_tensor: int  # 0: reference, i: policy i

    def tensors(self) -> list[Tensor]:
        """The logits, reference first if there is one."""
        reference = [] if self.ref_logits is None else [self.ref_logits]
        return [*reference, *self.policy_logits]

    def batch_tensor(self) -> Tensor:
        """A tensor with the batch's rows and device."""
        return self.policy_logits[0] if self.ref_logits is None else self.ref_logits

    def model_count(self) -> int:
        """Columns of prefix_logprobs and model_logprobs: M + 1, or M without a reference."""
        return len(self.policy_logits) + (self.ref_logits is not None)


class DrawArguments(NamedTuple):
    """What happens to the distribution until a token is drawn."""

    temperature: float | Tensor  # float32 or float64 [B]
    top_k: int | Tensor  # int32 or int64 [B]; 0: off
    top_p: float | Tensor  # float32 or float64 [B]; 1: off
    min_p: float | Tensor  # float32 or float64 [B]; 0: off
    mask: Tensor | None  # bool [B, V] or packed int32 [B, ceil(V / 32)]
    seed: int | Tensor  # expanded per row by SplitMix64; int64 [B]
    position: int | Tensor  # int64 [B]
    return_model_logprobs: bool

    def filters(self) -> tuple[bool, bool, bool]:
        """Whether some row's top-k, top-p and min-p may be on."""
        return (
            isinstance(self.top_k, Tensor) or self.top_k > 0,
            isinstance(self.top_p, Tensor) or self.top_p < 1.0,
            isinstance(self.min_p, Tensor) or self.min_p > 0.0,
        )


#: Slots of the mixture; those of the draw follow.
_TENSORS, _INTEGERS, _NUMBERS = 5, 5, 2


def pack(mixing: MixtureArguments, drawing: DrawArguments | None = None) -> Packed:
    """All fields as the four arguments of an op; without `drawing` those of `log_probs`.

    A field that is a number leaves its tensor's slot empty, and the other way round. Behind their
    slots, numbers go on with the weights, the values' weights and the scales.
    """
    (
        ref, policies, weights, divergence, normalizer, values, value_ids, value_weights, prefix,
        scales, vocab, plausibility, plausible,
    ) = mixing  # fmt: skip
    # Fields are of these very types, and asking for them is faster than asking for tensors.
    w, v = type(weights) is tuple, type(value_weights) is tuple
    logits = list(policies) if ref is None else [ref, *policies]
    tensors: list[Any] = [
        None if w else weights,
        values,
        value_ids,
        None if v else value_weights,
        prefix,
    ]
    exact = int(normalizer == "exact")
    integers: list[Any] = [int(ref is not None), vocab, plausible, exact, number_of(divergence)]
    numbers: list[Any] = [plausibility, alpha_of(divergence)]
    if drawing is not None:
        temperature, top_k, top_p, min_p, mask, seed, position, with_logprobs = drawing
        t, p, m = type(temperature) is float, type(top_p) is float, type(min_p) is float
        k, s, n = type(top_k) is int, type(seed) is int, type(position) is int
        tensors += (mask, None if t else temperature, None if k else top_k, None if p else top_p)
        tensors += (None if m else min_p, None if s else seed, None if n else position)
        integers += (top_k if k else 0, seed if s else 0, position if n else 0, int(with_logprobs))
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
    """What was packed."""
    weights, values, value_ids, value_weights, prefix = tensors[:_TENSORS]
    reference, vocab, plausible, exact, number = integers[:_INTEGERS]
    plausibility, alpha = numbers[:_NUMBERS]
    slots, drawing = _NUMBERS, None
    if len(tensors) > _TENSORS:
        mask, temperature, top_k, top_p, min_p, seed, position = tensors[_TENSORS:]
        k, seed_number, position_number, with_logprobs = integers[_INTEGERS:]
        slots += 3
        t, p, least = numbers[_NUMBERS:slots]
        drawing = DrawArguments(
            t if temperature is None else temperature,
            k if top_k is None else top_k,
            p if top_p is None else top_p,
            least if min_p is None else min_p,
            mask,
            seed_number if seed is None else seed,
            position_number if position is None else position,
            bool(with_logprobs),
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
        tuple(numbers[scored:]),
        vocab,
        plausibility,
        plausible,
    )
    return mixing, drawing
