"""From the measured arrays in the work folder to one dictionary of estimates, the JSON."""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mod_fused import world

from . import jobs, plan, tabular
from .measuring import Cell, divergence_terms
from .plan import Sizes
from .statistics import (
    REWARD_SCALE,
    best_of,
    best_of_kl,
    hypervolume,
    interval,
    over_seeds,
    reweighted,
)
from .training import least_loss

Array = np.ndarray
BEST_OF = (4, 16)
SCHEMA = 1


class Scored(NamedTuple):
    """What a method reached at one weight vector, averaged over a prompt's answers.

    Attributes:
        rewards: [N, 3].
        kl: [N], log pi - log pi_ref of whole answers, in nats; NaN where it has no meaning.
        divergence: [N], terms of the divergence tuned with; NaN likewise.
    """

    rewards: Array
    kl: Array
    divergence: Array


class Study:
    """The measured cells of a work folder, and estimates from them."""

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self.work, self.sizes = work, sizes
        self.pool = jobs.load_pool(work)
        self.optima: dict[tuple[str, tuple[float, ...]], Scored] = {}
        self.reference = self.scored(plan.REFERENCE._replace(samples=sizes.samples))

    def scored(self, cell: Cell) -> Scored:
        """A cell; at a corner every method is the single policy, which MOD's cell has."""
        if cell.weights in plan.CORNERS and cell.method != "reference":
            cell = cell._replace(method="mod", mixed_by=cell.tuned)
        found = jobs.load(self.work, cell)
        rewards, kl = found["rewards"].mean(0), found["kl"]
        if cell.greedy or not found["valid"].all():
            nowhere = np.full(len(rewards), np.nan)
            return Scored(rewards, nowhere, nowhere)
        terms = kl if cell.method == "reference" else divergence_terms(cell.tuned, kl)
        return Scored(rewards, kl.mean(0), terms.mean(0))

    def mod(self, tuned: str, weights: tuple[float, ...], **fields: Any) -> Cell:
        """The main cell of MOD, or with other fields its variant."""
        cell = Cell("mod", tuned, weights, mixed_by=tuned, samples=self.sizes.samples)
        return cell._replace(**fields)

    def optimum(self, tuned: str, weights: tuple[float, ...]) -> Scored:
        """The optimum for the mixed reward, by reweighting the pool."""
        if (tuned, weights) not in self.optima:
            rewards, terms = reweighted(self.pool, np.array(weights), tuned)
            self.optima[tuned, weights] = Scored(rewards, np.full(len(rewards), np.nan), terms)
        return self.optima[tuned, weights]

    def best_of(self, n: int, weights: tuple[float, ...]) -> Scored:
        """Best-of-n of the reference's answers by the weighted reward."""
        rewards = best_of(self.pool, np.array(weights), n)
        nowhere = np.full(len(rewards), np.nan)
        return Scored(rewards, np.full(len(rewards), best_of_kl(n)), nowhere)

    def method(self, name: str, tuned: str, weights: tuple[float, ...]) -> Scored:
        """Any method by its name in the tables."""
        if name == "reference":
            return self.reference
        if name.startswith("best of "):
            return self.best_of(int(name.removeprefix("best of ")), weights)
        if name == "optimum":
            return self.optimum(tuned, weights)
        cell = self.mod(tuned, weights)
        return self.scored(cell if name == "mod" else cell._replace(method=name, mixed_by=""))

    def estimates(self, scored: Scored, weights: tuple[float, ...]) -> dict[str, Any]:
        """Each reward, the weighted and the overall one, KL, and J = 10 w r - D_f."""
        w = np.array(weights)
        out: dict[str, Any] = {
            name: interval(lambda r, k=k: r[:, k], scored.rewards)
            for k, name in enumerate(world.OBJECTIVES)
        }
        out["weighted"] = interval(lambda r: r @ w, scored.rewards)
        out["overall"] = interval(lambda r: r.mean(1), scored.rewards)
        if not np.isnan(scored.kl).any():
            out["kl"] = interval(lambda k: k, scored.kl)
        if not np.isnan(scored.divergence).any():
            out["objective"] = interval(
                lambda r, d: REWARD_SCALE * r @ w - d, scored.rewards, scored.divergence
            )
        return out

    def lost(self, scored: Scored, tuned: str, weights: tuple[float, ...]) -> Any:
        """(J* - J) / (J* - J(pi_ref)): 0 for the optimum, 1 for the reference."""
        best, w = self.optimum(tuned, weights), REWARD_SCALE * np.array(weights)

        def share(r: Array, d: Array, r_best: Array, d_best: Array, r_ref: Array) -> Array:
            top = r_best @ w - d_best
            return (top - (r @ w - d)) / (top - r_ref @ w)

        if np.isnan(scored.divergence).any():
            return None
        arrays = scored.rewards, scored.divergence, best.rewards, best.divergence
        return interval(share, *arrays, self.reference.rewards)


