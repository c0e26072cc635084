"""`python -m bench.alignment.control`: value guidance, reward against KL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mod_fused import world

from . import command, guided
from .decoding import DECODE_SEED, Array
from .guided import BETA, PAIR, PAIR_COLUMNS, PANELS, Sizes
from .loop import load
from .statistics import best_of, best_of_kl, lead_at_kl, mean

Record = dict[str, Any]
CURVES = ("CD-FUDGE", "CD-FUDGE, as CD-Q")  # other methods are compared with these curves


class Found(NamedTuple):
    """The result of one method at one setting.

    Attributes:
        objective, method, setting: see `guided.Point`.
        rewards: [N, 3].
        kl: [N] nats: log pi* - log pi_ref of the answers, or the bound on KL where `bound`.
    """

    objective: str
    method: str
    setting: Any
    rewards: Array
    kl: Array
    bound: bool = False


def _best_of_n(work: Path, sizes: Sizes) -> list[Found]:
    """Best-of-N by the true reward and by the scorers, the mean over subsets of one pool."""
    pool, out = load(work, "pool", DECODE_SEED), []
    for i, objective in enumerate(PANELS):
        for name, column in (("reward", world.OBJECTIVES.index(objective)), ("scorer", 3 + i)):
            for n in sizes.best_of:
                chosen = best_of(pool, np.eye(5)[column], n)[:, :3]
                kl = np.full(len(pool), best_of_kl(n))
                out.append(Found(objective, f"best of N, {name}", n, chosen, kl, True))
    return out


def estimates(found: Found) -> Record:
    """A record of all rewards and KL; for two objectives also w.r and J = w.r - KL / beta."""
    record: Record = {name: getattr(found, name) for name in ("objective", "method", "setting")}
    record |= {"bound": found.bound, "kl": mean(found.kl)}
    record |= {name: mean(found.rewards[:, k]) for k, name in enumerate(world.OBJECTIVES)}
    if found.objective == "both":
        weighted = found.rewards[:, PAIR_COLUMNS] @ np.array(found.setting)
        record |= {"weighted": mean(weighted), "worth": mean(weighted - found.kl / BETA)}
    return record


def leads(p: Found, found: Sequence[Found]) -> Record:
    """A point's lead over tokenwise control by the shipped scorer at the same KL, and CD-Q's lead
    over CD-FUDGE of the same training; by the name of the curve that it is compared with."""
    column, out = world.OBJECTIVES.index(p.objective), {}
    against = [] if p.method in ("reference", CURVES[0]) or p.method.startswith("under ") else [0]
    for name in [CURVES[i] for i in against + [1] * (p.method == "CD-Q")]:
        own = ("reference", name)  # the reference has strength 0
        curve = [q for q in found if q.objective == p.objective and q.method in own]
        rewards = np.stack([q.rewards[:, column] for q in curve], 1)
        kl = np.stack([q.kl for q in curve], 1)
        out[name] = lead_at_kl(np.subtract, p.rewards[:, column], p.kl, rewards, kl)
    return out


def worth_differences(found: Sequence[Found]) -> list[Record]:
    """J of MAVIS less that of each other method, paired by prompt, mean over common weights."""
    worth: dict[str, dict[Any, Array]] = {}
    for p in found:
        weighted = p.rewards[:, PAIR_COLUMNS] @ np.array(p.setting)
        worth.setdefault(p.method, {})[p.setting] = np.stack([weighted, p.kl], 1)
    mavis, records = worth.pop("MAVIS"), []
    for name, theirs in worth.items():
        gap = np.mean([mavis[at] - there for at, there in theirs.items()], axis=0)  # [N, 2]
        record = {"against": name, "weights": len(theirs), "weighted": mean(gap[:, 0])}
        record |= {"kl": mean(gap[:, 1]), "worth": mean(gap[:, 0] - gap[:, 1] / BETA)}
        records.append(record)
    return records


def summary(work: Path, sizes: Sizes) -> Record:
    """All estimates that the tables show, from a complete work folder."""
    found = []
    for point in guided.points(sizes):
        arrays, bound = load(work, "points", point), point.method == "blockwise"
        found.append(Found(*point, arrays["rewards"], arrays["kl"], bound))
    one = _best_of_n(work, sizes) + [p for p in found if p.objective != "both"]
    two = [p for p in found if p.objective == "both"]
    return {
        "sizes": sizes._asdict(),
        "beta": BETA,
        "points": [estimates(p) | leads(p, one) for p in one],
        "mavis": [
            {"objective": name, "iteration": i, "reward": it.reward, "kl": it.kl}
            | {"value": it.objective, "error": it.error}
            for name in PAIR
            for i, it in enumerate(load(work, "scorers", ("mavis", name))["history"])
        ],
        "two": [estimates(p) for p in two],
        "differences": worth_differences(two),
    }


if __name__ == "__main__":
    raise SystemExit(command.main("bench.alignment.control", guided, summary))
