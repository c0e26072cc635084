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
from .statistics import REWARD_SCALE, over_seeds, resampling_weights

CUT = {"plausibility": "auto"}
OWN, ZERO = {"sequence_history": True}, {"sequence_history": True, "normalizer": "zero"}
#: By name: the options of `mod_fused.generate`. Under reverse KL history changes nothing.
RULES: dict[str, dict[str, Any]] = {
    "token by token": CUT,
    "token by token, no cut": {},
    "own mass": OWN | CUT,
    "own mass, no cut": OWN,
    "prefix ratios, Z = 0": ZERO | CUT,
    "own mass, resampled": OWN | CUT,
}
OF_REVERSE_KL = ("token by token", "own mass, resampled")
POOL = 16  # answers to each prompt where they are resampled
ONE_OF = (1, 4, 16)


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
    """All cells; answers are resampled at the first weights only, because they cost the most."""
    every = product(sizes.divergences, sizes.weights, RULES, range(sizes.seeds))
    found = [Cell(*x) for x in every if x[0] != "reverse_kl" or x[2] in OF_REVERSE_KL]
    first = sizes.weights[0]
    return [c for c in found if c.weights == first or not c.rule.endswith("resampled")]


def _measure(work: Path, sizes: Sizes, cell: Cell) -> dict[str, Array]:
    trained = [Policy(cell.tuned, w, cell.seed) for w in CORNERS]
    models = [reference()[0], *(policies.load_policy(work, p) for p in trained)]
    prompts = world.prompts(sizes.prompts, DECODE_SEED)
    options = {"divergence": cell.tuned} | RULES[cell.rule]
    samples = POOL if cell.rule.endswith("resampled") else 1
    return decode(models, cell.weights, prompts, samples, **options)


def phases(sizes: Sizes) -> list[Phase]:
    """All jobs."""
    seeds = range(sizes.seeds)
    wanted = [Policy(d, w, s) for s in seeds for d in sizes.divergences for w in CORNERS]
    return [
        Phase("answers", policies.draw_answers, seeds),
        Phase("trainings", policies.train_policy, wanted),
        Phase("cells", _measure, cells(sizes)),
    ]


def _means(cell: Cell, found: dict[str, Array], one_of: int) -> list[float]:
    """Weighted reward, KL, share that ended and J = 10 w r - D_f, where one of every `one_of`
    answers to a prompt is chosen by its weight W.

    The means are those over the choice, too. The log-ratio is log(one_of W q / pi_ref): that of
    drawing the candidates from q and choosing one, against drawing this one from the reference and
    the others from q. The divergence of the two is at least that of the answer alone, so that KL
    and J err against resampling.
    """
    w, kl = np.array(cell.weights), found["kl"]
    chosen = np.ones_like(kl)  # [S, N], one_of W
    if one_of > 1:
        for prompt, start in product(range(kl.shape[1]), range(0, len(kl), one_of)):
            at = slice(start, start + one_of), prompt
            ratios = found["log_ratios"][at]
            chosen[at] = one_of * resampling_weights(cell.tuned, w, ratios, kl[at])
    with np.errstate(divide="ignore"):  # what is never chosen counts for nothing
        log_ratio = np.where(chosen > 0, np.log(chosen) + kl, 0.0)
    each = found["rewards"] @ w, log_ratio, found["ended"], divergence_terms(cell.tuned, log_ratio)
    weighted, kl_mean, ended, terms = (float((chosen * x).mean()) for x in each)
    return [weighted, kl_mean, ended, REWARD_SCALE * weighted - terms]


def _record(work: Path, group: list[Cell], one_of: int | None = None) -> dict[str, Any]:
    """The means over a cell's answers, over the trainings with an interval; J is None where an
    answer is invalid. With `one_of` its name says so, and "gain" is J less that of one of 1."""
    found = [load(work, "cells", cell) for cell in group]
    record: dict[str, Any] = group[0]._asdict() | {
        "invalid": 1.0 - np.mean([x["valid"] for x in found])
    }
    means = [_means(cell, x, one_of or 1) for cell, x in zip(group, found, strict=True)]
    for name, over in zip(
        ("weighted", "kl", "ended", "objective"), zip(*means, strict=True), strict=True
    ):
        record[name] = over_seeds(over) if np.isfinite(over).all() else None
    if one_of:
        record["rule"] = f"{group[0].rule}, one of {one_of}"
        plain = [_means(cell, x, 1)[-1] for cell, x in zip(group, found, strict=True)]
        record["gain"] = over_seeds([x[-1] - j for x, j in zip(means, plain, strict=True)])
    return record


def summary(work: Path, sizes: Sizes) -> dict[str, Any]:
    """A record for each rule, divergence and weight vector."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells(sizes):
        groups.setdefault(cell[:3], []).append(cell)
    records = [
        _record(work, group, one_of)
        for (*_, rule), group in groups.items()
        for one_of in (ONE_OF if rule.endswith("resampled") else (None,))
    ]
    return {"sizes": sizes._asdict(), "rules": records}


if __name__ == "__main__":
    raise SystemExit(command.main("bench.alignment.rules", sys.modules[__name__], summary))