def _cells(study: Study) -> list[dict[str, Any]]:
    records = []
    for cell in plan.cells(study.sizes):
        found, scored = jobs.load(study.work, cell), study.scored(cell)
        record: dict[str, Any] = cell._asdict() | study.estimates(scored, cell.weights)
        record["length"] = round(float(found["length"].mean()), 2)
        record["ended"] = round(float(found["ended"].mean()), 4)
        record["invalid"] = round(float(1.0 - found["valid"].mean()), 4)
        if cell.weights in study.sizes.key and cell.method != "reference":
            record["lost"] = study.lost(scored, cell.tuned, cell.weights)
        records.append(record)
    return records


def _pool(study: Study) -> list[dict[str, Any]]:
    """Best-of-n and the optimum at every weight of the grid."""
    records = []
    for weights in dict.fromkeys((*study.sizes.grid, *study.sizes.key)):
        named = {f"best of {n}": ("none", study.best_of(n, weights)) for n in BEST_OF}
        for tuned in study.sizes.divergences:
            named[f"optimum {tuned}"] = (tuned, study.optimum(tuned, weights))
        for name, (tuned, scored) in named.items():
            record: dict[str, Any] = {"method": name.split(" alpha")[0], "tuned": tuned}
            record["method"] = "optimum" if tuned != "none" else name
            records.append(record | {"weights": weights} | study.estimates(scored, weights))
    return records


def _pool_growth(study: Study) -> list[dict[str, Any]]:
    """J and the overall reward of the optimum at equal weights, from more and more of the pool."""
    records, w = [], np.array(plan.CENTRE)
    for tuned, shift in product(study.sizes.divergences, (4, 3, 2, 1, 0)):
        size = study.sizes.pool >> shift
        rewards, terms = reweighted(study.pool[:, :size], w, tuned)
        value = float((REWARD_SCALE * rewards @ w - terms).mean())
        record = {"tuned": tuned, "size": size, "overall": round(float(rewards.mean()), 4)}
        records.append(record | {"objective": round(value, 3)})
    return records


def _equal_weights(study: Study) -> list[dict[str, Any]]:
    """The paper's headline: the overall reward at equal weights, MOD against the others."""
    records = []

    def gain(a: Array, b: Array) -> Array:
        return a.mean(1) / b.mean(1) - 1.0

    def share(a: Array, b: Array, r: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):  # the other may gain nothing
            return (a.mean(1) - r.mean(1)) / (b.mean(1) - r.mean(1)) - 1.0

    for tuned, seed in product(study.sizes.divergences, range(study.sizes.train_seeds)):
        mod = study.mod(tuned, plan.CENTRE, seed=seed)
        ours = study.scored(mod).rewards
        others = {
            name: study.scored(mod._replace(method=name, mixed_by="")).rewards
            for name in ("soup", "retrained")
        }
        others |= {f"best of {n}": study.best_of(n, plan.CENTRE).rewards for n in BEST_OF}
        record: dict[str, Any] = {"tuned": tuned, "seed": seed}
        for name, theirs in others.items():
            lead = interval(share, ours, theirs, study.reference.rewards)
            record[name] = {
                "relative": interval(gain, ours, theirs),
                "relative_gain": lead if np.isfinite([*lead.values()]).all() else None,
                "difference": interval(lambda a, b: a.mean(1) - b.mean(1), ours, theirs),
            }
        records.append(record)
    return records


def _lead_at_equal_kl(reward: Array, kl: Array, ours: Array, our_kl: Array) -> Array:
    """[R], from another method's means [R] and ours at several scales [R, S], by interpolation."""
    same = []
    for k, rewards, kls in zip(kl, ours, our_kl, strict=True):
        order = np.argsort(kls)
        same.append(np.interp(k, kls[order], rewards[order]))
    return np.array(same) / reward - 1.0


def _at_equal_kl(study: Study) -> list[dict[str, Any]]:
    """MOD's lead in overall reward where its equal weights are scaled to another method's KL."""
    equal = [w for w in plan.EQUAL if w == plan.CENTRE or w in study.sizes.outside]
    records = []
    for tuned in study.sizes.divergences:
        line = [study.method("mod", tuned, w) for w in equal]
        ours = np.stack([s.rewards.mean(1) for s in line], axis=1)  # [N, S]
        our_kl = np.stack([s.kl for s in line], axis=1)
        record: dict[str, Any] = {"tuned": tuned, "soup": None, "retrained": None}
        for name in ("soup", "retrained"):
            other = study.method(name, tuned, plan.CENTRE)
            if our_kl.mean(0).min() <= other.kl.mean() <= our_kl.mean(0).max():
                arrays = other.rewards.mean(1), other.kl, ours, our_kl
                record[name] = interval(_lead_at_equal_kl, *arrays)
        records.append(record)
    return records


