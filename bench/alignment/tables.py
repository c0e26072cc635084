"""The tables of both studies, from their JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mod_fused import world

from .. import report
from . import policies, tabular
from .guided import ONE_STRENGTH, PAIR, PANELS

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
    if form is None or isinstance(x, str):
        return weights(x) if isinstance(x, list) else f"{x:g}" if isinstance(x, float) else str(x)
    scale = 100.0 if form["percent"] else 1.0
    numbers = [f"{scale * y:{form['sign']}.{form['digits']}f}" for y in _listed(x)]
    if form["interval"] and len(numbers) == 3:
        return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"
    return numbers[0]


def _listed(x: Any) -> list[float]:
    return x if isinstance(x, list) else [x]


def weights(w: Sequence[float]) -> str:
    """The text of a weight vector."""
    return ", ".join(f"{x:.2g}" for x in w)


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
        not named have their main values. Best-of-n and the optimum come from the pool. Empty if
        there is no such cell."""
        wanted = {"method": method, "tuned": tuned, "weights": report.rounded(weights)}
        if method.startswith("best of ") or method == "optimum":
            wanted["tuned"] = "none" if method != "optimum" else tuned
            return next((r for r in self.result["pool"] if wanted.items() <= r.items()), {})
        wanted |= {"greedy": False, "history": False, "normalizer": "exact", "seed": 0}
        wanted |= {"mixed_by": tuned if method == "mod" else ""} | fields
        found = [r for r in self.result["cells"] if all(r[k] == x for k, x in wanted.items())]
        return max(found, key=lambda r: r["samples"], default={})

    def over_key(self, method: str, tuned: str, **fields: Any) -> Record:
        """Means over the key weights; "no solution" where a cell has none."""
        found = [self.one(w, method, tuned, **fields) for w in self.key]
        unsolved = any(r["invalid"] for r in found)
        return {"weighted": "no solution"} if unsolved else mean(found)


def _equal_weights(t: Cells) -> Iterable[Record]:
    centre = policies.CENTRE
    yield {"name": "reference"} | t.one((0.0,) * 3, "reference", "none") | {"tuned": ""}
    for name in ("best of 4", "best of 16"):
        yield {"name": name} | t.one(centre, name, "") | {"tuned": ""}
    for d in t.divergences:
        singles = [t.one(w, "mod", d) for w in policies.CORNERS]
        if all(singles):
            best = max(singles, key=lambda r: r["overall"][0])
            # J of this cell is for its own weights, that of the others for equal ones.
            yield {"name": "best single policy"} | best | {"objective": None}
        yield from ({"name": m} | t.one(centre, m, d) for m in (*METHODS, "optimum"))


def _lost(t: Cells) -> Iterable[Record]:
    for d in t.divergences:
        for m in METHODS:
            found = {weights(w): t.one(w, m, d).get("lost") for w in t.key}
            yield {"tuned": d, "method": m} | found


def _variants(t: Cells) -> Iterable[Record]:
    for d in t.divergences:
        for z, history in policies.VARIANTS if d != "reverse_kl" else policies.VARIANTS[:1]:
            name = f"{'with history' if history else 'token by token'}, "
            name += "exact Z" if z == "exact" else "Z = 0"
            means = t.over_key("mod", d, normalizer=z, history=history)
            yield {"tuned": d, "variant": name} | means


def _singles(t: Cells) -> Iterable[Record]:
    for d in t.divergences:
        for name, w in zip(world.OBJECTIVES, policies.CORNERS, strict=True):
            if got := t.one(w, "mod", d):
                best = {f"best {k}": x for k, x in t.one(w, "optimum", d).items()}
                yield {"policy": name} | got | best


def _greedy(t: Cells) -> Iterable[Record]:
    for d in t.divergences:
        for m in METHODS:
            drawn, greedy = (t.over_key(m, d, greedy=g) for g in (False, True))
            yield {"tuned": d, "method": m} | drawn | {f"greedy {k}": x for k, x in greedy.items()}


