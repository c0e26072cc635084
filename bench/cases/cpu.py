"""The case `cpu`: the C++ backend beside eager torch, torch.compile and the floors."""

from __future__ import annotations

import functools

from torch import Tensor

from mod_fused.divergence import get_divergence

from ..case import Case, Contestant, Grid, NotTimed, mixtures_only
from ..contestants import compiled, eager, floors
from ..measure import Call
from ..problem import POLICIES, WEIGHTS, Problem


@mixtures_only
def _eager(problem: Problem, logits: list[Tensor]) -> Call:
    return functools.partial(eager.sample, logits, problem.weights, problem.divergence)


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
        "eager": Contestant(
            _eager, call_limit=1.0, log_probs=lambda x, d: eager.probabilities(x, WEIGHTS, d).log()
        ),
        "compile": Contestant(
            mixtures_only(compiled.build),
            slow_to_compile=True,
            # the function that torch.compile gets, run eagerly
            log_probs=lambda x, d: compiled.masses(x, WEIGHTS, get_divergence(d)).log(),
        ),
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
