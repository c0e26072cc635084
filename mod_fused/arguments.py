"""What the registered ops take, in schema order: the contract between `ops.py` and every backend.

A parameter that may be a number, a list or a tensor travels as two schema arguments, `name`
(numbers, so that nothing is copied to the device) and `name_tensor`; the tensor counts where it is
given. Rank-2 lists travel flat.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MIXTURE_SCHEMA = (
    "Tensor? ref_logits, Tensor[] policy_logits, float[] weights, Tensor? weights_tensor, "
    "str divergence, str normalizer, Tensor? values, Tensor? value_ids, "
    "float[] value_weights, Tensor? value_weights_tensor, Tensor? prefix_logprobs, "
    "float[] logit_scales, int vocab_size, float plausibility, int plausibility_tensor"
)
DRAW_SCHEMA = (
    "float[] temperature, Tensor? temperature_tensor, int[] top_k, Tensor? top_k_tensor, "
    "float[] top_p, Tensor? top_p_tensor, float[] min_p, Tensor? min_p_tensor, Tensor? mask, "
    "int seed, Tensor? seed_tensor, int[] position, Tensor? position_tensor, "
    "bool return_model_logprobs"
)
LOG_PROBS_SCHEMA = f"({MIXTURE_SCHEMA}) -> Tensor"
SAMPLE_SCHEMA = f"({MIXTURE_SCHEMA}, {DRAW_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"


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
