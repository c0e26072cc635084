"""The plots of both studies: two rewards against each other, and reward against KL. Pale marks are
the same methods after other trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from mod_fused import world

from . import control_plots, policies
from .tables import Cells, Record

#: Marker and line of each method.
STYLES = {
    "mod": "o-", "soup": "s--", "retrained": "*", "best of 4": "v:", "best of 16": "^:",
    "optimum": "-.",
}  # fmt: skip


def _line(axes: Any, name: str, records: Sequence[Record], x: str, y: str, **form: Any) -> None:
    points = [(r[x][0], r[y][0]) for r in records if r and r.get(x)]
    if points:
        size = 11 if STYLES[name] == "*" else 5
        form = {"label": name, "markersize": size, "linewidth": 1.2} | form
        axes.plot(*zip(*points, strict=True), STYLES[name], **form)


def _finish(axes: Any, x: str, y: str, title: str = "") -> None:
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)


def pareto(figure: Any, result: Record) -> None:
    """Plot all methods, with a row for each divergence and a column for each pair of rewards."""
    t = Cells(result)
    figure.set_size_inches(11, 3.2 * len(t.divergences))
    panels = figure.subplots(len(t.divergences), 3, squeeze=False)
    grid = result["sizes"]["grid"]
    for row, tuned in zip(panels, t.divergences, strict=True):
        for axes, (i, j) in zip(row, combinations(range(3), 2), strict=True):
            x, y = world.OBJECTIVES[i], world.OBJECTIVES[j]
            line = sorted(tuple(w) for w in grid if w[i] + w[j] == 1.0)
            for name in ("mod", "soup", "best of 4", "best of 16", "optimum", "retrained"):
                at = [w for w in policies.MIDPOINTS if w[i] and w[j]]
                at = at if name == "retrained" else line
                _line(axes, name, [t.one(w, name, tuned) for w in at], x, y)
            for seed in range(1, result["sizes"]["train_seeds"]):
                for name, colour in (("mod", "C0"), ("soup", "C1")):  # as above
                    found = [t.one(w, name, tuned, seed=seed) for w in line]
                    form = {"color": colour, "linewidth": 0, "alpha": 0.35, "label": None}
                    _line(axes, name, found, x, y, **form)
            base = t.one((0.0,) * 3, "reference", "none")
            axes.plot(base[x][0], base[y][0], "kx", label="reference")
            _finish(axes, x, y, f"tuned with {tuned}")
    panels[0][0].legend(fontsize=7)


def against_kl(figure: Any, result: Record) -> None:
    """Plot overall reward against KL at equal weights of several sums, a panel per divergence."""
    t = Cells(result)
    figure.set_size_inches(3.2 * len(t.divergences), 3.4)
    panels = figure.subplots(1, len(t.divergences), squeeze=False, sharey=True)[0]
    for axes, tuned in zip(panels, t.divergences, strict=True):
        for name in ("mod", "soup", "retrained", "best of 4", "best of 16"):
            at = [policies.CENTRE] if name.startswith("best") else policies.EQUAL
            _line(axes, name, [t.one(w, name, tuned) for w in at], "kl", "overall")
        axes.set_xscale("symlog", linthresh=0.1)
        _finish(axes, "KL to the reference (nats)", "overall reward, equal weights", tuned)
    panels[0].legend(fontsize=7)


PICTURES: dict[str, dict[str, Callable[[Any, Record], None]]] = {
    "alignment": {"alignment_pareto": pareto, "alignment_kl": against_kl},
    "control": control_plots.PICTURES,
}
