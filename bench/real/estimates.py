"""The estimates of the study, made from the decoded answers for its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..alignment.loop import load
from ..alignment.statistics import (
    REWARD_SCALE,
    Array,
    best_of,
    best_of_kl,
    divergence_of_answers,
    hypervolume,
    interval,
    lead_at_kl,
    mean,
    over_seeds,
    resampling_weights,
)
from .decoding import asked, guided
from .jobs import (
    BEYOND,
    CENTRE,
    CORNERS,
    MIDDLE,
    REFERENCE,
    REVERSE_KL,
    Cell,
    Sizes,
    cells,
    name_of,
    policies,
)
from .prompts import TOPICS
from .rewards import OBJECTIVES

Record = dict[str, Any]
SHOWN = 3  # questions whose answers the report shows


class Scored(NamedTuple):
    """A method at one weight vector: means over the answers to a topic, [S, N, ...] for S trainings
    and N topics. Questions of one topic are not independent, topics are. Each training has its own
    questions; of what is not trained S counts these.

    Attributes:
        rewards: [S, N, 3].
        kl: [S, N], log pi - log pi_ref in nats.
        terms: [S, N], of the divergence of the tuning.
        others: [S, N, 4]: tokens, whether it ended, log pi_ref a token, distinct words a word.
    """

    rewards: Array
    kl: Array
    terms: Array
    others: Array

    def values(self, weights: Sequence[float]) -> dict[str, Array]:
        """[S, N] each: weighted reward, KL and J = 10 w r - D_f."""
        weighted = self.rewards @ np.array(weights)
        return {"weighted": weighted, "kl": self.kl,
                "objective": REWARD_SCALE * weighted - self.terms}  # fmt: skip


def by_topic(x: Array, count: int) -> Array:
    """Means over the questions of a topic, from [Q, ...] in the order of `prompts.questions`, for
    the first `count` of them."""
    topics = min(count, len(TOPICS["held out"]))
    return x[:count].reshape(-1, topics, *x.shape[1:]).mean(0)


def best_of_sizes(sizes: Sizes) -> list[int]:
    """The N of best-of-N."""
    return list(dict.fromkeys((4, sizes.pool)))


def over_all(values: Array) -> Record:
    """The mean of [S, N] with its interval over topics, and over trainings where there are
    several."""
    out: Record = {"": mean(values.mean(0))}
    if len(values) > 1:
        out["_over"] = over_seeds(values.mean(1))
    return out


def _distinct(text: str) -> float:
    words = text.lower().split()
    return len(set(words)) / max(1, len(words))


class Study:
    """The decoded answers of a work folder."""

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self.work, self.sizes = work, sizes
        parts = [load(work, "pool", part) for part in range(2)]
        self.pool = np.empty((sizes.prompts, *parts[0].shape[1:]))
        self.pool[::2], self.pool[1::2] = parts
        self.cells = cells(sizes)
        places = enumerate(guided(work, sizes))
        self.guided = [load(work, "guided", place) for place, _ in places]

    def raw(self, cell: Cell) -> dict[str, Array]:
        """The answers of a cell."""
        for chosen, found in self.guided:
            if chosen == cell:
                return found
        return load(self.work, "cells", cell)

    def answers(self, cell: Cell) -> list[Array]:
        """[Q, ...] of one training: rewards, kl, terms and others, means over a question's answers.
        Resampled answers are weighted by the probability of being chosen; their log-ratio is that
        of `rules._means`."""
        found = self.raw(cell)
        kl, chosen = found["kl"], np.ones_like(found["kl"])
        if cell.rule == "resampled":
            w = np.array([x for x in cell.weights if x])
            for n in range(kl.shape[1]):
                ratios = found["log_ratios"][:, n]
                chosen[:, n] = len(kl) * resampling_weights(cell.tuned, w, ratios, kl[:, n])
        with np.errstate(divide="ignore"):  # what is never chosen counts for nothing
            ratio = np.where(chosen > 0, np.log(chosen) + kl, 0.0)
        length = np.maximum(found["length"], 1)
        distinct = np.vectorize(_distinct, otypes=[float])(found["texts"])
        others = [found["length"], found["ended"], found["ref_logprobs"] / length, distinct]
        each = [
            found["rewards"],
            ratio,
            divergence_of_answers(cell.tuned, ratio),
            np.stack(others, -1),
        ]
        return [np.einsum("sn,sn...->n...", chosen, x) / len(kl) for x in each]

    def scored(self, cell: Cell, count: int | None = None) -> Scored:
        """A cell over all its trainings, on its first `count` questions; None: on all."""
        every = (*self.cells, *(c for c, _ in self.guided))
        found = [self.answers(run) for run in every if run == cell._replace(seed=run.seed)]
        if not found:
            raise KeyError(cell)
        if cell == REFERENCE:
            found = [list(xs) for xs in zip(*map(self.parts, found[0]), strict=True)]
        count = count or len(found[0][0])
        return Scored(
            *(np.stack([by_topic(x, count) for x in xs]) for xs in zip(*found, strict=True))
        )

    def parts(self, x: Array) -> list[Array]:
        """[Q, ...] of all held-out questions as those of each training, [S] of [many, ...]."""
        many = self.sizes.many
        return [x[seed * many : (seed + 1) * many] for seed in range(self.sizes.seeds)]

    def best_of(self, n: int, weights: Sequence[float]) -> Scored:
        """Best-of-n of the reference's answers, with the upper bound of its KL."""
        rewards = best_of(self.pool, np.array(weights), n)
        rewards = np.stack([by_topic(x, len(x)) for x in self.parts(rewards)])
        kl = np.full(rewards.shape[:2], best_of_kl(n))
        return Scored(rewards, kl, kl, np.full((*kl.shape, 4), np.nan))


