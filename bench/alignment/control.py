"""`python -m bench.alignment.control`: value guidance, reward against KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import command, guided, policies
from .decoding import DECODE_SEED, Array
from .guided import BETA, COLUMNS, LENGTH, PAIR, PANELS, Point, Sizes
from .loop import load
from .statistics import best_of, best_of_kl, lead_at_kl, mean, over_seeds, same_reward_n

Record = dict[str, Any]
CURVE = "CD-FUDGE"  # other methods are compared with it at their KL
CHOSEN = [("by reward", name) for name in (*PANELS, LENGTH)] + [("by scorer", x) for x in PANELS]


class Found(NamedTuple):
    """The answers of one point, or of best-of-N: scores [N, 5] in the order of `guided.COLUMNS`;
    kl [N], log pi* - log pi_base in nats or an estimate of it."""

    point: Point
    scores: Array
    kl: Array

    @property
    def own(self) -> Array:
        """[N], the reward of the first objective."""
        return self.scores[:, COLUMNS.index(self.point.objectives[0])]


def best_of_n(pool: Array, by: str, objective: str, sizes: Sequence[int]) -> list[Found]:
    """Best-of-N for each N from the pool of `guided`, mean over all subsets; KL is the bound."""
    own = by == "by reward"
    column = COLUMNS.index(objective) if own else len(COLUMNS) + PANELS.index(objective)
    found = []
    for n in sizes:
        x = best_of(pool, np.eye(pool.shape[-1])[column], n)[:, : len(COLUMNS)]
        point = Point("one", (objective,), f"best of N {by}", (n,))
        found.append(Found(point, x, np.full(len(x), best_of_kl(n))))
    return found


def estimates(found: Found) -> Record:
    """A record of all columns, KL, and J = r - KL / beta for the first objective."""
    point = found.point
    words = [", ".join(f"{x + 0.0:g}" for x in point.strengths)]  # no minus before 0
    if point.weights:
        words.append("w " + ", ".join(f"{w:g}" for w in point.weights))
    if point.blocks:  # one scorer alone has no strength: it ranks
        words = words[len(point.strengths) == 1 :] + ["K {}, L {}".format(*point.blocks)]
    record: Record = {"objective": point.objectives[0], "method": point.method, "base": point.base}
    record |= {"setting": "; ".join(filter(None, words)), "kl": mean(found.kl)}
    record |= {name: mean(found.scores[:, k]) for k, name in enumerate(COLUMNS)}
    return record | {"reward": mean(found.own), "worth": mean(found.own - found.kl / BETA)}


def compared(p: Found, one: Sequence[Found], best: Mapping[Any, Sequence[Found]]) -> Record:
    """`estimates` with the lead over tokenwise control by CD-FUDGE at the same KL, and for blocks
    by how many times K the N is larger whose best-of-N has the same reward."""
    record, objective = estimates(p), p.point.objectives[0]
    if p.point.method not in ("reference", CURVE):
        curve = [q for q in one if q.point.objectives == p.point.objectives]
        curve = [q for q in curve if q.point.method in ("reference", CURVE)]
        rewards, kl = (np.stack([getattr(q, x) for q in curve], 1) for x in ("own", "kl"))
        record["lead"] = lead_at_kl(np.subtract, p.own, p.kl, rewards, kl)
    if p.point.table == "blocks" and p.point.blocks:
        record["k"], record["block_length"] = p.point.blocks
        for by in ("by reward", "by scorer"):
            others = best[by, objective]
            ns = [q.point.strengths[0] for q in others]
            same = same_reward_n(p.own, np.stack([q.own for q in others], 1), ns)
            record[by] = same and [n / record["k"] for n in same]
    return record


def transferred(found: Sequence[Found], home: Sequence[Found]) -> list[Record]:
    """Records of scorers on bases that they were not trained on: the gain over the base, and how
    much more that is than the gain `home`, on the reference, of the same control."""
    every = [p for p in home if p.point.method in ("reference", CURVE, "blockwise")] + [*found]
    own = {
        (p.point.objectives, p.point.base, p.point.strengths, p.point.blocks): p.own for p in every
    }
    records = []
    for p in found:
        records.append(estimates(p))
        if how := p.point.strengths:
            gains = [
                own[p.point.objectives, base, how, p.point.blocks]
                - own[p.point.objectives, base, (), None]
                for base in (p.point.base, "reference")
            ]
            records[-1] |= {"gain": mean(gains[0]), "more": mean(gains[0] - gains[1])}
    return records


def mix(point: Point) -> tuple[float, ...]:
    """The weights of the objectives: strengths differ from them by a factor."""
    given = point.weights or point.strengths
    return tuple(x / sum(given) for x in given)


def two_objectives(found: Sequence[Found]) -> tuple[list[Record], list[Record]]:
    """For each method and mix the means with their intervals over trainings, J = w.r - KL / beta;
    and for each method the mean J over mixes, and its lead over each other method's."""
    of: dict[tuple[str, tuple[float, ...]], list[Array]] = {}
    for p in found:
        rewards = p.scores[:, [COLUMNS.index(name) for name in PAIR]].mean(0)
        weighted, kl = rewards @ np.array(mix(p.point)), p.kl.mean()
        means = np.array([*rewards, weighted, kl, weighted - kl / BETA])
        of.setdefault((p.point.method, mix(p.point)), []).append(means)
    fields, rows = (*PAIR, "weighted", "kl", "worth"), []
    worth: dict[str, Any] = {}  # by method: [mix, training]
    for (method, weights), group in of.items():
        columns = np.array(group).T
        means = {k: over_seeds(x.tolist()) for k, x in zip(fields, columns, strict=True)}
        rows.append({"method": method, "weights": weights} | means)
        worth.setdefault(method, []).append(columns[-1])
    worth = {method: np.mean(x, axis=0) for method, x in worth.items()}
    over = [
        {"method": name, "worth": over_seeds(mine)}
        | {f"less {other}": over_seeds(mine - worth[other]) for other in worth if other != name}
        for name, mine in worth.items()
    ]
    return rows, over


