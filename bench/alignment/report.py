"""The results as Markdown: findings in sentences, then the tables they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mod_fused import world

from ..report import markdown_table
from . import plan, tabular

Record = dict[str, Any]
METHODS = ("mod", "soup", "retrained")


def _bounds(x: Record, scale: float = 1.0, digits: int = 3, sign: str = "") -> str:
    """ "value (low to high)", or empty."""
    value, low, high = (scale * x[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def _cell(x: Record | None, **form: Any) -> str:
    return "" if x is None else _bounds(x, **form)


def _percent(x: Record | None, sign: str = "") -> str:
    return "" if x is None else _bounds(x, scale=100.0, digits=1, sign=sign)


def _plain(x: Record | None, digits: int = 3) -> str:
    return "" if x is None else f"{x['value']:.{digits}f}"


def _weights(w: Sequence[float]) -> str:
    return ", ".join(f"{x:.2g}" for x in w)


def mean(records: Sequence[Record], field: str) -> float | None:
    """The mean over cells of an estimate or number; None where a cell lacks it."""
    values: list[Any] = [r.get(field) for r in records]
    if not values or None in values:
        return None
    return sum(x["value"] if isinstance(x, dict) else x for x in values) / len(values)


def _show(x: float | None, digits: int = 3) -> str:
    return "" if x is None else f"{x:.{digits}f}"


class Tables:
    """The tables of a result, one method each."""

    def __init__(self, result: Record) -> None:
        self.result = result
        self.divergences: list[str] = list(result["sizes"]["divergences"])
        self.cells: list[Record] = result["cells"]
        self.grid, self.key_weights, self.outside_weights = (
            [tuple(w) for w in result["sizes"][name]] for name in ("grid", "key", "outside")
        )

    def find(self, **fields: Any) -> list[Record]:
        """Cells whose fields have these values; those not named are the main ones."""
        main = {"greedy": False, "history": False, "normalizer": "exact", "seed": 0}
        wanted = main | fields
        if wanted.get("method") == "mod":
            wanted.setdefault("mixed_by", wanted.get("tuned"))
        return [c for c in self.cells if all(c[k] == v for k, v in wanted.items())]

    def one(self, weights: Sequence[float], **fields: Any) -> Record:
        """The cell at a weight vector with the most answers; empty if there is none."""
        at = [c for c in self.find(**fields) if tuple(c["weights"]) == tuple(weights)]
        return max(at, key=lambda c: c["samples"], default={})

    def key(self, **fields: Any) -> list[Record]:
        """The cells at the key weights."""
        return [self.one(w, **fields) for w in self.key_weights]

    def pooled(self, method: str, weights: Sequence[float], tuned: str = "none") -> Record:
        """A record of the pool."""
        same = (
            r
            for r in self.result["pool"]
            if r["method"] == method
            and r["tuned"] == tuned
            and tuple(r["weights"]) == tuple(weights)
        )
        return next(same, {})

    def equal_weights(self) -> str:
        """Overall reward and KL at equal weights, by divergence and method."""
        header = ["tuned with", "method", *world.OBJECTIVES, "overall", "KL", "J"]
        rows = [self._row("", "reference", self.one((0.0,) * 3, method="reference"))]
        for name in ("best of 4", "best of 16"):
            rows.append(self._row("", name, self.pooled(name, plan.CENTRE)))
        for tuned in self.divergences:
            singles = [self.one(w, method="mod", tuned=tuned) for w in plan.CORNERS]
            if all(singles):
                best = max(singles, key=lambda c: c["overall"]["value"])
                # The objective of the others is that of equal weights: not this cell's.
                rows.append(self._row(tuned, "best single policy", best | {"objective": None}))
            for method in METHODS:
                rows.append(
                    self._row(tuned, method, self.one(plan.CENTRE, method=method, tuned=tuned))
                )
            rows.append(self._row(tuned, "optimum", self.pooled("optimum", plan.CENTRE, tuned)))
        return markdown_table(header, rows)

    def _row(self, tuned: str, name: str, record: Record) -> list[str]:
        cells = [_plain(record.get(k)) for k in world.OBJECTIVES]
        cells += [_cell(record.get("overall")), _cell(record.get("kl"), digits=2)]
        return [tuned, name, *cells, _plain(record.get("objective"), 2)]

    def headline(self) -> str:
        """MOD's lead in the overall reward at equal weights."""
        rows = []
        for r in self.result["equal_weights"]:
            cells = [_percent(r[k]["relative"], "+") for k in ("soup", "retrained")]
            cells.insert(1, _percent(r["soup"]["relative_gain"], "+"))
            cells += [_percent(r[f"best of {n}"]["relative"], "+") for n in (4, 16)]
            rows.append([r["tuned"], str(r["seed"]), *cells])
        header = ["tuned with", "training seed", "over the soup, %", "gain over the soup's gain, %"]
        header += ["over the retrained, %", "over best of 4, %", "over best of 16, %"]
        return markdown_table(header, rows)

    def over_seeds(self) -> str:
        """Every training's value, and the mean with the interval over trainings."""
        rows = []
        for r in self.result["over_seeds"]:
            digits = 1 if r["what"].endswith("%") else 3
            each = ", ".join(f"{x:.{digits}f}" for x in r["values"])
            rows.append([r["tuned"], r["what"], each, _bounds(r["mean"], digits=digits)])
        return markdown_table(["tuned with", "what", "by training", "mean"], rows)

    def equal_kl(self) -> str:
        """MOD's lead in the overall reward where its weights are scaled to the other's KL."""
        rows = [
            [r["tuned"], *(_percent(r.get(name), "+") for name in ("soup", "retrained"))]
            for r in self.result["equal_kl"]
        ]
        return markdown_table(["tuned with", "over the soup, %", "over the retrained, %"], rows)

    def grid_means(self) -> str:
        """Weighted rewards averaged over the weights off the corners."""
        names = ["mod", "soup", "best of 4", "best of 16", "optimum"]
        counts = ["mod above soup", "mod below soup"]
        rows = [
            [
                r["tuned"],
                *(_cell(r[n]) for n in names),
                *(f"{r[c]} of {r['weights']}" for c in counts),
            ]
            for r in self.result["grid"]
        ]
        return markdown_table(["tuned with", *names, *counts], rows)

    def losses(self) -> str:
        """The share of the optimum's objective that is lost, at each key weight."""
        rows = []
        for tuned in self.divergences:
            for method in METHODS:
                found = self.key(method=method, tuned=tuned)
                rows.append([tuned, method, *(_percent(c.get("lost")) for c in found)])
        return markdown_table(["tuned with", "method", *map(_weights, self.key_weights)], rows)

    def hypervolumes(self) -> str:
        """The dominated areas by pair and method."""
        records = self.result["hypervolumes"]
        rows = []
        for r in records:
            pair = " and ".join(world.OBJECTIVES[k] for k in r["pair"])
            rows.append([r["tuned"], pair, r["method"], _cell(r["three"]), _cell(r.get("line"))])
        return markdown_table(
            ["tuned with", "pair", "method", "ends and middle", "whole line"], rows
        )

    def variants(self) -> str:
        """History and normaliser: means over the key weights."""
        rows = []
        for tuned in self.divergences:
            for z, history in plan.VARIANTS if tuned != "reverse_kl" else plan.VARIANTS[:1]:
                found = self.key(method="mod", tuned=tuned, normalizer=z, history=history)
                words = f"{'with history' if history else 'token by token'}, "
                rows.append(
                    [tuned, words + ("exact Z" if z == "exact" else "Z = 0"), *_over_key(found)]
                )
        return markdown_table(["tuned with", "variant", *_MEANS], rows)

    def mismatched(self) -> str:
        """Policies tuned with one divergence, mixed with another: means over the key weights."""
        rows = []
        for tuned in self.divergences:
            for mixed_by in self.divergences:
                found = self.key(method="mod", tuned=tuned, mixed_by=mixed_by)
                rows.append([tuned, mixed_by, *_over_key(found)])
        return markdown_table(["tuned with", "mixed with", *_MEANS], rows)

    def singles(self) -> str:
        """How far f-DPO took each policy on its own reward, beside what its optimum has."""
        rows = []
        for tuned in self.divergences:
            for w in [c for c in plan.CORNERS if c in self.grid]:
                name = world.OBJECTIVES[w.index(1.0)]
                got = self.one(w, method="mod", tuned=tuned)
                best = self.pooled("optimum", w, tuned)
                cells = [_cell(r.get("weighted")) for r in (got, best)]
                cells += [_plain(r.get("objective"), 2) for r in (got, best)]
                rows.append([tuned, name, *cells, _plain(got.get("kl"), 2)])
        header = ["tuned with", "policy", "reward", "optimum", "J", "J of the optimum", "KL"]
        return markdown_table(header, rows)

    def greedy(self) -> str:
        """The most likely token instead of a draw: weighted rewards over the key weights."""
        rows = []
        for tuned in self.divergences:
            for method in METHODS:
                cells = []
                for greedy in (False, True):
                    found = self.key(method=method, tuned=tuned, greedy=greedy)
                    cells += [_show(mean(found, "weighted")), _show(mean(found, "length"), 1)]
                rows.append([tuned, method, *cells])
        header = ["tuned with", "method", "drawn", "tokens", "greedy", "tokens "]
        return markdown_table(header, rows)

    def outside(self) -> str:
        """Weights off the simplex."""
        rows = []
        for tuned in self.divergences:
            for w in self.outside_weights:
                named = {"mod, exact Z": {"method": "mod"}, "soup": {"method": "soup"}}
                if tuned != "reverse_kl":
                    named["mod, Z = 0"] = {"method": "mod", "normalizer": "zero"}
                for name, fields in named.items():
                    c = self.one(w, tuned=tuned, **fields)
                    if c["invalid"]:
                        why = f"no solution in {100 * c['invalid']:.0f}% of the answers"
                        rows.append([tuned, _weights(w), name, why, *[""] * 4])
                        continue
                    cells = [_plain(c.get(k)) for k in (*world.OBJECTIVES, "kl")]
                    rows.append([tuned, _weights(w), name, *cells, f"{100 * c['ended']:.0f}%"])
        return markdown_table(
            ["tuned with", "weights", "method", *world.OBJECTIVES, "KL", "ended"], rows
        )

    def every_weight(self) -> str:
        """The weighted reward at every weight of the grid."""
        rows = []
        for tuned in self.divergences:
            for w in self.grid:
                found = [self.one(w, method=m, tuned=tuned) for m in METHODS]
                found += [self.pooled(f"best of {n}", w) for n in (4, 16)]
                found.append(self.pooled("optimum", w, tuned))
                cells = [
                    _cell(found[0]["weighted"]),
                    *(_plain(r.get("weighted")) for r in found[1:]),
                ]
                rows.append(
                    [tuned, _weights(w), *cells, *(_plain(r.get("kl"), 2) for r in found[:3])]
                )
        names = [*METHODS, "best of 4", "best of 16", "optimum", *(f"KL {m}" for m in METHODS)]
        return markdown_table(["tuned with", "weights", *names], rows)

    def pool_growth(self) -> str:
        """The estimated optimum from pools of several sizes: what it still lacks."""
        records = self.result["pool_growth"]
        sizes = list(dict.fromkeys(r["size"] for r in records))
        rows = []
        for tuned in self.divergences:
            found = [r for r in records if r["tuned"] == tuned]
            rows.append([tuned, *(f"{r['overall']:.3f}, {r['objective']:.2f}" for r in found)])
        return markdown_table(["tuned with", *(f"{size} answers" for size in sizes)], rows)

    def trainings(self) -> str:
        """The loss of every training."""
        rows = [
            [r["divergence"], _weights(r["weights"]), str(r["seed"]), f"{r['first_loss']:.3f}",
             f"{r['loss']:.3f}", f"{r['least_loss']:.3f}"]
            for r in self.result["trainings"]
        ]  # fmt: skip
        return markdown_table(
            ["divergence", "weights", "seed", "first loss", "last loss", "least possible"], rows
        )


