"""The distributions of a decode, step by step, under the names of transformers: `logits`, log pi*,
and `scores`, what the tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call.checks import check_draw, check_mixture
from ..ops import log_probs
from ..torch_kernels.filters import biased, kept, scaled_key, unpacked
from ..torch_kernels.parameters import row_scalar


class Scores:
    """What is asked for of each step.

    Args:
        output_scores: keep the scores.
        output_logits: keep the logits.

    Attributes:
        scores, logits: float32 [B, V] of each step so far; None: not asked for.
    """

    def __init__(self, output_scores: bool, output_logits: bool) -> None:
        self.scores: list[Tensor] | None = [] if output_scores else None
        self.logits: list[Tensor] | None = [] if output_logits else None

    def add(
        self,
        reference: Tensor | None,
        policies: Sequence[Tensor],
        mixing: dict[str, Any],
        drawing: dict[str, Any],
    ) -> None:
        """Compute and keep those of a step, given the arguments of `mod_fused.log_probs`, and mask,
        bias, temperature, top_k, top_p and min_p of `mod_fused.sample`."""
        if self.scores is None and self.logits is None:
            return
        log_p = log_probs(reference, policies, **mixing)
        if self.logits is not None:
            self.logits.append(log_p)
        if self.scores is not None:
            self.scores.append(drawn_from(log_p, **drawing))


def check_scores(
    output_scores: bool, output_logits: bool, resample_fn: Any, num_candidates: Any
) -> Scores:
    """These arguments of `generate`, checked.

    Raises:
        ValueError: for distributions of rows that are chosen anew.
    """
    for name, other in {"resample_fn": resample_fn, "num_candidates": num_candidates}.items():
        if other is not None and (output_scores or output_logits):
            raise ValueError(
                "output_scores and output_logits are by row, and cannot be combined with "
                f"{name}, which chooses among rows"
            )
    return Scores(output_scores, output_logits)


def drawn_from(log_p: Tensor, **drawing: Any) -> Tensor:
    """Log of the probabilities with which tokens are drawn, float32 [B, V]: log pi* after mask,
    bias, temperature and filters, normalised. A row of temperature 0 has log pi* and bias of what
    the mask leaves.

    Args:
        log_p: log pi*, float32 [B, V].
        **drawing: mask, bias, temperature, top_k, top_p and min_p of `mod_fused.sample`.
    """
    given = check_draw(check_mixture(None, [log_p], [1.0]), **drawing, seed=0)
    (count, vocab), device = log_p.shape, log_p.device
    rows = slice(0, count)
    temperature = row_scalar(given.temperature, rows, device, torch.float32)
    top_k = row_scalar(given.top_k, rows, device, torch.int64)
    top_p = row_scalar(given.top_p, rows, device, torch.float64)
    min_p = row_scalar(given.min_p, rows, device, torch.float32)
    key = log_p
    if given.mask is not None:
        key = torch.where(unpacked(given.mask, vocab), key, -torch.inf)
    if given.bias is not None:
        key, _ = biased(key, given.bias, log_p.amax(1))
    scaled = scaled_key(key, key.amax(1), temperature)
    keep = kept(given, key, scaled, top_k, top_p, min_p)
    keep = keep | (temperature == 0)[:, None]
    return torch.where(keep, scaled, -torch.inf).log_softmax(1)
