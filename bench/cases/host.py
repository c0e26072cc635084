"""The case `host`: the fixed cost of a call, on inputs so small that their size does not count.

The parts of a call are timed one by one: the checks of its arguments, the choice of the backend,
packing the arguments into the four of the op, the op itself (dispatcher, reading the arguments,
kernel, outputs). Bare C++ ops of torch are timed beside them. The rest of `mod_fused.sample` is
Python's function calls and the tuple of results.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mod_fused.call.arguments import DrawArguments, MixtureArguments
from mod_fused.call.checks import check_draw, check_mixture
from mod_fused.dispatch.backends import choose
from mod_fused.dispatch.packing import pack
from mod_fused.divergence import DIVERGENCES, get_divergence

from ..case import Case, Contestant, Grid, mixtures_only
from ..measure import Call
from ..problem import Problem


def _checked(problem: Problem, logits: list[Tensor]) -> tuple[Call, Call]:
    """The two checks that `mod_fused.sample` makes, with the arguments it gives them."""
    ref, policies, weights = logits[0], logits[1:], list(problem.weights)
    mixture = functools.partial(
        check_mixture, ref, policies, weights, divergence=problem.divergence
    )
    draw = functools.partial(check_draw, mixture(), seed=1)
    return mixture, draw


@mixtures_only
def _check_mixture(problem: Problem, logits: list[Tensor]) -> Call:
    return _checked(problem, logits)[0]


@mixtures_only
def _check_draw(problem: Problem, logits: list[Tensor]) -> Call:
    return _checked(problem, logits)[1]


def _arguments(problem: Problem, logits: list[Tensor]) -> tuple[MixtureArguments, DrawArguments]:
    mixture, draw = _checked(problem, logits)
    mixing: Any = mixture()
    drawing: Any = draw()
    return mixing, drawing


@mixtures_only
def _pack(problem: Problem, logits: list[Tensor]) -> Call:
    return functools.partial(pack, *_arguments(problem, logits))


def _choose(problem: Problem, logits: list[Tensor]) -> Call:
    divergence = get_divergence(problem.divergence)
    return functools.partial(choose, "cpu", logits[0].device, divergence)


@mixtures_only
def _op(problem: Problem, logits: list[Tensor]) -> Call:
    op = torch.ops.mod_fused.sample_cpu.default
    return functools.partial(op, *pack(*_arguments(problem, logits)))


def _add(problem: Problem, logits: list[Tensor]) -> Call:
    return functools.partial(torch.add, logits[0], logits[1])


def _out(problem: Problem, logits: list[Tensor]) -> Call:
    """A bare C++ op that allocates nothing."""
    return functools.partial(torch.add, logits[0], logits[1], out=torch.empty_like(logits[0]))


_PARTS = {
    "op": Contestant(_op),
    "check_mixture": Contestant(_check_mixture),
    "check_draw": Contestant(_check_draw),
    "choose": Contestant(_choose),
    "pack": Contestant(_pack),
    "add": Contestant(_add),
    "add_out": Contestant(_out),
}
_GRID = Grid(dtypes=("bfloat16",), shapes=((1, 64), (8, 64)), threads=(1,), divergences=DIVERGENCES)

HOST = Case(
    help="what a call costs on tiny inputs: checks, packing, op; beside a bare C++ op of torch",
    backends=("cpu",),
    contestants=_PARTS,
    grids=(_GRID,),
    quick=(_GRID._replace(shapes=((1, 64),), divergences=("reverse_kl",)),),
)