def _estimates(scored: Scored, weights: Sequence[float]) -> Record:
    """Each reward, the weighted one, their mean, KL and J, with intervals."""
    named = {name: scored.rewards[..., i] for i, name in enumerate(OBJECTIVES)}
    named |= scored.values(weights) | {"overall": scored.rewards.mean(-1)}
    out: Record = {}
    for name, values in named.items():
        out |= {name + key: x for key, x in over_all(values).items()}
    names = ("tokens", "ended", "ref_logprob", "distinct")
    if not np.isnan(scored.others).any():
        out |= dict(zip(names, scored.others.mean((0, 1)).round(4).tolist(), strict=True))
    out["trainings"] = scored.rewards.mean(1).round(4).tolist()
    return out | {"topics": scored.kl.shape[1], "seeds": len(scored.kl)}


def _methods(study: Study) -> Iterator[Record]:
    """All cells, trainings together, and best-of-N."""
    chosen = [cell for cell, _ in study.guided]
    for cell in (*dict.fromkeys(c._replace(seed=0) for c in study.cells), *chosen):
        found = study.scored(cell)
        count = study.sizes.many if cell == REFERENCE else getattr(study.sizes, cell.asked)
        record = cell._asdict() | _estimates(found, cell.weights)
        yield record | {"asked": count * len(found.kl)}
    for n in best_of_sizes(study.sizes):
        for w in (*CORNERS[:2], *study.sizes.line, CENTRE):
            name = {
                "method": f"best of {n}",
                "tuned": "",
                "weights": w,
                "rule": "",
                "strength": 0.0,
            }
            found = _estimates(study.best_of(n, w), w)
            yield name | {"asked": study.sizes.prompts} | found


