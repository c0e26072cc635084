"""One call as data: the checked arguments of `mod_fused.sample`, the same for every backend.

A field that may differ from row to row is a number (weights: a tuple of numbers) or a tensor. A
number stays on the host.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..divergence import Divergence


class MixtureArguments(NamedTuple):
    """The arguments that define the distribution: B rows, M policies, V = vocab_size.
    `mod_fused.sample` documents the fields."""

    ref_logits: Tensor | None  # [B, >= V]
    policy_logits: list[Tensor]  # M of [B, >= V]
    weights: tuple[float, ...] | Tensor  # M numbers; float32 or float64 [M] or [B, M]
    divergence: Divergence  # of `get_divergence`
    normalizer: str  # "exact" or "zero"
    values: Tensor | None  # [J, B, V], or [J, B, K] with value_ids
    value_ids: Tensor | None  # int64 [B, K]
    value_weights: tuple[float, ...] | Tensor  # J numbers; [J] or [B, J]
    prefix_logprobs: Tensor | None  # float32 or float64 [B, models]
    mixture_prefix_logprobs: Tensor | None  # float32 or float64 [B]
    logit_scales: tuple[float, ...]  # one per model, or empty
    vocab_size: int
    plausibility: float | Tensor  # float32 or float64 [B]; 0: off
    plausibility_tensor: int  # 0: reference, i: policy i

    def plausibility_is_on(self) -> bool:
        """Whether plausibility may exclude tokens of some row."""
        return isinstance(self.plausibility, Tensor) or self.plausibility > 0.0

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
    """The arguments that say how a token is drawn from the distribution."""

    temperature: float | Tensor  # float32 or float64 [B]
    top_k: int | Tensor  # int32 or int64 [B]; 0: off
    top_p: float | Tensor  # float32 or float64 [B]; 1: off
    min_p: float | Tensor  # float32 or float64 [B]; 0: off
    mask: Tensor | None  # bool [B, V] or packed int32 [B, ceil(V / 32)]
    bias: Tensor | None  # [B, V], dense; NaN or +inf makes a row invalid
    seed: int | Tensor  # a number: SplitMix64 makes the rows' seeds of it; int64 [B]
    position: int | Tensor  # int64 [B]
    return_model_logprobs: bool
    return_proposal_logprobs: bool

    def filters(self) -> tuple[bool, bool, bool]:
        """Whether some row's top-k, top-p and min-p may be on."""
        return (
            isinstance(self.top_k, Tensor) or self.top_k > 0,
            isinstance(self.top_p, Tensor) or self.top_p < 1.0,
            isinstance(self.min_p, Tensor) or self.min_p > 0.0,
        )

    def needs_keys(self) -> bool:
        """Whether the draw looks at all of a row's tokens once more, after their log pi*."""
        return self.bias is not None or any(self.filters())