def _outside(t: Cells) -> Iterable[Record]:
    for d in t.divergences:
        for w in t.result["sizes"]["outside"]:
            named = {"mod, exact Z": t.one(w, "mod", d), "soup": t.one(w, "soup", d)}
            if d != "reverse_kl":
                named["mod, Z = 0"] = t.one(w, "mod", d, normalizer="zero")
            for name, cell in named.items():
                if unsolved := cell["invalid"]:
                    cell = {"tuned": d, "weights": w, "helpful": f"no solution: {unsolved:.0%}"}
                yield {"name": name} | cell


def _tabular(t: Cells) -> Iterable[Record]:
    for r in t.result["tabular"]:
        shown = "no solution"
        if r["lost"] is not None:
            shown = f"{100 * r['lost']:.2g}%, {r['total_variation']:.2g}"
        yield {"world": r["world"], "mix": r["mix"], r["divergence"]: shown}


def _across(records: Iterable[Record], *labels: str) -> list[Record]:
    """Merge the records that have the same labels."""
    out: dict[tuple[Any, ...], Record] = {}
    for record in records:
        out.setdefault(tuple(record[k] for k in labels), {}).update(record)
    return list(out.values())


def _document(title: str, result: Record, sections: list[Section]) -> str:
    intro = "[README.md](README.md) says what was measured, how, and what it shows."
    parts = [report.head(title, result), intro]
    parts += [f"## {name}\n\n{table(records, columns)}" for name, records, columns in sections]
    return "\n\n".join(parts) + "\n"


def alignment(result: Record) -> str:
    """All tables of the study of policies."""
    t = Cells(result)
    headline = [
        {"tuned": r["tuned"], "seed": r["seed"], "gain": r["soup"]["relative_gain"]}
        | {name: x["relative"] for name, x in r.items() if isinstance(x, dict)}
        for r in result["equal_weights"]
    ]
    mixed = [
        {"tuned": d, "mixed": by} | t.over_key("mod", d, mixed_by=by)
        for d in t.divergences
        for by in t.divergences
    ]
    areas = [
        r | {"pair": " and ".join(world.OBJECTIVES[k] for k in r["pair"])}
        for r in result["hypervolumes"]
    ]
    trainings = [
        r | {"values": ", ".join(f"{x:.3f}" for x in r["values"])} for r in result["over_seeds"]
    ]
    growth = [
        {"tuned": r["tuned"], str(r["size"]): f"{r['overall']:.3f}, {r['objective']:.2f}"}
        for r in result["pool_growth"]
    ]
    sizes = dict.fromkeys(f"{r['size']} answers = {r['size']}" for r in result["pool_growth"])
    key = " | ".join(f"{weights(w)} = {weights(w)} (1%)" for w in t.key)
    rewards = " | ".join(f"{name} = {name} 3" for name in world.OBJECTIVES)
    means = (
        "weighted reward = weighted 3 | KL = kl 2 | lost, % = lost 1% | tokens = length 1 | "
        "ended, % = ended 1%"
    )
    sections: list[Section] = [
        ("MOD's overall reward at equal weights, relative to others", headline,
         "tuned with = tuned | training seed = seed | over the soup, % = soup (+1%) | "
         "gain over the soup's gain, % = gain (+1%) | over the retrained, % = retrained (+1%) | "
         "over best of 4, % = best of 4 (+1%) | over best of 16, % = best of 16 (+1%)"),
        ("Over trainings (95% intervals, Student's t), equal weights unless said", trainings,
         "tuned with = tuned | what | by training = values | mean = mean (3)"),
        ("The same with MOD's equal weights scaled to the other's KL", result["equal_kl"],
         "tuned with = tuned | over the soup, % = soup (+1%) | "
         "over the retrained, % = retrained (+1%)"),
        ("At equal weights", _equal_weights(t),
         f"tuned with = tuned | method = name | {rewards} | overall = overall (3) | KL = kl (2) | "
         "J = objective 2"),
        ("Weighted reward, mean over the weights off the corners", result["grid"],
         "tuned with = tuned | mod = mod (3) | soup = soup (3) | best of 4 = best of 4 (3) | "
         "best of 16 = best of 16 (3) | optimum = optimum (3) | mod above soup | mod below soup | "
         "of weights = weights"),
        ("Share of the optimum's J lost, % (0: the optimum, 100: the reference)", _lost(t),
         f"tuned with = tuned | method | {key}"),
        ("Dominated area in the plane of two rewards", areas,
         "tuned with = tuned | pair | method | ends and middle = three (3) | "
         "whole line = line (3)"),
        ("History and Z, means over the key weights", _variants(t),
         f"tuned with = tuned | variant | {means}"),
        ("Divergence of the tuning and of the mixing, means over the key weights", mixed,
         f"tuned with = tuned | mixed with = mixed | {means}"),
        ("Single policies: their own reward, and its optimum", _singles(t),
         "tuned with = tuned | policy | reward = weighted (3) | optimum = best weighted (3) | "
         "J = objective 2 | J of the optimum = best objective 2 | KL = kl 2"),
        ("Greedy, weighted reward over the key weights", _greedy(t),
         "tuned with = tuned | method | drawn = weighted 3 | tokens = length 1 | "
         "greedy = greedy weighted 3 | greedy tokens = greedy length 1"),
        ("Weights outside the simplex", _outside(t),
         f"tuned with = tuned | weights | method = name | {rewards} | KL = kl 3 | "
         "ended, % = ended 0%"),
        ("Where the truth is exact: mean share of J lost, total variation from the optimum",
         _across(_tabular(t), "world", "mix"), " | ".join(["world", "mix", *tabular.DIVERGENCES])),
        ("The optimum at equal weights, overall reward and J, from pools of several sizes",
         _across(growth, "tuned"), " | ".join(["tuned with = tuned", *sizes])),
        ("Trainings", result["trainings"],
         "divergence | weights | seed | first loss = first_loss 3 | last loss = loss 3 | "
         "least possible = least_loss 3"),
    ]  # fmt: skip
    return _document("Alignment: mixing, merging, retraining, choosing", result, sections)


