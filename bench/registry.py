"""What can be benchmarked: a table of cases, each a grid of problems and the contestants timed on
them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import mod_fused

from .measure import Call
from .problem import DIVERGENCES, Problem

Builder = Callable[[Problem, list[Tensor]], Call]


class Contestant(NamedTuple):
    """One thing timed. `build` prepares it for a problem; its first call may compile."""

    build: Builder
    floor: bool = False  # a bound on what is possible, not an implementation
    default: bool = True  # timed unless --contestants says otherwise
    slow_to_compile: bool = False  # left out of --quick
    call_limit: float = 2.0  # seconds: a call foreseen to take longer is not made
    # log-probabilities of one row's logits up to a constant: float [1, V], for its distance from
    # the oracle
    log_probs: Callable[[list[Tensor], str], Tensor] | None = None


class Grid(NamedTuple):
    """The problems of a case: all combinations."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # (B, V)
    threads: tuple[int, ...]
    divergences: tuple[str, ...] = DIVERGENCES

    def problems(self) -> list[Problem]:
        """Batches of one apart from the others, then small vocabularies first: problems that share
        a compiled graph are neighbours, and the time of a large one is foreseen from a smaller."""
        shapes = sorted(self.shapes, key=lambda shape: (shape[0] > 1, shape[1], shape[0]))
        return [
            Problem(divergence, dtype, batch, vocab, threads)
            for dtype in self.dtypes
            for threads in self.threads
            for divergence in self.divergences
            for batch, vocab in shapes
        ]


class Case(NamedTuple):
    """A benchmark: `python -m bench.run NAME`."""

    help: str
    backends: tuple[str, ...]  # ours, timed by default; ratios are those of the first
    contestants: Mapping[str, Contestant]
    grid: Grid
    quick: Grid


def ours(backend: str) -> Contestant:
    """`mod_fused.sample` on one backend."""

    def build(problem: Problem, logits: list[Tensor]) -> Call:
        ref, policies, weights = logits[0], logits[1:], list(problem.weights)
        return functools.partial(
            mod_fused.sample,
            ref,
            policies,
            weights,
            divergence=problem.divergence,
            seed=1,
            backend=backend,
        )

    return Contestant(build)


def cases() -> dict[str, Case]:
    """All cases by name."""
    from .cpu import CPU

    return {"cpu": CPU}


def set_threads(threads: int) -> None:
    """Set torch's thread count, which every contestant follows."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
