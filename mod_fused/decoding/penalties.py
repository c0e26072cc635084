"""What `generate` adds to log pi* before it draws: logit_bias and repetition_penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call.fields import number, row_parameter
from ..ops import log_probs
from .options import count, plain

_LARGEST = torch.finfo(torch.float32).max


class Penalties:
    """The biases of one decode of B prompts, checked.

    Args:
        logit_bias: as in `mod_fused.generate`; so is repetition_penalty.
        batch: B.
        copies: K, how many adjacent rows each prompt has.
        vocab_size: token ids are below it; None: known once the models have run.
        device: of the logits.

    Attributes:
        repetition: penalty - 1, float32, a number for all rows or [B K, 1]; None: off.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """

    def __init__(
        self,
        logit_bias: Any,
        repetition_penalty: Any,
        batch: int,
        copies: int,
        vocab_size: int | None,
        device: torch.device,
    ) -> None:
        self._copies, self._device = copies, device
        self._listed = _logit_bias(logit_bias, batch, vocab_size)
        self._dense: Tensor | None = None
        given = plain(repetition_penalty)
        given = given.to(device) if isinstance(given, Tensor) else given
        expected = "positive and finite"
        penalty = row_parameter("repetition_penalty", given, 1.0, batch, device, _good, expected)
        self.repetition: float | Tensor | None = None
        if isinstance(penalty, Tensor):
            if not all(map(_good, penalty.tolist())):
                raise ValueError(f"repetition_penalty must be {expected}, got {penalty.tolist()}")
            each = penalty.double() - 1.0
            self.repetition = each.float().repeat_interleave(copies)[:, None]
        elif penalty != 1.0:
            self.repetition = penalty - 1.0

    def cut(self, plausibility: float | Tensor) -> float | Tensor | None:
        """The automatic cut of the support, off in rows with a logit_bias: it would leave out
        tokens that the bias lifts, and keep those alone that the bias lowers."""
        if not any(self._listed):
            return plausibility
        if len(self._listed) == 1:
            return None
        off = torch.tensor([not row for row in self._listed], device=self._device)
        return plausibility * off.repeat_interleave(self._copies).double()

    def step(
        self,
        read: Tensor,
        reference: Tensor | None,
        policies: Sequence[Tensor],
        mixing: dict[str, Any],
    ) -> Tensor | None:
        """The bias of a step, as `mod_fused.sample` takes it.

        Args:
            read: int64 [B K, n], the prompts and the responses so far; -1 is no token.
            reference: logits [B K, V_0], or None.
            policies: logits [B K, V_i] of each.
            mixing: the other arguments of `mod_fused.log_probs`, and the mask.
        """
        if self.repetition is None and not any(self._listed):
            return None
        models = [*([] if reference is None else [reference]), *policies]
        vocab = mixing["vocab_size"] or min(x.shape[1] for x in models)
        bias = self._of_lists(vocab)
        if self.repetition is None:
            return bias
        mixture = {name: x for name, x in mixing.items() if name != "mask"}
        log_p = log_probs(reference, policies, **mixture)
        target = torch.where((read >= 0) & (read < vocab), read, vocab)
        seen = torch.zeros(len(read), vocab + 1, dtype=torch.bool, device=read.device)
        seen = seen.scatter(1, target, True)[:, :vocab] & (log_p > -torch.inf)
        return torch.where(seen, self.repetition * log_p, 0.0) + (0.0 if bias is None else bias)

    def _of_lists(self, vocab: int) -> Tensor | None:
        """logit_bias as [V] for all rows or [B K, V]."""
        if self._dense is None and any(self._listed):
            dense = torch.zeros(len(self._listed), vocab)
            for row, listed in zip(dense, self._listed, strict=True):
                for token, x in listed.items():
                    row[count("a token id of logit_bias", token, 0, vocab)] = x
            dense = dense.to(self._device)
            rows = len(self._listed)
            self._dense = dense[0] if rows == 1 else dense.repeat_interleave(self._copies, dim=0)
        return self._dense


def _logit_bias(given: Any, batch: int, vocab_size: int | None) -> list[dict[int, float]]:
    """One dict for all prompts, or B; empty without a logit_bias."""
    if given is None:
        return []
    rows = [given] if isinstance(given, Mapping) else given
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(
            "logit_bias must be a dict of token ids and numbers, or a list of B of them, "
            f"got {type(given).__name__}"
        )
    if rows is given and len(rows) != batch:
        raise ValueError(f"logit_bias must be one dict or B = {batch} of them, got {len(rows)}")
    made: list[dict[int, float]] = []
    for row in rows:
        listed = {}
        for token, x in row.items():
            x = number("logit_bias", x)
            if not -_LARGEST <= x <= _LARGEST:
                raise ValueError(
                    f"logit_bias must be finite in float32, got {x} for token {token}: "
                    "bad_words_ids and mask_fn exclude tokens"
                )
            listed[count("a token id of logit_bias", token, 0, vocab_size)] = x
        made.append(listed)
    return made


def _good(penalty: float) -> bool:
    return 0.0 < penalty <= _LARGEST