def _leads(study: Study) -> Iterator[Record]:
    """One method less another, in pairs: weighted reward, KL and J."""
    sizes, chosen = study.sizes, [cell for cell, _ in study.guided]
    mod = Cell("mod", REVERSE_KL, MIDDLE)
    few, fewest = mod._replace(asked="few"), mod._replace(asked="fewest")
    second = few._replace(tuned=sizes.other)
    pairs = [(mod._replace(weights=w), mod._replace(weights=w, method="soup"))
             for w in (MIDDLE, CENTRE)]  # fmt: skip
    pairs += [(few._replace(weights=w), few._replace(weights=w, method="soup"))
              for w in (*sizes.line, *sizes.outside) if w != MIDDLE]  # fmt: skip
    pairs += [(mod._replace(weights=w), few._replace(weights=w, method="retrained"))
              for w in (MIDDLE, CENTRE)]  # fmt: skip
    pairs += [(mod, cell) for cell in chosen if cell.weights == MIDDLE]
    pairs.append((fewest._replace(rule="resampled"), mod))
    pairs += [(second._replace(rule="own mass"), second), (second, second._replace(method="soup"))]
    pairs.append((second._replace(rule="resampled", asked="fewest"), second))
    pairs += [(few._replace(method=x), mod) for x in ("sizes", "sizes, corrected")]
    compared = []
    for first, less in pairs:
        count = min(getattr(sizes, cell.asked) for cell in (first, less))
        names = {"method": first.method, "rule": first.rule, "less": less.method}
        names |= {"less_rule": less.rule, "tuned": first.tuned, "weights": first.weights}
        both = study.scored(first, count), study.scored(less, count)
        compared.append((names | {"asked": count}, *both))
    for n, w in product(best_of_sizes(sizes), (MIDDLE, CENTRE)):
        first = mod._replace(weights=w)
        names = {"method": "mod", "rule": first.rule, "less": f"best of {n}", "less_rule": ""}
        names |= {"tuned": first.tuned, "weights": w, "asked": sizes.many}
        compared.append((names, study.scored(first), study.best_of(n, w)))
    for names, one, other in compared:
        record: Record = dict(names)
        a, b = (x.values(names["weights"]) for x in (one, other))
        for name in a:
            runs = min(len(a[name]), len(b[name]))
            found = over_all(a[name][:runs] - b[name][:runs])
            record |= {name + key: x for key, x in found.items()}
        yield record | {"asked": runs * names["asked"], "seeds": runs}


def _at_kl(study: Study) -> Iterator[Record]:
    """MOD's weighted reward less the soup's at the soup's KL. MOD's own line goes through the
    reference, the weights and twice the weights; the policies are those of the first training."""
    sizes = study.sizes
    for w, beyond in zip((MIDDLE, CENTRE), BEYOND, strict=True):
        line = [REFERENCE, Cell("mod", REVERSE_KL, w),
                Cell("mod", REVERSE_KL, beyond, asked="few")]  # fmt: skip
        values = [study.scored(cell, sizes.few).values(w) for cell in line]
        rewards, kl = (np.stack([x[name][0] for x in values], 1) for name in ("weighted", "kl"))
        soup = study.scored(Cell("soup", REVERSE_KL, w), sizes.few).values(w)
        own = soup["weighted"][0], soup["kl"][0]
        record: Record = {"weights": w, "soup": mean(own[1]), "mod": mean(kl[:, 1])}
        record["lead"] = lead_at_kl(lambda soups, mods: mods - soups, *own, rewards, kl)
        yield record | {"asked": sizes.few}


def _ratio(over: Array, by: Array) -> Array:
    """over / by - 1, NaN where by is 0."""
    return over / np.where(by == 0.0, np.nan, by) - 1.0


def _paper(study: Study) -> Iterator[Record]:
    """The paper's main figure: MOD's overall reward (the mean of the three) at equal weights over
    the soup's, relative; and its gain over the reference's, relative to the soup's gain."""
    ours, soup = (study.scored(Cell(x, REVERSE_KL, CENTRE)) for x in ("mod", "soup"))
    base = study.scored(REFERENCE)
    a, b, r = (x.rewards.mean(-1) for x in (ours, soup, base))
    means = a.mean(0), b.mean(0), r.mean(0)
    found = {
        "MOD's overall reward over the soup's": interval(_ratio, *means[:2]),
        "the same, over trainings (Student's t)": over_seeds(_ratio(a.mean(1), b.mean(1))),
        "MOD's gain over the soup's gain": interval(lambda x, y, z: _ratio(x - z, y - z), *means),
    }
    for what, x in found.items():
        yield {"what": what, "x": x if np.isfinite(x).all() else None}


