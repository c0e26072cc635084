"""Pareto pictures: for each divergence and pair of rewards, all methods in one panel."""

from __future__ import annotations

from itertools import combinations
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


def _line(tables: Tables, name: str, tuned: str, i: int, j: int) -> list[tuple[float, float]]:
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
            records.append(tables.one(w, method="mod" if at_corner else name, tuned=tuned))
    first, second = world.OBJECTIVES[i], world.OBJECTIVES[j]
    return [(r[first]["value"], r[second]["value"]) for r in records if r]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG per divergence into `folder`; returns their paths.

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
            names = world.OBJECTIVES[i], world.OBJECTIVES[j]
            axes.plot(*(reference[n]["value"] for n in names), "kx", label="reference")
            axes.set_xlabel(f"{names[0]} (mean reward)")
            axes.set_ylabel(f"{names[1]} (mean reward)")
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=7)
        figure.suptitle(f"policies tuned with {tuned}, mixed while decoding and otherwise")
        paths.append(folder / f"alignment_{tuned.replace(':', '').replace('.', '')}.png")
        figure.savefig(paths[-1], dpi=80)
    return paths
