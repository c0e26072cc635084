"""The case `scaling`: the time against V, B, M, J and threads, one at a time, of the cpu and the
torch backend."""

from __future__ import annotations

import os
from typing import Any

from ..case import Case, Grid

_BASE = Grid(
    dtypes=("bfloat16",),
    shapes=((1, 32000),),
    threads=(1,),
    divergences=("reverse_kl", "jsd", "jeffrey"),
)
VOCABULARIES = (64, 256, 1024, 4096, 16384, 65536, 262144)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
OBJECTIVES = (1, 2, 3, 4, 6, 8)

#: By the name of the size that varies: its field in a row, and the grid.
SWEEPS: dict[str, tuple[str, Grid]] = {
    "vocabulary V": ("vocab", _BASE._replace(shapes=tuple((1, v) for v in VOCABULARIES))),
    "batch B": ("batch", _BASE._replace(shapes=tuple((b, 32000) for b in BATCHES))),
    "policies M": ("policies", _BASE._replace(policies=OBJECTIVES)),
    "values J, no policy": ("values", _BASE._replace(policies=(0,), values=(1, 2, 4, 8))),
    "threads": (
        "threads",
        _BASE._replace(shapes=((8, 128256),), threads=tuple(range(1, (os.cpu_count() or 1) + 1))),
    ),
}


def sweep(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The timed rows in which this size varies and all others are fixed."""
    field, grid = SWEEPS[name]
    first = grid.problems()[0].shown()
    still = {k: first[k] for k in ("batch", "vocab", "threads", "policies", "values") if k != field}
    chosen = [r for r in rows if r["timings"] and all(r[k] == v for k, v in still.items())]
    return sorted(chosen, key=lambda r: r[field])


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Plot a panel for each size, with a line for each divergence and backend."""
    rows = result["rows"]
    figure.set_size_inches(11, 6)
    panels = figure.subplots(2, 3)
    names = dict.fromkeys(row["divergence"] for row in rows)
    colours = {d: f"C{i}" for i, d in enumerate(names)}
    for axes, name in zip(panels.flat, SWEEPS, strict=False):
        field = SWEEPS[name][0]
        for divergence, colour in colours.items():
            line = [r for r in sweep(rows, name) if r["divergence"] == divergence]
            for backend, style in zip(result["contestants"], ("o-", "x:"), strict=False):
                points = [
                    (r[field], r["timings"][backend][0]) for r in line if backend in r["timings"]
                ]
                if points:
                    label = f"{divergence}, {backend}"
                    axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
        xscale = "log" if field in ("vocab", "batch") else "linear"
        axes.set(xscale=xscale, yscale="log", xlabel=name, ylabel="µs")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    panels.flat[-1].axis("off")
    panels.flat[-1].legend(handles, labels, loc="center")


SCALING = Case(
    help="the cpu backend against V, B, M, J and threads, one at a time; where torch crosses it",
    backends=("cpu", "torch"),
    contestants={},
    grids=tuple(grid for _, grid in SWEEPS.values()),
    quick=(
        _BASE._replace(shapes=((1, 64), (1, 1024), (2, 1024)), divergences=("jsd",)),
        _BASE._replace(shapes=((1, 1024),), divergences=("jsd",), policies=(0,), values=(1,)),
    ),
    picture=draw,
)
