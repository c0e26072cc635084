"""The case `host`: the fixed cost of a call, on inputs so small that their size does not count.

The parts of a call are timed one by one: the checks of its arguments, the choice of the backend,
packing the arguments into the four of the op, the op itself (dispatcher, reading the arguments,
kernel, outputs). `plan` is the same call, checked and packed before. Bare C++ ops of torch are
timed beside them. The rest of `mod_fused.sample` is Python's function calls and the tuple of
results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mod_fused
from mod_fused.call.checks import check_draw, check_mixture
from mod_fused.dispatch.backends import choose
from mod_fused.dispatch.packing import pack
from mod_fused.divergence import DIVERGENCES, get_divergence

from ..case import Case, Contestant, Grid, mixtures_only
from ..measure import Call
from ..problem import Problem


def _parts(problem: Problem, logits: list[Tensor]) -> dict[str, Call]:
    """The parts with the arguments that `mod_fused.sample` gives them."""
    ref, policies, weights = logits[0], logits[1:], list(problem.weights)
    mixture: Callable[[], Any] = functools.partial(
        check_mixture, ref, policies, weights, divergence=problem.divergence
    )
    draw: Callable[[], Any] = functools.partial(check_draw, mixture(), seed=1)
    packing = functools.partial(pack, mixture(), draw())
    divergence = get_divergence(problem.divergence)
    return {
        "plan": mod_fused.plan(
            ref, policies, weights, divergence=problem.divergence, seed=1, backend="cpu"
        ),
        "op": functools.partial(torch.ops.mod_fused.sample_cpu.default, *packing()),
        "check_mixture": mixture,
        "check_draw": draw,
        "choose": functools.partial(choose, "cpu", ref.device, divergence),
        "pack": packing,
        "add": functools.partial(torch.add, ref, logits[1]),
        # a bare C++ op that allocates nothing
        "add_out": functools.partial(torch.add, ref, logits[1], out=torch.empty_like(ref)),
    }


_PARTS = ("plan", "op", "check_mixture", "check_draw", "choose", "pack", "add", "add_out")


def _part(name: str) -> Contestant:
    return Contestant(mixtures_only(lambda problem, logits: _parts(problem, logits)[name]))


_GRID = Grid(dtypes=("bfloat16",), shapes=((1, 64), (8, 64)), threads=(1,), divergences=DIVERGENCES)

HOST = Case(
    help="what a call costs on tiny inputs: checks, packing, op; beside a bare C++ op of torch",
    backends=("cpu",),
    contestants={name: _part(name) for name in _PARTS},
    grids=(_GRID,),
    quick=(_GRID._replace(shapes=((1, 64),), divergences=("reverse_kl",)),),
)
