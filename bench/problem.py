"""A problem to time: the shape of a call, its logits, and its other arguments."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .logits import RECORDED, generated, recorded

POLICIES = 2
WEIGHTS = (0.6, 0.3)  # their sum is not 1: the reference counts in every divergence

#: By name: the arguments of `mod_fused.sample` that filter pi*; `filters` makes the mask.
FILTERS: dict[str, dict[str, Any]] = {
    "": {},
    "temperature=0.7": {"temperature": 0.7},
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
    "mask": {"mask": "half"},
    "all": {"mask": "half", "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def weights_of(policies: int) -> tuple[float, ...]:
    """The weights of so many policies: `WEIGHTS`, or equal ones that sum to 0.9."""
    return WEIGHTS if policies == POLICIES else (0.9 / policies,) * policies if policies else ()


class Problem(NamedTuple):
    """One cell of a benchmark table."""

    divergence: str
    dtype: str  # bfloat16 or float32
    batch: int  # B
    vocab: int  # V
    threads: int
    weights: tuple[float, ...] = WEIGHTS
    values: int = 0  # J, tensors of value scores
    reference: bool = True  # without a reference: reverse KL only
    filters: str = ""  # a key of FILTERS
    setting: str = "model"  # a kind of logits, see logits.py

    @property
    def bytes(self) -> int:
        """Size of all the logits and values."""
        tensors = len(self.weights) + self.reference + self.values
        return tensors * self.batch * self.vocab * getattr(torch, self.dtype).itemsize

    def shown(self) -> dict[str, Any]:
        """The fields for a result, with the number of policies in place of the weights."""
        fields = self._asdict()
        policies = len(fields.pop("weights"))
        return {**fields, "policies": policies}

    def label(self) -> str:
        """A short description for messages."""
        parts = [self.divergence, self.dtype, f"B={self.batch}", f"V={self.vocab}"]
        parts += [f"M={len(self.weights)}", f"threads={self.threads}"]
        parts += [f"J={self.values}"] * bool(self.values) + ["no reference"] * (not self.reference)
        parts += [x for x in (self.filters, self.setting) if x not in ("", "model")]
        return ", ".join(parts)


@functools.lru_cache(maxsize=4)  # the vocabularies of a grid: 330 MB at most
def _rows(setting: str, vocab: int, batch: int, policies: int) -> Tensor:
    """float32 [policies + 1, batch, vocab], see `logits`."""
    if setting == RECORDED:
        return recorded(vocab, batch, policies)
    return generated(setting, vocab, batch, policies)


def logits(problem: Problem, largest_batch: int) -> list[Tensor]:
    """The logits of a problem: reference if there is one, then policies, contiguous [B, V] each.

    For every B they are the first B rows of the same `largest_batch` rows.
    """
    rows = _rows(problem.setting, problem.vocab, largest_batch, len(problem.weights))
    rows = rows[int(not problem.reference) :, : problem.batch]
    return [x.to(getattr(torch, problem.dtype)).clone() for x in rows]


def mixture(problem: Problem, logits: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments of `mod_fused.log_probs`. All rows have the same
    values."""
    split = int(problem.reference)
    positional = (logits[0] if split else None, logits[split:], list(problem.weights))
    options: dict[str, Any] = {"divergence": problem.divergence}
    if problem.values:
        generator = torch.Generator().manual_seed(problem.vocab + 1)
        one = torch.randn(problem.values, 1, problem.vocab, generator=generator)
        values = one.to(getattr(torch, problem.dtype)).repeat(1, problem.batch, 1)
        options["values"] = values.to(logits[0].device)
    return positional, options


def filters(problem: Problem, device: torch.device) -> dict[str, Any]:
    """The arguments of `mod_fused.sample` that filter pi*. A mask, bool [B, V], allows half of the
    tokens, the same in all rows."""
    options = dict(FILTERS[problem.filters])
    if "mask" in options:
        generator = torch.Generator().manual_seed(problem.vocab + 2)
        allowed = torch.rand(problem.vocab, generator=generator) < 0.5
        options["mask"] = allowed.repeat(problem.batch, 1).to(device)
    return options
