"""The estimates of the study of policies, made from the decoded answers for its JSON."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mod_fused import world
from mod_fused.reference import divergence_terms

from . import policies, statistics, tabular
from .decoding import Array
from .loop import load
from .policies import CENTRE, CORNERS, EQUAL, MIDPOINTS, Cell, Sizes, Weights, cells
from .statistics import (
    REWARD_SCALE,
    best_of,
    hypervolume,
    interval,
    lead_at_kl,
    mean,
    over_seeds,
    reweighted,
)

#: How many answers the best is chosen from, by the name of the method.
BEST_OF = {f"best of {n}": n for n in (4, 16)}
Record = dict[str, Any]


class Scored(NamedTuple):
    """The result of a method at one weight vector, averaged over a prompt's answers.

    Attributes:
        rewards: [N, 3].
        kl: [N], log pi - log pi_ref of whole answers, in nats; NaN where it has no meaning.
        divergence: [N], terms of the divergence of the tuning; NaN where it has no meaning.
    """

    rewards: Array
    kl: Array
    divergence: Array


def pool_cells(sizes: Sizes) -> list[Cell]:
    """Best-of-n and the optimum, both from the pool, at every weight of the grid."""
    methods = [(name, "none") for name in BEST_OF]
    methods += [("optimum", tuned) for tuned in sizes.divergences]
    at = dict.fromkeys((*sizes.grid, *sizes.key))
    return [Cell(name, tuned, w) for w in at for name, tuned in methods]


class Study:
    """The decoded answers of a work folder."""

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self.work, self.sizes = work, sizes
        parts = [load(work, "pool", part) for part in policies.pool_parts(sizes)]
        self.pool = np.concatenate(parts, axis=1).astype(float)
        self.scored = functools.cache(self._scored)
        self.reference = self.scored(cells(sizes)[0])

    def _scored(self, cell: Cell) -> Scored:
        """The result of a cell. At a corner every method is the single policy, MOD's cell."""
        weights, nowhere = np.array(cell.weights), np.full(len(self.pool), np.nan)
        if cell.method == "optimum":
            rewards, terms = reweighted(self.pool, weights, cell.tuned)
            return Scored(rewards, nowhere, terms)
        if n := BEST_OF.get(cell.method):
            kl = np.full(len(self.pool), statistics.best_of_kl(n))
            return Scored(best_of(self.pool, weights, n), kl, nowhere)
        if cell.weights in CORNERS:
            cell = cell._replace(method="mod", mixed_by=cell.tuned)
        found = load(self.work, "cells", cell)
        rewards, kl = found["rewards"].mean(0), found["kl"]
        if cell.greedy or not found["valid"].all():
            return Scored(rewards, nowhere, nowhere)
        terms = kl if cell.method == "reference" else divergence_terms(cell.tuned, kl)
        return Scored(rewards, kl.mean(0), terms.mean(0))

    def method(self, name: str, tuned: str, weights: Weights, seed: int = 0) -> Scored:
        """The result of a method, given by its name in the tables."""
        mixed_by = tuned if name == "mod" else ""
        cell = Cell(name, tuned, weights, mixed_by, seed=seed, samples=self.sizes.samples)
        return self.scored(cell)

    def lost(self, scored: Scored, tuned: str, weights: Weights) -> Any:
        """(J* - J) / (J* - J(pi_ref)): 0 for the optimum, 1 for the reference."""
        best, w = self.method("optimum", tuned, weights), REWARD_SCALE * np.array(weights)

        def share(r: Array, d: Array, r_best: Array, d_best: Array, r_ref: Array) -> Array:
            top = r_best @ w - d_best
            return (top - (r @ w - d)) / (top - r_ref @ w)

        if np.isnan(scored.divergence).any():
            return None
        arrays = scored.rewards, scored.divergence, best.rewards, best.divergence
        return interval(share, *arrays, self.reference.rewards)


def _estimates(scored: Scored, weights: Weights) -> Record:
    """Each reward, the weighted and the overall reward, KL, and J = 10 w r - D_f."""
    w = np.array(weights)
    out: Record = {name: mean(scored.rewards[:, k]) for k, name in enumerate(world.OBJECTIVES)}
    out["weighted"] = interval(lambda r: r @ w, scored.rewards)
    out["overall"] = interval(lambda r: r.mean(1), scored.rewards)
    if not np.isnan(scored.kl).any():
        out["kl"] = mean(scored.kl)
    if not np.isnan(scored.divergence).any():
        out["objective"] = interval(
            lambda r, d: REWARD_SCALE * r @ w - d, scored.rewards, scored.divergence
        )
    return out


def _cells(study: Study) -> Iterator[Record]:
    for cell in cells(study.sizes):
        found, scored = load(study.work, "cells", cell), study.scored(cell)
        record = cell._asdict() | _estimates(scored, cell.weights)
        record |= {name: round(float(found[name].mean()), 4) for name in ("length", "ended")}
        record["invalid"] = round(float(1.0 - found["valid"].mean()), 4)
        if cell.weights in study.sizes.key and cell.method != "reference":
            record["lost"] = study.lost(scored, cell.tuned, cell.weights)
        yield record
    for cell in pool_cells(study.sizes):
        yield cell._asdict() | _estimates(study.scored(cell), cell.weights) | {"invalid": 0.0}


