"""What the registered ops take: the contract between `ops.py` and every backend.

A parameter that may be a number, a list or a tensor is two fields, `name` (numbers, so that nothing
is copied to the device) and `name_tensor`; the tensor counts where it is given. Rank-2 lists travel
flat.

The dispatcher charges for every argument, about a microsecond each for lists, so `pack` sends all
fields in four, and `unpack` reads them again (in C++: csrc/cpu/binding.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

_PACKED = "Tensor[] tensors, int[] integers, float[] numbers, str divergence"
LOG_PROBS_SCHEMA = f"({_PACKED}) -> Tensor"
SAMPLE_SCHEMA = f"({_PACKED}) -> (Tensor, Tensor, Tensor, Tensor)"
# With outputs and a workspace that are the caller's.
LOG_PROBS_OUT_SCHEMA = f"({_PACKED}, Tensor(a!) out, Tensor(b!)? workspace) -> ()"
SAMPLE_OUT_SCHEMA = (
    f"({_PACKED}, Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!) valid, "
    "Tensor(d!)? model_logprobs, Tensor(e!)? workspace) -> ()"
)

Packed = tuple[list[Tensor], list[int], list[float], str]


class MixtureArguments(NamedTuple):
    """The distribution. B rows, M policies, V = vocab_size; fields documented in
    `mod_fused.sample`."""

    ref_logits: Tensor | None  # [B, >= V]
    policy_logits: list[Tensor]  # M of [B, >= V]
    weights: list[float]  # M or B * M numbers; empty where weights_tensor is given
    weights_tensor: Tensor | None  # float32 or float64 [M] or [B, M]
    divergence: str  # canonical name
    normalizer: str  # "exact" or "zero"
    values: Tensor | None  # [J, B, V], or [J, B, K] with value_ids
    value_ids: Tensor | None  # int64 [B, K]
    value_weights: list[float]  # J or B * J numbers
    value_weights_tensor: Tensor | None  # [J] or [B, J]
    prefix_logprobs: Tensor | None  # float32 or float64 [B, models]
    logit_scales: list[float]  # one per model, or empty
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

    temperature: list[float]  # 1 or B numbers
    temperature_tensor: Tensor | None  # float32 or float64 [B]
    top_k: list[int]  # 0: off
    top_k_tensor: Tensor | None  # int32 or int64 [B]
    top_p: list[float]  # 1: off
    top_p_tensor: Tensor | None  # float32 or float64 [B]
    min_p: list[float]  # 0: off
    min_p_tensor: Tensor | None  # float32 or float64 [B]
    mask: Tensor | None  # bool [B, V] or packed int32 [B, ceil(V / 32)]
    seed: int  # expanded per row by SplitMix64; unused where seed_tensor is given
    seed_tensor: Tensor | None  # int64 [B]
    position: list[int]  # 1 or B numbers
    position_tensor: Tensor | None  # int64 [B]
    return_model_logprobs: bool

    def filters(self) -> tuple[bool, bool, bool]:
        """Whether some row's top-k, top-p and min-p may be on."""
        return (
            self.top_k_tensor is not None or any(self.top_k),
            self.top_p_tensor is not None or any(p < 1.0 for p in self.top_p),
            self.min_p_tensor is not None or any(p > 0.0 for p in self.min_p),
        )


def pack(mixing: MixtureArguments, drawing: DrawArguments | None = None) -> Packed:
    """All fields as the four arguments of an op; without `drawing` those of `log_probs`.

    `tensors` holds what is not None, in the order of the fields; bit 0 of integers[0] says whether
    the reference is there, the bits above it which of the optional tensors are. The other integers,
    and the numbers, stand in the order written here; a list follows its length.
    """
    (
        ref, policies, weights, weights_tensor, divergence, normalizer, values, value_ids,
        value_weights, value_weights_tensor, prefix, scales, vocab, plausibility, plausible,
    ) = mixing  # fmt: skip
    tensors = list(policies) if ref is None else [ref, *policies]
    optional = [weights_tensor, values, value_ids, value_weights_tensor, prefix]
    integers = [0, len(policies), vocab, plausible, int(normalizer == "exact")]
    integers += (len(weights), len(value_weights), len(scales))
    numbers = [plausibility, *weights, *value_weights, *scales]
    if drawing is not None:
        (
            temperature, temperature_tensor, top_k, top_k_tensor, top_p, top_p_tensor, min_p,
            min_p_tensor, mask, seed, seed_tensor, position, position_tensor, with_logprobs,
        ) = drawing  # fmt: skip
        optional += (temperature_tensor, top_k_tensor, top_p_tensor, min_p_tensor)
        optional += (mask, seed_tensor, position_tensor)
        integers += (len(temperature), len(top_p), len(min_p), len(top_k), len(position))
        integers += (*top_k, *position, seed, int(with_logprobs))
        numbers += (*temperature, *top_p, *min_p)
    present = int(ref is not None)
    for i, tensor in enumerate(optional):
        if tensor is not None:
            present |= 2 << i
            tensors.append(tensor)
    integers[0] = present
    return tensors, integers, numbers, divergence


def unpack(
    tensors: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float], divergence: str
) -> tuple[MixtureArguments, DrawArguments | None]:
    """What was packed."""
    words, reals, rest = iter(integers), iter(numbers), iter(tensors)

    def some(count: int) -> list[float]:
        return [next(reals) for _ in range(count)]

    present = next(words)
    policies, vocab, plausible, exact = (next(words) for _ in range(4))
    counts = [next(words) for _ in range(3)]
    ref = next(rest) if present & 1 else None
    policy_logits = [next(rest) for _ in range(policies)]
    optional = [next(rest) if present & (2 << i) else None for i in range(12)]
    weights_tensor, values, value_ids, value_weights_tensor, prefix = optional[:5]
    plausibility = next(reals)
    weights, value_weights, scales = (some(n) for n in counts)
    mixing = MixtureArguments(
        ref,
        policy_logits,
        weights,
        weights_tensor,
        divergence,
        "exact" if exact else "zero",
        values,
        value_ids,
        value_weights,
        value_weights_tensor,
        prefix,
        scales,
        vocab,
        plausibility,
        plausible,
    )
    if len(integers) == 8:
        return mixing, None
    counts = [next(words) for _ in range(5)]
    temperature, top_p, min_p = (some(n) for n in counts[:3])
    top_k, position = ([next(words) for _ in range(n)] for n in counts[3:])
    temperature_tensor, top_k_tensor, top_p_tensor, min_p_tensor = optional[5:9]
    mask, seed_tensor, position_tensor = optional[9:]
    drawing = DrawArguments(
        temperature,
        temperature_tensor,
        top_k,
        top_k_tensor,
        top_p,
        top_p_tensor,
        min_p,
        min_p_tensor,
        mask,
        next(words),
        seed_tensor,
        position,
        position_tensor,
        bool(next(words)),
    )
    return mixing, drawing
