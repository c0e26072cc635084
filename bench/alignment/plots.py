"""The plots of the study of policies: two rewards against each other, and reward against KL. Pale
marks are the same methods after other trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from mod_fused import world

from . import control_plots, policies
from .tables import Cells, Record


def finish(axes: Any, x: str, y: str, title: str = "") -> None:
    """Set the labels of an axes, its title and its grid."""
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(color="0.9")


#: Label, colour (Okabe and Ito's, told apart by the colour-blind), marker and line of each method
#: of the study of policies.
METHODS = {
    "mod": ("MOD", "#0072B2", "o-"),
    "soup": ("soup", "#D55E00", "s--"),
    "retrained": ("retrained for the mix", "#CC79A7", "*"),
    "best of 4": ("best of 4", "#009E73", "v:"),
    "best of 16": ("best of 16", "#56B4E9", "^:"),
    "optimum": ("optimum of whole answers", "#E69F00", "-."),
    "reference": ("reference", "black", "X"),
}
TITLES = {
    "reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "Jensen-Shannon",
    "alpha:0.5": "alpha 1/2", "jeffrey": "Jeffrey",
}  # fmt: skip
CONTEST = 4.0  # nats: what is further away has a row of its own


def method(axes: Any, name: str, records: Sequence[Record], x: str, y: str, **form: Any) -> None:
    """Plot a method's points, with its label and its form, but for what `form` says."""
    label, colour, style = METHODS[name]
    points = [(r[x][0], r[y][0]) for r in records if r and r.get(x)]
    if points:
        form = {"markersize": 11 if "*" in style else 5, "linewidth": 1.3, "zorder": 3} | form
        axes.plot(*zip(*points, strict=True), style, **{"label": label, "color": colour} | form)


def _named(axes: Any, name: str, record: Record, x: str, y: str, where: str) -> None:
    """Write a method's label above, below or right of a point, on a white rim."""
    from matplotlib.patheffects import withStroke

    label, colour, _ = METHODS[name]
    form = {"textcoords": "offset points", "color": colour, "fontsize": 8, "zorder": 4}
    form |= {"ha": "left" if where == "right" else "center", "va": "center"}
    form |= {"path_effects": [withStroke(linewidth=3, foreground="w")]}
    axes.annotate(
        label,
        (record[x][0], record[y][0]),
        {"above": (0, 10), "below": (0, -10), "right": (7, 0)}[where],
        **form,
    )


def _legend(figure: Any, axes: Any, columns: int) -> None:
    """One legend for all panels, below them, where it covers no mark."""
    found = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns, fontsize=9)


def pareto(figure: Any, result: Record) -> None:
    """Plot all methods, with a row for each divergence and a column for each pair of rewards."""
    t = Cells(result)
    figure.set_size_inches(11, 3.2 * len(t.divergences) + 0.5)
    panels = figure.subplots(len(t.divergences), 3, squeeze=False, sharex="col", sharey="col")
    grid = result["sizes"]["grid"]
    for row, tuned in zip(panels, t.divergences, strict=True):
        for axes, (i, j) in zip(row, combinations(range(3), 2), strict=True):
            x, y = world.OBJECTIVES[i], world.OBJECTIVES[j]
            line = sorted(tuple(w) for w in grid if w[i] + w[j] == 1.0)
            for name in ("optimum", "best of 4", "best of 16", "soup", "mod", "retrained"):
                at = [w for w in policies.MIDPOINTS if w[i] and w[j]]
                at = at if name == "retrained" else line
                found = [t.one(w, name, tuned) for w in at]
                method(axes, name, found, x, y)
                if name.startswith("best") and found:
                    at, where = (-1, "right") if name == "best of 4" else (len(found) // 3, "above")
                    _named(axes, name, found[at], x, y, where)
            for name in ("mod", "soup"):
                label = f"{METHODS[name][0]}, other trainings"
                for seed in range(1, result["sizes"]["train_seeds"]):
                    found = [t.one(w, name, tuned, seed=seed) for w in line]
                    form = {"linewidth": 0, "alpha": 0.35, "label": label}
                    method(axes, name, found, x, y, **form)
            base = t.one((0.0,) * 3, "reference", "none")
            method(axes, "reference", [base], x, y, linewidth=0)
            _named(axes, "reference", base, x, y, "below")
            finish(axes, x, y, f"tuned with {TITLES.get(tuned, tuned)}")
            axes.tick_params(labelbottom=True)
    _legend(figure, panels[0][0], 5)


def against_kl(figure: Any, result: Record) -> None:
    """Plot overall reward against KL at equal weights of several sums, a column per divergence: the
    contest near the reference, and all of it."""
    t = Cells(result)
    figure.set_size_inches(3.2 * len(t.divergences), 6.4)
    panels = figure.subplots(2, len(t.divergences), squeeze=False, sharey="row")
    base = t.one((0.0,) * 3, "reference", "none")
    for column, tuned in zip(panels.T, t.divergences, strict=True):
        for axes, near in zip(column, (True, False), strict=True):
            for name in ("best of 4", "best of 16", "soup", "mod", "retrained"):
                at = [policies.CENTRE] if name.startswith("best") else policies.EQUAL
                found = [t.one(w, name, tuned) for w in at]
                method(axes, name, found, "kl", "overall")
                if name.startswith("best") and near:
                    _named(axes, name, found[0], "kl", "overall", "above")
            method(axes, "reference", [base], "kl", "overall", linewidth=0)
            if near:
                axes.set_xlim(-0.15, CONTEST)
                _named(axes, "reference", base, "kl", "overall", "right")
                finish(axes, "", "overall reward", f"tuned with {TITLES.get(tuned, tuned)}")
            else:
                axes.set_xscale("symlog", linthresh=1.0)
                axes.margins(0.12)
                axes.axvline(
                    CONTEST,
                    color="0.4",
                    linestyle=(0, (5, 5)),
                    linewidth=1,
                    label="here the row above ends",
                )
                ends = {n: t.one(policies.EQUAL[-1], n, tuned) for n in ("mod", "soup")}
                if all(x.get("kl") for x in ends.values()):
                    above = max(ends, key=lambda n: ends[n]["overall"][0])
                    for name, end in ends.items():
                        _named(
                            axes, name, end, "kl", "overall", "above" if name == above else "below"
                        )
                finish(axes, "KL to the reference (nats an answer)", "overall reward")
    for axes in panels[:, 1:].flat:
        axes.set_ylabel("")
    _legend(figure, panels[1][0], 7)


PICTURES: dict[str, dict[str, Callable[[Any, Record], None]]] = {
    "alignment": {"alignment_pareto": pareto, "alignment_kl": against_kl},
    "control": control_plots.PICTURES,
}
