"""`python -m bench.alignment.control`: value guidance, reward against KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mod_fused import world
from mod_fused.training import embedded_policies as train

from . import command, guided, policies
from .decoding import DECODE_SEED, Array
from .guided import BETA, LENGTH, PAIR, PANELS, Point, Sizes
from .loop import load
from .statistics import best_of, best_of_kl, interval, lead_at_kl, mean, over_seeds, same_reward_n

Record = dict[str, Any]
CURVE = "CD-FUDGE"  # other methods are compared with it at their KL


class Found(NamedTuple):
    """The answers of one point.

    Attributes:
        point: see `guided.Point`.
        rewards: [N, 3].
        kl: [N] nats: log pi* - log pi_base, or an estimate.
        length: [N] tokens.
    """

    point: Point
    rewards: Array
    kl: Array
    length: Array

    @property
    def own(self) -> Array:
        """[N]: the reward of the point's first objective."""
        name = self.point.objectives[0]
        if name == LENGTH:
            return np.log(self.length / train.MAX_NEW_TOKENS)
        return self.rewards[:, world.OBJECTIVES.index(name)]


def setting(point: Point) -> str:
    """What tells apart the points of one method."""
    words = [", ".join(f"{x:g}" for x in point.strengths)]
    if point.blocks and point.strengths == (1.0,):
        words = []
    if point.weights:
        words.append("w " + ", ".join(f"{w:g}" for w in point.weights))
    if point.blocks:
        words.append("K {}, L {}".format(*point.blocks))
    return "; ".join(filter(None, words))


def estimates(found: Found) -> Record:
    """A record of rewards, KL, length, and J = r - KL / beta for the first objective."""
    point = found.point
    record: Record = {"objective": point.objectives[0], "method": point.method, "base": point.base}
    record |= {"setting": setting(point), "kl": mean(found.kl), "length": mean(found.length)}
    record |= {name: mean(found.rewards[:, k]) for k, name in enumerate(world.OBJECTIVES)}
    return record | {"reward": mean(found.own), "worth": mean(found.own - found.kl / BETA)}


def lead(p: Found, one: Sequence[Found]) -> Record:
    """A point's lead over tokenwise control by CD-FUDGE at the same KL."""
    curve = [
        q for q in one
        if q.point.objectives == p.point.objectives and q.point.method in ("reference", CURVE)
    ]  # fmt: skip
    if p.point.method in ("reference", CURVE):
        return {}
    rewards, kl = (np.stack([getattr(q, x) for q in curve], 1) for x in ("own", "kl"))
    return {"lead": lead_at_kl(np.subtract, p.own, p.kl, rewards, kl)}


class Pool:
    """Best-of-N from the pool of `guided`, the mean over all subsets."""

    def __init__(self, pool: Array, sizes: Sequence[int]) -> None:
        lengths = np.log(pool[..., -1:] / train.MAX_NEW_TOKENS)
        self.pool, self.sizes = np.concatenate([pool, lengths], -1), sizes
        self.columns = {f"by scorer, {name}": 3 + i for i, name in enumerate(PANELS)}
        self.columns |= {f"by reward, {name}": k for k, name in enumerate(world.OBJECTIVES)}
        self.columns[f"by reward, {LENGTH}"] = -1

    def best(self, by: str, objective: str, n: int) -> Array:
        """[N, 7]: all columns of the best of n "by reward" or "by scorer"."""
        chosen = np.zeros(self.pool.shape[-1])
        chosen[self.columns[f"{by}, {objective}"]] = 1.0
        return best_of(self.pool, chosen, n)

    def records(self, by: str, objective: str) -> list[tuple[Record, Found]]:
        """A record of `estimates` for each n, with its answers; KL is the upper bound."""
        out = []
        for n in self.sizes:
            x = self.best(by, objective, n)
            point = Point("one", (objective,), f"best of N {by}")
            found = Found(point, x[:, :3], np.full(len(x), best_of_kl(n)), x[:, 5])
            own = x[:, self.columns[f"by reward, {objective}"]]
            exact = {"setting": str(n), "reward": mean(own), "worth": mean(own - found.kl / BETA)}
            out.append((estimates(found) | exact, found))
        return out

    def times(self, p: Found) -> Record:
        """By reward and by scorer: how many times K the N is that has the same reward."""
        assert p.point.blocks is not None
        out: Record = dict(zip(("k", "block_length"), p.point.blocks, strict=True))
        objective = p.point.objectives[0]
        column, ns = self.columns[f"by reward, {objective}"], (1, *self.sizes)
        for by in ("by reward", "by scorer"):
            curve = np.stack([self.best(by, objective, n)[:, column] for n in ns], 1)
            found = same_reward_n(p.own, curve, ns)
            out[by] = found and [x / out["k"] for x in found]
        return out


