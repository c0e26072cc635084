"""The two kinds of benchmark: a `Case` is a grid of problems and the contestants that are timed on
them; a `Procedure` has options and a run of its own."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mod_fused
from mod_fused.divergence import DIVERGENCES

from .measure import Call
from .problem import POLICIES, Problem, filters, mixture, weights_of
from .report import markdown

Builder = Callable[[Problem, list[Tensor]], Call]


class NotTimed(Exception):
    """Raised by a builder that does not support a problem; the report shows the reason."""


class Refused(Exception):
    """Raised by a builder whose results are wrong: no contestant is timed on the problem."""


class Contestant(NamedTuple):
    """Code that is timed. `build` prepares its call for a problem; the first call may compile."""

    build: Builder
    floor: bool = False  # a bound on what is possible, not an implementation
    slow_to_compile: bool = False  # left out of --quick
    call_limit: float = 2.0  # seconds: a call that is expected to take longer is not made
    # (logits of one row, divergence) -> its log-probabilities up to a constant, float [1, V]: the
    # report gives their distance from the oracle
    log_probs: Callable[[list[Tensor], str], Tensor] | None = None


class Grid(NamedTuple):
    """The problems of all combinations of these axes."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # (B, V)
    threads: tuple[int, ...]
    divergences: tuple[str, ...] = DIVERGENCES
    policies: tuple[int, ...] = (POLICIES,)
    values: tuple[int, ...] = (0,)
    filters: tuple[str, ...] = ("",)
    settings: tuple[str, ...] = ("model",)
    reference: bool = True

    def problems(self) -> list[Problem]:
        """Batches of one first, then by vocabulary: problems that share a compiled graph are
        neighbours, and the time of a large problem is predicted from a smaller one."""
        shapes = sorted(self.shapes, key=lambda shape: (shape[0] > 1, shape[1], shape[0]))
        divergences = [d for d in self.divergences if self.reference or d == "reverse_kl"]
        axes = (self.dtypes, self.threads, self.settings, self.policies, self.values, self.filters)
        out = []
        for dtype, threads, setting, m, values, name in itertools.product(*axes):
            weights = weights_of(m) if self.reference else (1.0 / m,) * m
            out += [
                Problem(d, dtype, b, v, threads, weights, values, self.reference, name, setting)
                for d in divergences
                for b, v in shapes
            ]
        return out


Picture = Callable[[Any, dict[str, Any]], None]  # plots a result into a matplotlib figure


class Case(NamedTuple):
    """A benchmark of the op on problems: `python -m bench.run NAME`."""

    help: str
    backends: tuple[str, ...]  # our backends timed by default; ratios are to the first
    contestants: Mapping[str, Contestant]
    grids: tuple[Grid, ...]  # a problem in several grids is timed once
    quick: tuple[Grid, ...]
    picture: Picture | None = None
    report: Callable[[dict[str, Any]], str] = markdown


class Procedure(NamedTuple):
    """A benchmark that is no grid of problems, with options and a run of its own."""

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]  # returns "what", "rows" and further fields
    report: Callable[[dict[str, Any]], str] = markdown


def ours(backend: str) -> Contestant:
    """`mod_fused.sample` on one backend."""

    def build(problem: Problem, logits: list[Tensor]) -> Call:
        arguments, options = mixture(problem, logits)
        options |= filters(problem, logits[0].device)
        return functools.partial(mod_fused.sample, *arguments, **options, seed=1, backend=backend)

    return Contestant(build)


def mixtures_only(build: Builder) -> Builder:
    """Restrict a builder to problems of logits and weights alone: without values and filters, and
    with a reference."""

    @functools.wraps(build)
    def checked(problem: Problem, logits: list[Tensor]) -> Call:
        if problem.values or problem.filters or not problem.reference:
            raise NotTimed("takes a reference and policies alone, without values and filters")
        return build(problem, logits)

    return checked


def set_threads(threads: int) -> None:
    """Set torch's thread count, which every contestant follows."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