def _equal_weights(study: Study) -> Iterator[Record]:
    """The paper's main figure: MOD's overall reward at equal weights, relative to the others'.

    The gain is that over the reference. At equal KL, MOD's equal weights are scaled until it has
    the KL of the other; None if no scale of the study has.
    """
    equal = [w for w in EQUAL if w == CENTRE or w in study.sizes.outside]

    def relative_gain(a: Array, b: Array, r: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):  # the other's gain may be 0
            return (a - r) / (b - r) - 1.0

    for tuned, seed in product(study.sizes.divergences, range(study.sizes.train_seeds)):
        ours = study.method("mod", tuned, CENTRE, seed).rewards.mean(1)
        record: Record = {"tuned": tuned, "seed": seed}
        others = {n: study.method(n, tuned, CENTRE, seed) for n in ("soup", "retrained", *BEST_OF)}
        for name, other in others.items():
            record[name] = interval(lambda a, b: a / b - 1.0, ours, other.rewards.mean(1))
        arrays = others["soup"].rewards.mean(1), study.reference.rewards.mean(1)
        gain = interval(relative_gain, ours, *arrays)
        record["gain"] = gain if np.isfinite(gain).all() else None
        if seed == 0:  # other weights than these were decoded with the first training only
            line = [study.method("mod", tuned, w) for w in equal]
            curve = np.stack([s.rewards.mean(1) for s in line], axis=1)  # [N, S]
            curve_kl = np.stack([s.kl for s in line], axis=1)
            for name in ("soup", "retrained"):
                reward, kl = others[name].rewards.mean(1), others[name].kl
                record[f"{name} at its KL"] = lead_at_kl(
                    lambda a, b: b / a - 1.0, reward, kl, curve, curve_kl
                )
        yield record


def _by_seed(study: Study, tuned: str, seed: int) -> dict[str, float]:
    """The figures of one training of all policies; MOD and the soup at the key weights."""
    key, out = study.sizes.key, {}
    for name in ("mod", "soup", "retrained"):
        centre = study.method(name, tuned, CENTRE, seed)
        out[f"overall reward, {name}"] = float(centre.rewards.mean())
        out[f"KL, {name}"] = float(centre.kl.mean())
    for name in ("soup", "retrained"):
        lead = out["overall reward, mod"] / out[f"overall reward, {name}"] - 1.0
        out[f"overall reward, mod over {name}, %"] = 100.0 * lead
    for name in ("mod", "soup"):
        found = [study.method(name, tuned, w, seed) for w in key]
        lost = [study.lost(s, tuned, w).value for s, w in zip(found, key, strict=True)]
        rewards = [s.rewards.mean(0) @ np.array(w) for s, w in zip(found, key, strict=True)]
        out[f"weighted reward over the key weights, {name}"] = float(np.mean(rewards))
        out[f"J lost over the key weights, {name}, %"] = 100.0 * float(np.mean(lost))
        areas = []
        for middle in (w for w in key if w in MIDPOINTS):
            i, j = np.flatnonzero(middle)
            line = [study.method(name, tuned, w, seed) for w in (CORNERS[i], middle, CORNERS[j])]
            areas.append(hypervolume(np.stack([s.rewards.mean(0)[[i, j]] for s in line])))
        out[f"dominated area, mean of the pairs, {name}"] = float(np.mean(areas))
    return out


def _over_seeds(study: Study) -> Iterator[Record]:
    """Every quantity of `_by_seed`: each training's value, and the mean with its interval."""
    for tuned in study.sizes.divergences:
        found = [_by_seed(study, tuned, seed) for seed in range(study.sizes.train_seeds)]
        for what in found[0]:
            values = [x[what] for x in found]
            record: Record = {"tuned": tuned, "what": what}
            record["values"] = [round(x, 5) for x in values]
            yield record | {"mean": over_seeds(values)}


def _trainings(study: Study) -> Iterator[Record]:
    for policy in policies.policies(study.sizes):
        record = load(study.work, "trainings", policy)["record"]
        least = policies.least_loss(policies.load_answers(study.work, policy.seed), policy.weights)
        yield policy._asdict() | record | {"least_loss": least}


def summary(work: Path, sizes: Sizes) -> Record:
    """All estimates that the tables show, from a complete work folder."""
    study = Study(work, sizes)
    parts = {
        "trainings": _trainings,
        "equal_weights": _equal_weights,
        "over_seeds": _over_seeds,
        "cells": _cells,
    }
    found = {name: list(part(study)) for name, part in parts.items()}
    return {"sizes": sizes._asdict(), **found, "tabular": tabular.measure(sizes.worlds)}
