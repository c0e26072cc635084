"""`python -m bench.alignment.rules`: the decoder's rules off reverse KL, on f-DPO policies.

Which prefix ratios and which mass Z normalises to (docs/concepts.md), which tokens leave the
support, and resampling whole answers, at weights on and off the simplex.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mod_fused import world
from mod_fused.divergence import DIVERGENCES
from mod_fused.reference import divergence_terms

from . import command, policies
from .decoding import DECODE_SEED, Array, decode, reference
from .loop import Phase, load
from .policies import CENTRE, CORNERS, Policy, Weights
from .statistics import REWARD_SCALE, over_seeds

CUT = {"plausibility": "auto"}
OWN, ZERO = {"sequence_history": True}, {"sequence_history": True, "normalizer": "zero"}
#: By name: the options of `mod_fused.generate`. Under reverse KL history changes nothing.
RULES: dict[str, dict[str, Any]] = {
    "token by token": CUT,
    "token by token, no cut": {},
    "own mass": OWN | CUT,
    "own mass, no cut": OWN,
    "prefix ratios, Z = 0": ZERO | CUT,
    "own mass, one of 4": OWN | CUT | {"num_candidates": 4},
    "own mass, one of 16": OWN | CUT | {"num_candidates": 16},
}
OF_REVERSE_KL = ("token by token", "own mass, one of 4", "own mass, one of 16")


class Sizes(NamedTuple):
    """How much is trained and drawn."""

    train_prompts: int = 1800
    policy_steps: int = 200
    seeds: int = 3  # trainings
    prompts: int = 100  # held out, one answer to each
    divergences: tuple[str, ...] = DIVERGENCES
    weights: tuple[Weights, ...] = (CENTRE, (2 / 3, 2 / 3, 2 / 3))


TINY = Sizes(4, 2, 2, 4, ("reverse_kl", "jsd"), (CENTRE,))


class Cell(NamedTuple):
    """One rule at one weight vector, with the policies of one training."""

    tuned: str
    weights: Weights
    rule: str
    seed: int


def cells(sizes: Sizes) -> list[Cell]:
    """All cells; answers are resampled at the first weights only."""
    every = product(sizes.divergences, sizes.weights, RULES, range(sizes.seeds))
    found = [Cell(*x) for x in every if x[0] != "reverse_kl" or x[2] in OF_REVERSE_KL]
    first = sizes.weights[0]
    return [c for c in found if c.weights == first or "num_candidates" not in RULES[c.rule]]


def _measure(work: Path, sizes: Sizes, cell: Cell) -> dict[str, Array]:
    trained = [Policy(cell.tuned, w, cell.seed) for w in CORNERS]
    models = [reference()[0], *(policies.load_policy(work, p) for p in trained)]
    prompts = world.prompts(sizes.prompts, DECODE_SEED)
    options = {"divergence": cell.tuned} | RULES[cell.rule]
    return decode(models, cell.weights, prompts, **options)


def phases(sizes: Sizes) -> list[Phase]:
    """All jobs."""
    seeds = range(sizes.seeds)
    wanted = [Policy(d, w, s) for s in seeds for d in sizes.divergences for w in CORNERS]
    return [
        Phase("answers", policies.draw_answers, seeds),
        Phase("trainings", policies.train_policy, wanted),
        Phase("cells", _measure, cells(sizes)),
    ]


def _record(work: Path, group: list[Cell]) -> dict[str, Any]:
    """The means over a cell's answers, for each training and with an interval over them; J = 10 w r
    - D_f is None where an answer is invalid."""
    found = [load(work, "cells", cell) for cell in group]
    values: dict[str, list[float]] = {name: [] for name in ("weighted", "kl", "ended", "objective")}
    for cell, x in zip(group, found, strict=True):
        kl = x["kl"].ravel()
        weighted = float((x["rewards"].reshape(-1, 3) @ np.array(cell.weights)).mean())
        terms = divergence_terms(cell.tuned, kl)
        each = weighted, kl.mean(), x["ended"].mean(), REWARD_SCALE * weighted - terms.mean()
        for name, value in zip(values, each, strict=True):
            values[name].append(float(value))
    record: dict[str, Any] = group[0]._asdict() | {
        "invalid": 1.0 - np.mean([x["valid"] for x in found])
    }
    for name, over in values.items():
        record[name] = over_seeds(over) if np.isfinite(over).all() else None
    return record


def summary(work: Path, sizes: Sizes) -> dict[str, Any]:
    """A record for each rule, divergence and weight vector."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells(sizes):
        groups.setdefault(cell[:3], []).append(cell)
    return {"sizes": sizes._asdict(), "rules": [_record(work, group) for group in groups.values()]}


if __name__ == "__main__":
    raise SystemExit(command.main("bench.alignment.rules", sys.modules[__name__], summary))