def without_trainings(pool: Array, sizes: Sizes) -> list[Record]:
    """The same means for the reference and best-of-N by w.r, with their intervals over prompts."""
    rows: list[Record] = []
    for n, weights in product([n for n in (1, 4, 16) if n <= pool.shape[1]], sizes.weights):
        columns = [COLUMNS.index(name) for name in PAIR]
        w = np.zeros(pool.shape[-1])
        w[columns] = weights
        x, kl = best_of(pool, w, n), np.full(len(pool), best_of_kl(n))
        row = {"method": f"best of {n} by reward" if n > 1 else "reference", "weights": weights}
        row |= {name: mean(x[:, k]) for name, k in zip(PAIR, columns, strict=True)}
        rows.append(
            row | {"weighted": mean(x @ w), "kl": mean(kl), "worth": mean(x @ w - kl / BETA)}
        )
    return rows


def trainings(work: Path, sizes: Sizes) -> Record:
    """How far the scorers, MAVIS's iterations and the policies came."""
    out: dict[str, list[Record]] = {"scorers": [], "mavis": [], "policies": []}
    jobs = {phase.title: phase.records for phase in guided.phases(sizes)}
    for scorer in jobs["scorers"]:
        record = dict(zip(("method", "objective", "seed"), scorer, strict=True))
        made = load(work, "scorers", scorer)
        if "history" not in made:
            quarters = {f"quarter {i}": x for i, x in enumerate(made["correlations"], 1)}
            out["scorers"].append(record | {"steps": made["steps"]} | quarters)
            continue
        iterations, best, _ = made["history"]
        for i, it in enumerate(iterations):
            more = {"iteration": i, "kept": "kept" * (i == best), "value": it.objective}
            out["mavis"].append(it._asdict() | record | more)
    for policy in jobs["trainings"]:
        least = policies.least_loss(policies.load_answers(work, policy.seed), policy.weights)
        made = load(work, "trainings", policy)["record"]
        out["policies"].append(policy._asdict() | made | {"least_loss": least})
    return out


def summary(work: Path, sizes: Sizes) -> Record:
    """All estimates that the tables show, from a complete work folder."""
    of: dict[str, list[Found]] = {}
    for point in guided.points(sizes):
        of.setdefault(point.table, []).append(Found(point, **load(work, "points", point)))
    pool = load(work, "pool", DECODE_SEED)
    best = {key: best_of_n(pool, *key, (1, *sizes.best_of)) for key in CHOSEN}
    of["one"] += [p for key, found in best.items() if key[1] != LENGTH for p in found[1:]]
    of["length"] += best["by reward", LENGTH][1:]
    rows, over = two_objectives(of["two"])
    parts = {x: [compared(p, of["one"], best) for p in of[x]] for x in ("one", "blocks", "policy")}
    return {
        "sizes": sizes._asdict(),
        "beta": BETA,
        **parts,
        "length": [estimates(p) for p in of["length"]],
        "transfer": transferred(of["transfer"], of["one"] + of["blocks"]),
        "two": rows + without_trainings(pool, sizes),
        "over": over,
    } | trainings(work, sizes)


if __name__ == "__main__":
    raise SystemExit(command.main("bench.alignment.control", guided, summary))
