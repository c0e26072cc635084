"""Pareto pictures: for each divergence and pair of rewards, all methods in one panel; the pale
marks are the same methods after other trainings."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

from mod_fused import world

from . import plan
from .report import Tables

# Marker, line and label of each method.
STYLES = {
    "mod": ("o", "-", "MOD"),
    "soup": ("s", "--", "Rewarded Soup"),
    "retrained": ("*", "", "retrained for the mix"),
    "best of 4": ("v", ":", "best of 4"),
    "best of 16": ("^", ":", "best of 16"),
    "optimum": ("", "-.", "optimum of the pool"),
}


def _line(
    tables: Tables, name: str, tuned: str, i: int, j: int, seed: int = 0
) -> list[tuple[float, float]]:
    """The points (reward i, reward j) of a method from one corner to the other."""
    at = sorted(w for w in tables.grid if w[i] + w[j] == 1.0)
    if name == "retrained":
        at = [w for w in plan.MIDPOINTS if w[i] and w[j]]
    records = []
    for w in at:
        if name == "optimum":
            records.append(tables.pooled(name, w, tuned))
        elif name.startswith("best"):
            records.append(tables.pooled(name, w))
        else:
            at_corner = w in plan.CORNERS
            method = "mod" if at_corner else name
            records.append(tables.one(w, method=method, tuned=tuned, seed=seed))
    first, second = world.OBJECTIVES[i], world.OBJECTIVES[j]
    return [(r[first]["value"], r[second]["value"]) for r in records if r]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG per divergence and one of reward against KL into `folder`; returns their paths.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    tables, paths = Tables(result), []
    reference = tables.one((0.0,) * 3, method="reference")
    for tuned in tables.divergences:
        figure = Figure(figsize=(13.5, 4.2), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, (i, j) in zip(panels, combinations(range(3), 2), strict=True):
            for name, (marker, line, label) in STYLES.items():
                points = _line(tables, name, tuned, i, j)
                if points:
                    x, y = zip(*points, strict=True)
                    size = 12 if marker == "*" else 5
                    axes.plot(x, y, marker + line, label=label, markersize=size, linewidth=1.2)
            for name, seed in product(
                ("mod", "soup"), range(1, tables.result["sizes"]["train_seeds"])
            ):
                x, y = zip(*_line(tables, name, tuned, i, j, seed), strict=True)
                colour = "C0" if name == "mod" else "C1"  # as above
                axes.plot(x, y, STYLES[name][0], color=colour, markersize=4, alpha=0.35)
            names = world.OBJECTIVES[i], world.OBJECTIVES[j]
            axes.plot(*(reference[n]["value"] for n in names), "kx", label="reference")
            axes.set_xlabel(f"{names[0]} (mean reward)")
            axes.set_ylabel(f"{names[1]} (mean reward)")
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=7)
        figure.suptitle(f"policies tuned with {tuned}, mixed while decoding and otherwise")
        paths.append(folder / f"alignment_{tuned.replace(':', '').replace('.', '')}.png")
        figure.savefig(paths[-1], dpi=80)
    paths.append(folder / "alignment_kl.png")
    _draw_kl(tables, paths[-1])
    return paths


def _draw_kl(tables: Tables, path: Path) -> None:
    """Overall reward against KL at equal weights of several sums, a panel for each divergence."""
    from matplotlib.figure import Figure

    names = tables.divergences
    figure = Figure(figsize=(3.6 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, tuned in zip(panels, names, strict=True):
        for method in ("mod", "soup", "retrained"):
            found = [tables.one(w, method=method, tuned=tuned) for w in plan.EQUAL]
            points = [(r["kl"]["value"], r["overall"]["value"]) for r in found if "kl" in r]
            marker, line, label = STYLES[method]
            axes.plot(*zip(*points, strict=True), marker + line, label=label, markersize=6)
        pool = [tables.pooled(name, plan.CENTRE) for name in ("best of 4", "best of 16")]
        points = [(r["kl"]["value"], r["overall"]["value"]) for r in pool]
        axes.plot(*zip(*points, strict=True), "v:", label="best of 4, 16 (KL: bound)")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlabel("KL to the reference (nats)")
        axes.set_title(tuned, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("overall reward, equal weights")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)
