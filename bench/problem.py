"""What is timed: one shape of the op, and its logits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

#: In the order of `DivergenceId` in floors.cpp.
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey")
POLICIES = 2
WEIGHTS = (0.6, 0.3)  # their sum is not 1: the reference counts in every divergence
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Problem(NamedTuple):
    """One cell of a benchmark table."""

    divergence: str
    dtype: str  # bfloat16 or float32
    batch: int  # B
    vocab: int  # V
    threads: int
    weights: tuple[float, ...] = WEIGHTS

    @property
    def bytes(self) -> int:
        """Size of all the logits."""
        size = torch.empty(0, dtype=_DTYPES[self.dtype]).element_size()
        return (len(self.weights) + 1) * self.batch * self.vocab * size


@functools.lru_cache(maxsize=4)  # the vocabularies of a grid: 330 MB at most
def _rows(vocab: int, batch: int, policies: int) -> Tensor:
    """float32 [policies + 1, batch, vocab], see `logits`."""
    generator = torch.Generator().manual_seed(vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def laplace(*shape: int) -> Tensor:
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * torch.empty(shape).exponential_(generator=generator)

    out = torch.empty(policies + 1, batch, vocab)
    head = min(5000, vocab // 2)
    rank = torch.arange(1, head + 1).float()
    for b in range(batch):
        z = 2.2 * normal(vocab)
        at = torch.randperm(vocab, generator=generator)[:head]
        z[at] = torch.logaddexp(z[at], 17.0 - 1.6 * rank.log() + 0.7 * normal(head))
        out[0, b] = z
        for i in range(policies):
            out[1 + i, b] = 1.05 * z + 0.45 * laplace(vocab)
    return out


def logits(problem: Problem, largest_batch: int) -> list[Tensor]:
    """The logits of a problem: reference, then policies, contiguous [B, V] each.

    A language model's next-token logits as a sketch: 5000 tokens at random ids follow a power law
    (slope 1.6, top logit about 17) over a normal tail of standard deviation 2.2; a policy sharpens
    the reference by 5% and moves each logit by a Laplace deviate of scale 0.45, which is how far
    preference tuning moves them. The first B rows of the same `largest_batch` rows for every B.
    """
    rows = _rows(problem.vocab, largest_batch, len(problem.weights))[:, : problem.batch]
    return [x.to(_DTYPES[problem.dtype]).clone() for x in rows]
