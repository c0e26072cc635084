"""The case `cpu`: the C++ backend beside eager torch, torch.compile and the floors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from mod_fused.divergence import get_divergence

from . import compiled, eager, floors
from .measure import Call
from .problem import POLICIES, WEIGHTS, Problem
from .registry import Case, Contestant, Grid, NotTimed, mixtures_only

#: torch.compile's; a dry run of the GPU check traces only ("eager").
COMPILER = os.environ.get("MOD_FUSED_BENCH_COMPILER", "inductor")
_graph_of: tuple[object, ...] | None = None


def _compile(race_name: str, problem: Problem, logits: list[Tensor]) -> Call:
    """torch.compile of our algorithm: one graph for all vocabularies (and for all batches above 1),
    which was measured to be as fast as one per shape."""
    global _graph_of
    graph = (problem.divergence, problem.dtype, problem.threads, problem.batch == 1)
    if graph != _graph_of:
        torch._dynamo.reset()
        _compiled.cache_clear()
        _graph_of = graph
    for x in logits:
        torch._dynamo.mark_dynamic(x, 1)
        if problem.batch > 1:
            torch._dynamo.mark_dynamic(x, 0)
    return functools.partial(_compiled(race_name, problem.divergence), logits, problem.weights)


@functools.cache
def _compiled(race_name: str, divergence: str) -> Callable[..., object]:
    race = {"tiled": compiled.tiled, "flat": compiled.flat}[race_name]
    function: Callable[..., object] = compiled.sampler(divergence, race)
    return torch.compile(function, fullgraph=True, backend=COMPILER)


@mixtures_only
def _eager(problem: Problem, logits: list[Tensor]) -> Call:
    return functools.partial(eager.sample, logits, problem.weights, problem.divergence)


def _eager_log_probs(logits: list[Tensor], divergence: str) -> Tensor:
    return eager.probabilities(logits, WEIGHTS, divergence).log()


def _compiled_log_probs(logits: list[Tensor], divergence: str) -> Tensor:
    # The function that is compiled, run as it is.
    return compiled.masses(logits, WEIGHTS, get_divergence(divergence)).log()


def _compiled_contestant(race_name: str, default: bool) -> Contestant:
    return Contestant(
        mixtures_only(functools.partial(_compile, race_name)),
        default=default,
        slow_to_compile=True,
        log_probs=_compiled_log_probs,
    )


@mixtures_only
def _math(problem: Problem, logits: list[Tensor]) -> Call:
    if len(problem.weights) != POLICIES:
        raise NotTimed(f"written for {POLICIES} policies")
    return floors.transcendentals(problem, logits)


_DTYPES = ("bfloat16", "float32")

CPU = Case(
    help="the C++ backend, beside eager torch, torch.compile and the floors",
    backends=("cpu",),
    contestants={
        "eager": Contestant(_eager, call_limit=1.0, log_probs=_eager_log_probs),
        "compile": _compiled_contestant("tiled", default=True),
        "compile_flat": _compiled_contestant("flat", default=False),
        "read": Contestant(floors.read, floor=True),
        "math": Contestant(_math, floor=True),
    },
    grids=(
        Grid(
            dtypes=_DTYPES,
            shapes=tuple((b, v) for v in (32000, 128256, 262144) for b in (1, 8, 64)),
            threads=(1, 2),
        ),
    ),
    quick=(Grid(dtypes=_DTYPES, shapes=((1, 2048), (2, 4096)), threads=(1,)),),
)