def _areas(study: Study) -> Iterator[Record]:
    """The area that the line of weights dominates in the plane of its two rewards, beyond those of
    the reference."""
    few = study.sizes.few
    base = study.scored(REFERENCE, few).rewards[..., :2]
    corners = [Cell("mod", REVERSE_KL, w) for w in CORNERS[:2]]
    lines: dict[str, list[Array]] = {}
    for method in ("mod", "soup"):
        between = [Cell(method, REVERSE_KL, w, asked="many" if w == MIDDLE else "few")
                   for w in study.sizes.line]  # fmt: skip
        line = (study.scored(cell, few).rewards[..., :2] for cell in (*corners, *between))
        lines[method] = list(line)  # [S, N, 2] each

    def area(origin: Array, *points: Array) -> Array:
        every = np.stack(points, 1) - origin[:, None]  # [R, P, 2]
        return np.array([hypervolume(np.maximum(one, 0.0)) for one in every])

    def lead(origin: Array, *points: Array) -> Array:
        half = len(points) // 2
        return area(origin, *points[:half]) - area(origin, *points[half:])

    both = [*lines["mod"], *lines["soup"]]
    ways = {
        "mod": (area, lines["mod"]),
        "soup": (area, lines["soup"]),
        "MOD less soup": (lead, both),
    }
    for method, (measured, line) in ways.items():
        record: Record = {"method": method}
        record["area"] = interval(measured, base.mean(0), *(x.mean(0) for x in line))
        if len(line[0]) > 1:
            runs = measured(base.mean(1), *(x.mean(1) for x in line))
            record["over"] = over_seeds(runs)
        yield record


def _samples(study: Study) -> Iterator[Record]:
    """Answers of the first training to the first questions, and the one with the most reward."""
    mod = Cell("mod", REVERSE_KL, MIDDLE)
    named = {"reference": REFERENCE}
    for i, w in enumerate(CORNERS):
        asked_of = "few" if w == CORNERS[2] else "many"
        named[f"policy {OBJECTIVES[i]}"] = mod._replace(weights=w, asked=asked_of)
    named |= {"MOD, half each": mod, "soup, half each": mod._replace(method="soup")}
    named["MOD, weights 1 and 1"] = mod._replace(weights=study.sizes.outside[0], asked="few")
    for name, cell in named.items():
        found = study.raw(cell)
        texts, rewards = found["texts"][0], found["rewards"][0]
        weights = np.array(cell.weights) if any(cell.weights) else np.ones(3)
        best = int((rewards @ weights).argmax())
        for n in (*range(min(SHOWN, len(texts))), best):
            record: Record = {"method": name, "question": asked(study.sizes, cell)[n]}
            record |= {"answer": texts[n], "most reward": n == best}
            yield record | dict(zip(OBJECTIVES, rewards[n].tolist(), strict=True))


def summary(work: Path, sizes: Sizes) -> Record:
    """All estimates that the tables show, from a complete work folder."""
    study = Study(work, sizes)
    trainings = [
        {"policy": name_of(p)} | checkpoint
        for p in policies(sizes)
        for checkpoint in load(work, "trainings", p)["checkpoints"]
    ]
    scorers = [{"objective": x, "steps": (found := load(work, "scorers", x))["steps"]}
               | {f"quarter {i}": c for i, c in enumerate(found["correlations"], 1)}
               for x in OBJECTIVES[:2]]  # fmt: skip
    return {
        "sizes": sizes._asdict(),
        "trainings": trainings,
        "pruned": load(work, "pruned", "model"),
        "scorers": scorers,
        "methods": list(_methods(study)),
        "leads": list(_leads(study)),
        "paper": list(_paper(study)),
        "at_kl": list(_at_kl(study)),
        "areas": list(_areas(study)),
        "samples": list(_samples(study)),
    }