_MEANS = ("weighted reward", "KL", "lost, %", "tokens", "ended, %")


def _over_key(found: Sequence[Record]) -> list[str]:
    lost, ended = mean(found, "lost"), mean(found, "ended")
    if any(c.get("invalid") for c in found):
        return ["no solution", "", "", "", ""]
    return [
        _show(mean(found, "weighted")),
        _show(mean(found, "kl"), 2),
        "" if lost is None else f"{100 * lost:.1f}",
        _show(mean(found, "length"), 1),
        "" if ended is None else f"{100 * ended:.1f}",
    ]


def markdown(result: Record, findings: Iterable[str]) -> str:
    """The whole report."""
    t, sizes = Tables(result), result["sizes"]
    machine = [f"- {name}: {value}" for name, value in result["machine"].items()]
    n = f"{sizes['prompts']} held-out prompts, {sizes['samples']} answers each (1 if mismatched)"
    key = "; ".join(map(_weights, sizes["key"]))
    sections = [
        ("", "# Alignment: mixing against merging, retraining and choosing"),
        ("", f"`{result['command']}`"),
        ("", "\n".join(machine)),
        ("", f"{n}; {sizes['steps']} steps of f-DPO for each policy, retrained ones alike; in "
             "brackets 95% intervals of a bootstrap over prompts. Overall: the mean of the three "
             "rewards. Weighted: sum_i w_i r_i. J = 10 w r - D_f(pi || ref) of whole answers: what "
             "tuning for the mixed reward maximises. Optimum: the reference's "
             f"{sizes['pool']} answers to each prompt, reweighted (log-ratios beyond the logarithm "
             "of that do not fit in, so it errs towards less). Key weights: "
             f"{key}."),
        ("Findings", "\n".join(f"- {line}" for line in findings)),
        ("MOD's overall reward at equal weights, relative to others", t.headline()),
        ("Over trainings (95% intervals, Student's t), equal weights unless said", t.over_seeds()),
        ("The same with MOD's equal weights scaled to the other's KL", t.equal_kl()),
        ("At equal weights", t.equal_weights()),
        ("Weighted reward, mean over the weights off the corners", t.grid_means()),
        ("Share of the optimum's J lost, % (0: the optimum, 100: the reference)", t.losses()),
        ("Dominated area in the plane of two rewards", t.hypervolumes()),
        ("History and Z, means over the key weights", t.variants()),
        ("Divergence of the tuning and of the mixing, means over the key weights", t.mismatched()),
        ("Single policies: their own reward, and its optimum", t.singles()),
        ("Greedy, weighted reward over the key weights", t.greedy()),
        ("Weights outside the simplex", t.outside()),
        ("Where the truth is exact: mean share of J lost, total variation from the optimum",
         tabular.markdown(result["tabular"])),
        ("Weighted reward at every weight", t.every_weight()),
        ("The optimum at equal weights, overall reward and J, from pools of several sizes",
         t.pool_growth()),
        ("Trainings", t.trainings()),
    ]  # fmt: skip
    return "\n\n".join(f"## {head}\n\n{body}" if head else body for head, body in sections) + "\n"