def _panel(result: Record, name: str) -> Iterable[Record]:
    leads = {
        (r["objective"], r["method"], r["setting"], r["against"]): r["lead"]
        for r in result["leads"]
    }
    for p in result["points"]:
        if p["objective"] == name and not p["method"].startswith("under"):
            at = (name, p["method"], p["setting"])
            kl = figure(p, "kl (2)") + " (bound)" * p["bound"]
            lead, same = (leads.get((*at, c)) for c in ("CD-FUDGE", "CD-FUDGE, as CD-Q"))
            yield p | {"kl": kl, "lead": lead, "same": same}


def control(result: Record) -> str:
    """All tables of the study of value guidance."""
    by = [
        {"divergence": p["method"].removeprefix("under "), "reward": p["objective"]}
        | {"mean": p[p["objective"]], "kl": p["kl"]}
        for p in result["points"]
        if p["method"].startswith("under")
    ]
    sections: list[Section] = [
        (f"For {name}", _panel(result, name),
         f"method | strength, K, N or weight = setting | {name} = {name} (3) | KL = kl | "
         "less CD-FUDGE at its KL = lead (+3) | less CD-FUDGE as CD-Q = same (+3) | "
         + " | ".join(f"{k} = {k} 3" for k in world.OBJECTIVES if k != name))
        for name in PANELS
    ]  # fmt: skip
    sections += [
        (f"Tokenwise control at strength {ONE_STRENGTH:g}, by divergence", by,
         "divergence | reward | mean = mean (3) | KL = kl (2)"),
        ("MAVIS: its policies, iteration by iteration (0: the reference)", result["mavis"],
         "objective | iteration | reward = reward 3 | KL = kl 2 | J = value 3 | "
         "standard error = error 3"),
        (f"Two objectives, weights of {' and '.join(PAIR)}",
         sorted(result["two"], key=lambda p: (p["method"], p["setting"])),
         "method | weights = setting | helpful = helpful 3 | humorous = humorous 3 | "
         "w r = weighted (3) | KL = kl (2) | J = worth (3)"),
        ("MAVIS less each other method, means over their common weights", result["differences"],
         "method = against | weights | J = worth (+3) | w r = weighted (+3) | KL = kl (+2)"),
    ]  # fmt: skip
    return _document("Value guidance: reward against KL", result, sections)