def _hypervolumes(study: Study) -> list[dict[str, Any]]:
    """The area dominated in the plane of two rewards, by the ends and the midpoint, and by all."""
    records = []

    def area(*points: Array) -> Array:
        return np.array([hypervolume(p) for p in np.stack(points, axis=1)])

    for i, j in combinations(range(3), 2):
        line = sorted(w for w in study.sizes.grid if w[i] + w[j] == 1.0)
        few = [w for w in (*plan.CORNERS, *plan.MIDPOINTS) if w[i] + w[j] == 1.0]
        if not set(few) <= set(line):
            continue
        methods = ["mod", "soup", "retrained", *(f"best of {n}" for n in BEST_OF), "optimum"]
        for tuned, name in product(study.sizes.divergences, methods):
            record: dict[str, Any] = {"tuned": tuned, "pair": [i, j], "method": name}
            for label, at in (("three", few), ("line", line)):
                if name != "retrained" or label == "three":
                    points = [study.method(name, tuned, w).rewards[:, [i, j]] for w in at]
                    record[label] = interval(area, *points)
            records.append(record)
    return records


def _grid_means(study: Study) -> list[dict[str, Any]]:
    """Weighted rewards averaged over the grid's weights off the corners, and MOD's lead there."""
    records = []
    inner = [w for w in study.sizes.grid if w not in plan.CORNERS]
    for tuned in study.sizes.divergences:
        found: dict[str, Array] = {}
        for name in ("mod", "soup", *(f"best of {n}" for n in BEST_OF), "optimum"):
            columns = [study.method(name, tuned, w).rewards @ np.array(w) for w in inner]
            found[name] = np.stack(columns, axis=1)  # [N, weights]
        record: dict[str, Any] = {"tuned": tuned, "weights": len(inner)}
        record |= {name: interval(lambda x: x.mean(1), x) for name, x in found.items()}
        leads = [interval(lambda a: a, x) for x in (found["mod"] - found["soup"]).T]
        record["mod above soup"] = sum(lead["low"] > 0 for lead in leads)
        record["mod below soup"] = sum(lead["high"] < 0 for lead in leads)
        records.append(record)
    return records


def _by_seed(study: Study, tuned: str, seed: int) -> dict[str, float]:
    """What one training of all policies gives; MOD and the soup at the key weights."""
    key, out = study.sizes.key, {}

    def cell(name: str, weights: tuple[float, ...]) -> Cell:
        mod = study.mod(tuned, weights, seed=seed)
        return mod if name == "mod" else mod._replace(method=name, mixed_by="")

    for name in ("mod", "soup", "retrained"):
        centre = study.scored(cell(name, plan.CENTRE))
        out[f"overall reward, {name}"] = float(centre.rewards.mean())
        out[f"KL, {name}"] = float(centre.kl.mean())
    for name in ("soup", "retrained"):
        lead = out["overall reward, mod"] / out[f"overall reward, {name}"] - 1.0
        out[f"overall reward, mod over {name}, %"] = 100.0 * lead
    for name in ("mod", "soup"):
        found = [study.scored(cell(name, w)) for w in key]
        lost = [study.lost(s, tuned, w)["value"] for s, w in zip(found, key, strict=True)]
        rewards = [s.rewards.mean(0) @ np.array(w) for s, w in zip(found, key, strict=True)]
        out[f"weighted reward over the key weights, {name}"] = float(np.mean(rewards))
        out[f"J lost over the key weights, {name}, %"] = 100.0 * float(np.mean(lost))
        areas = []
        for middle in (w for w in key if w in plan.MIDPOINTS):
            i, j = np.flatnonzero(middle)
            line = [plan.CORNERS[i], middle, plan.CORNERS[j]]
            points = [study.scored(cell(name, w)).rewards.mean(0)[[i, j]] for w in line]
            areas.append(hypervolume(np.stack(points)))
        out[f"dominated area, mean of the pairs, {name}"] = float(np.mean(areas))
    return out


def _over_seeds(study: Study) -> list[dict[str, Any]]:
    """Every quantity of `_by_seed`: each training's value, and the mean with its interval."""
    records = []
    for tuned in study.sizes.divergences:
        found = [_by_seed(study, tuned, seed) for seed in range(study.sizes.train_seeds)]
        for what in found[0]:
            values = [x[what] for x in found]
            record: dict[str, Any] = {"tuned": tuned, "what": what}
            record["values"] = [round(x, 5) for x in values]
            records.append(record | {"mean": over_seeds(values)})
    return records


def _trainings(study: Study) -> list[dict[str, Any]]:
    out = []
    for policy in plan.policies(study.sizes):
        record = json.loads((study.work / f"{policy.name}.json").read_text())
        answers = jobs.load_answers(jobs.file_of(study.work, ("answers", study.sizes, policy.seed)))
        record["least_loss"] = least_loss(answers, policy.weights)
        out.append(policy._asdict() | record)
    return out


def summary(work: Path, sizes: Sizes, tabular_worlds: int) -> dict[str, Any]:
    """Everything that the report says, from a complete work folder."""
    study = Study(work, sizes)
    return {
        "schema": SCHEMA,
        "sizes": sizes._asdict(),
        "trainings": _trainings(study),
        "equal_weights": _equal_weights(study),
        "over_seeds": _over_seeds(study),
        "equal_kl": _at_equal_kl(study),
        "grid": _grid_means(study),
        "hypervolumes": _hypervolumes(study),
        "cells": _cells(study),
        "pool": _pool(study),
        "pool_growth": _pool_growth(study),
        "tabular": tabular.measure(tabular_worlds),
    }