def transferred(found: Sequence[Found]) -> list[Record]:
    """Records of a scorer on bases that it was not trained on: the gain over the base, and how much
    more that is than the gain of the same control on the scorer's own reference."""
    at = {(p.point.objectives, p.point.base, p.point.method, setting(p.point)): p for p in found}
    records = []
    for (objectives, base, method, how), p in at.items():
        record = estimates(p)
        if method != "base":
            start = at[objectives, base, "base", ""].own
            home = [at[(objectives, "reference", *x)].own for x in ((method, how), ("base", ""))]
            record["gain"] = interval(np.subtract, p.own, start)
            if base != "reference":
                record["more"] = mean(p.own - start - (home[0] - home[1]))
        records.append(record)
    return records


def _mix(point: Point) -> tuple[float, ...]:
    """The weights of the objectives: strengths differ from them by a factor."""
    given = point.weights or point.strengths
    return tuple(x / sum(given) for x in given)


def two_objectives(found: Sequence[Found]) -> tuple[list[Record], list[Record]]:
    """For each method and mix the means with their intervals over trainings, J = w.r - KL / beta;
    and for each method the mean J over mixes, and its lead over each other method's."""
    of: dict[tuple[str, tuple[float, ...]], list[Record]] = {}
    for p in found:
        columns = p.rewards[:, [world.OBJECTIVES.index(name) for name in PAIR]]
        means = dict(zip(PAIR, columns.mean(0), strict=True)) | {"kl": p.kl.mean()}
        means["weighted"] = columns.mean(0) @ np.array(_mix(p.point))
        means["worth"] = means["weighted"] - means["kl"] / BETA
        of.setdefault((p.point.method, _mix(p.point)), []).append(means)
    rows = [
        {"method": method, "weights": mix}
        | {name: over_seeds([one[name] for one in group]) for name in group[0]}
        for (method, mix), group in of.items()
    ]
    worth: dict[str, Array] = {}  # of each training
    for name in dict.fromkeys(name for name, _ in of):
        groups = [[one["worth"] for one in group] for (by, _), group in of.items() if by == name]
        worth[name] = np.mean(groups, axis=0)
    over = [
        {"method": name, "worth": over_seeds(mine)}
        | {f"less {other}": over_seeds(mine - worth[other]) for other in worth if other != name}
        for name, mine in worth.items()
    ]
    return rows, over


def trainings(work: Path, sizes: Sizes) -> Record:
    """How far the scorers, the policies and MAVIS's iterations came."""
    records: dict[str, list[Record]] = {"scorers": [], "mavis": [], "policies": []}
    by_title = {phase.title: phase.records for phase in guided.phases(sizes)}
    for scorer in by_title["scorers"]:
        record = dict(zip(("method", "objective", "seed"), scorer, strict=True))
        made = load(work, "scorers", scorer)
        if record["method"] != "mavis":
            quarters = {f"quarter {i}": x for i, x in enumerate(made["correlations"], 1)}
            records["scorers"].append(record | {"steps": made["steps"]} | quarters)
            continue
        for i, it in enumerate(made["history"].iterations):
            records["mavis"].append(
                record | {"iteration": i, "reward": it.reward, "kl": it.kl, "value": it.objective}
                | {"error": it.error, "kept": "kept" * (i == made["history"].best)}
            )  # fmt: skip
    for policy in by_title["trainings"]:
        answers = policies.load_answers(work, policy.seed)
        record = policy._asdict() | load(work, "trainings", policy)["record"]
        record["least_loss"] = policies.least_loss(answers, policy.weights)
        records["policies"].append(record)
    return records


def summary(work: Path, sizes: Sizes) -> Record:
    """All estimates that the tables show, from a complete work folder."""
    tables: dict[str, list[Found]] = {}
    for point in guided.points(sizes):
        tables.setdefault(point.table, []).append(Found(point, **load(work, "points", point)))
    pool = Pool(load(work, "pool", DECODE_SEED), sizes.best_of)
    one = tables["one"]
    best = [x for name in PANELS for by in ("by reward", "by scorer")
            for x in pool.records(by, name)]  # fmt: skip
    rows, over = two_objectives(tables["two"])
    return {
        "sizes": sizes._asdict(),
        "beta": BETA,
        "points": [estimates(p) | lead(p, one) for p in one]
        + [record | lead(p, one) for record, p in best],
        "blocks": [estimates(p) | lead(p, one) | pool.times(p) for p in tables["blocks"]],
        "policy": [estimates(p) | lead(p, one) for p in tables["policy"]],
        "length": [estimates(p) for p in tables["length"]]
        + [record for record, _ in pool.records("by reward", LENGTH)],
        "transfer": transferred(tables["transfer"]),
        "two": rows,
        "over": over,
    } | trainings(work, sizes)


if __name__ == "__main__":
    raise SystemExit(command.main("bench.alignment.control", guided, summary))
