"""The tables of all studies, from their JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from mod_fused import world

from .. import report
from . import policies, tabular
from .estimates import BEST_OF
from .guided import PAIR, PANELS

Record = dict[str, Any]
Section = tuple[str, Iterable[Record], str]  # title, rows, columns
METHODS = ("mod", "soup", "retrained")
_COLUMN = re.compile(
    r"(?P<field>.+?) (?P<interval>\(?)(?P<sign>\+?)(?P<digits>\d)(?P<percent>%?)\)?"
)


def figure(record: Record, column: str) -> str:
    """One cell. `kl 2` is the field with 2 digits, `kl (2)` with its interval, `lost 1%` in per
    cent, `gap +3` with its sign. Any other column is a field as it is. Empty without the field."""
    form = _COLUMN.fullmatch(column)
    x = record.get(form["field"] if form else column)
    if x is None:
        return ""
    if form is None and isinstance(x, list):
        return ", ".join(f"{y:.2g}" for y in x)
    if form is None or isinstance(x, str):
        return f"{x:g}" if isinstance(x, float) else str(x)
    scale = 100.0 if form["percent"] else 1.0
    numbers = [f"{scale * y:{form['sign']}.{form['digits']}f}" for y in _listed(x)]
    if form["interval"] and len(numbers) == 3:
        return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"
    return numbers[0]


def _listed(x: Any) -> list[float]:
    return x if isinstance(x, list) else [x]


def table(records: Iterable[Record], columns: str) -> str:
    """A Markdown table. `columns` is "heading = column | ..." with columns as in `figure`; a
    heading alone names its column too."""
    pairs = [column.split(" = ") for column in columns.split(" | ")]
    rows = [[figure(record, pair[-1]) for pair in pairs] for record in records]
    return report.markdown_table([pair[0] for pair in pairs], rows)


def mean(records: Sequence[Record]) -> Record:
    """The means over cells of the fields that all of them have."""
    fields = [k for k, x in records[0].items() if isinstance(x, (float, list)) and k != "weights"]
    known = [k for k in fields if all(r.get(k) is not None for r in records)]
    return {k: sum(_listed(r[k])[0] for r in records) / len(records) for k in known}


class Cells:
    """The cells of the study of policies."""

    def __init__(self, result: Record) -> None:
        self.result = result
        self.divergences = result["sizes"]["divergences"]
        self.key = result["sizes"]["key"]

    def one(self, weights: Sequence[float], method: str, tuned: str, **fields: Any) -> Record:
        """The cell of a method at a weight vector, the one with the most answers. Fields that are
        not named have their main values. At a corner the soup is the single policy, MOD's cell.
        Empty if there is no such cell."""
        if method == "soup" and tuple(weights) in policies.CORNERS:
            method = "mod"
        wanted = {"method": method, "weights": report.rounded(weights), "greedy": False}
        wanted |= {"tuned": "none" if method in ("reference", *BEST_OF) else tuned}
        wanted |= {"history": False, "normalizer": "exact", "seed": 0}
        wanted |= {"mixed_by": tuned if method == "mod" else ""} | fields
        found = [r for r in self.result["cells"] if wanted.items() <= r.items()]
        return max(found, key=lambda r: r["samples"], default={})

    def at(self, places: Iterable[Sequence[float]], *methods: str) -> Iterable[Record]:
        """The cells of all divergences and methods; "mod, Z = 0" is one of them."""
        for w, d, name in product(places, self.divergences, methods):
            fields = {"normalizer": "zero"} if name.endswith("Z = 0") else {}
            if found := self.one(w, name.removesuffix(", Z = 0"), d, **fields):
                if unsolved := found["invalid"]:
                    found = {"tuned": d, "weights": w, "helpful": f"no solution: {unsolved:.0%}"}
                yield found | {"name": name}


def _without_policies(t: Cells) -> Iterable[Record]:
    yield t.one((0.0,) * 3, "reference", "") | {"name": "reference"}
    for w, name in product(t.key, BEST_OF):
        yield t.one(w, name, "") | {"name": name}


def _over_key(t: Cells) -> Iterable[Record]:
    """Means of the first training over the key weights; "no solution" where a cell has none."""
    ways: dict[tuple[Any, ...], list[Record]] = {}
    for r in t.result["cells"]:
        if r["weights"] in t.key and r["method"] in METHODS and r["seed"] == 0:
            way = [r[x] for x in ("tuned", "method", "mixed_by", "normalizer", "history", "greedy")]
            ways.setdefault(tuple(way), []).append(r)
    for (tuned, method, mixed_by, normalizer, history, greedy), found in ways.items():
        unsolved = any(r["invalid"] for r in found)
        yield ({"weighted": "no solution"} if unsolved else mean(found)) | {
            "tuned": tuned,
            "method": method,
            "mixed_by": mixed_by,
            "normalizer": normalizer if method == "mod" else "",
            "history": "yes" * history,
            "drawn": "greedily" if greedy else "at random",
        }


def _tabular(t: Cells) -> Iterable[Record]:
    rows: dict[tuple[str, str], Record] = {}
    for r in t.result["tabular"]:
        shown = "no solution"
        if r["lost"] is not None:
            shown = f"{100 * r['lost']:.2g}%, {r['total_variation']:.2g}"
        at = {"world": r["world"], "mix": r["mix"]}
        rows.setdefault((r["world"], r["mix"]), at)[r["divergence"]] = shown
    return rows.values()


def document(title: str, result: Record, sections: list[Section]) -> str:
    """A report: its title, its machine, and a section for each table."""
    intro = "[README.md](README.md) says what was measured, how, and what it shows."
    parts = [report.head(title, result), intro]
    parts += [f"## {name}\n\n{table(records, columns)}" for name, records, columns in sections]
    return "\n\n".join(parts) + "\n"


def alignment(result: Record) -> str:
    """All tables of the study of policies."""
    t = Cells(result)
    trainings = [
        r | {"values": ", ".join(f"{x:.3f}" for x in r["values"])} for r in result["over_seeds"]
    ]
    rewards = " | ".join(f"{name} = {name} 3" for name in world.OBJECTIVES)
    places = (
        f"tuned with = tuned | weights | method = name | {rewards} | overall = overall (3) | "
        "weighted = weighted (3) | KL = kl (2) | J = objective 2"
    )
    sections: list[Section] = [
        ("MOD's overall reward at equal weights, relative to others", result["equal_weights"],
         "tuned with = tuned | training seed = seed | over the soup, % = soup (+1%) | "
         "gain over the soup's gain, % = gain (+1%) | over the retrained, % = retrained (+1%) | "
         "over best of 4, % = best of 4 (+1%) | over best of 16, % = best of 16 (+1%) | "
         "over the soup at its KL, % = soup at its KL (+1%) | "
         "over the retrained at its KL, % = retrained at its KL (+1%)"),
        ("Over trainings (95% intervals, Student's t), equal weights unless said", trainings,
         "tuned with = tuned | what | by training = values | mean = mean (3)"),
        ("The reference and its best of N", _without_policies(t), places),
        ("At the key weights", t.at(t.key, *METHODS, "optimum"),
         f"{places} | of the optimum's J lost, % = lost (1%)"),
        ("Single policies and their optimum", t.at(policies.CORNERS, "mod", "optimum"), places),
        ("Weights outside the simplex",
         t.at(result["sizes"]["outside"], "mod", "mod, Z = 0", "soup"),
         f"{places} | ended, % = ended 0%"),
        ("Means over the key weights", _over_key(t),
         "tuned with = tuned | method | mixed with = mixed_by | Z = normalizer | history | "
         "drawn | weighted reward = weighted 3 | KL = kl 2 | lost, % = lost 1% | "
         "tokens = length 1 | ended, % = ended 1%"),
        ("Where the truth is exact: mean share of J lost, total variation from the optimum",
         _tabular(t), " | ".join(["world", "mix", *tabular.DIVERGENCES])),
        ("Trainings", result["trainings"],
         "divergence | weights | seed | first loss = first_loss 3 | last loss = loss 3 | "
         "least possible = least_loss 3"),
    ]  # fmt: skip
    return document("Alignment: mixing, merging, retraining, choosing", result, sections)


def control(result: Record) -> str:
    """All tables of the study of value guidance."""
    j = "KL = kl (2) | J = worth (3)"
    less = "less CD-FUDGE at its KL = lead (+3)"
    shares = " | ".join(f"{x} = quarter {x} 2" for x in range(1, 5))
    sections: list[Section] = []
    for name in PANELS:
        others = " | ".join(f"{k} = {k} 3" for k in world.OBJECTIVES if k != name)
        rewards = f"{name} = reward (3) | {j} | {less}"
        titles = "", ", blockwise by CD-FUDGE", ", on a DPO policy"
        for title, part in zip(titles, ("one", "blocks", "policy"), strict=True):
            way = "method | strength, weight w or N = setting"
            more = f" | tokens = tokens 1 | {others}"
            if part == "blocks":
                way = "block length = block_length | K = k"
                more = " | N / K by reward = by reward (1) | N / K by scorer = by scorer (1)"
            records = [p for p in result[part] if p["objective"] == name]
            sections.append((f"For {name}{title}", records, f"{way} | {rewards}{more}"))
    sections += [
        ("Length: the reward log(T / 64), alone and as a penalty", result["length"],
         "for = objective | method | setting | its reward = reward (3) | tokens = tokens (1) | "
         "KL = kl (2)"),
        ("On other bases than the scorer's", result["transfer"],
         "scorer = objective | base | method | setting | reward = reward (3) | KL = kl (2) | "
         "gain = gain (+3) | less the gain at home = more (+3)"),
        (f"Two objectives, weights of {' and '.join(PAIR)}, over trainings",
         sorted(result["two"], key=lambda p: (p["method"], p["weights"])),
         "method | weights | helpful = helpful 3 | humorous = humorous 3 | w r = weighted (3) | "
         + j),
        ("Two objectives: mean J over the weights, over trainings", result["over"],
         "method | J = worth (3) | "
         + " | ".join(f"less {x} = less {x} (+3)" for x in ("MOD", "soup", "CD", "MAVIS"))),
        ("Scorers: correlation with held-out rewards by quarter of the answer", result["scorers"],
         f"method | objective | seed | steps | {shares}"),
        ("MAVIS: its policies, iteration by iteration (0: the reference)", result["mavis"],
         "objective | seed | iteration | reward = reward 3 | KL = kl 2 | J = value 3 | "
         "standard error = error 3 | kept"),
        ("Policies", result["policies"],
         "weights | seed | first loss = first_loss 3 | last loss = loss 3 | "
         "least possible = least_loss 3"),
    ]  # fmt: skip
    return document("Value guidance: reward against KL", result, sections)


def rules(result: Record) -> str:
    """All tables of the study of the decoder's rules, one for each weight vector."""
    columns = (
        "tuned and mixed with = tuned | rule | w r = weighted (3) | KL = kl (1) | "
        "J = objective (2) | J less that of one of 1 = gain (+2) | ended, % = ended 0% | "
        "no solution, % = invalid 0%"
    )
    sections: list[Section] = [
        (
            "Weights " + ", ".join(f"{x:.2g}" for x in w),
            [r for r in result["rules"] if r["weights"] == w],
            columns,
        )
        for w in result["sizes"]["weights"]
    ]
    return document("Rules of whole answers: means over trainings, Student's 95%", result, sections)


def sizes(result: Record) -> str:
    """All tables of the study of policies of different sizes."""
    columns = (
        "method | w r = weighted (3) | KL = kl (2) | J = objective (2) | "
        "MOD less it: w r = weighted lead (+3) | J = objective lead (+2)"
    )
    sections: list[Section] = [
        (
            "Weights " + ", ".join(f"{x:.2g}" for x in w),
            [r for r in result["methods"] if r["weights"] == w],
            columns,
        )
        for w in result["sizes"]["weights"]
    ]
    models = "objective | layers | parameters | vocabulary | KL to the reference a token = loss 4"
    models += " | last loss of f-DPO by training = tuned"
    sections.append(("Models", result["models"], models))
    return document(
        "Policies of different sizes: means over trainings, Student's 95%", result, sections
    )
