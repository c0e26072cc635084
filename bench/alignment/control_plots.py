"""The plots of the study of value guidance. Every line has its name at its right end, every mark
stands in the legend; the colours are those of Okabe and Ito, which colour-blind readers can tell
apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .guided import PAIR, PANELS

Record = dict[str, Any]
Line = tuple[str, list[Record], str, str]  # method, records, fields of x and y
Panel = tuple[str, str, str, float | None, list[Line]]  # title, x, y, the largest x, lines
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
#: Colour, marker and line by method, in the order of the legend.
STYLES = {
    "MOD": (BLUE, "s-"), "soup": (VERMILLION, "^--"), "retrained": (BLACK, "v:"),
    "soft values": (GREEN, "D-"), "CD-FUDGE": (ORANGE, "o-"), "CD-Q": (PURPLE, "P--"),
    "FUDGE": (SKY, "X-."), "CD": (ORANGE, "o-"), "CD at half strength": (ORANGE, "o:"),
    "MAVIS": (PURPLE, "P-"), "MAVIS at half strength": (PURPLE, "P:"),
    "blocks of 4": (GREEN, "D-"), "blocks of 8": (BLUE, "s-"), "blocks of 16": (PURPLE, "P-"),
    "blocks of 32": (SKY, "X-"), "blocks of 64": (VERMILLION, "^-"),
    "best of N by reward": (BLACK, "v:"), "best of N by scorer": (BLACK, "^--"),
    "best of 4 by reward": (SKY, "<-."), "best of 16 by reward": (SKY, ">-."),
    "reference": (BLACK, "*-"),
}  # fmt: skip
NEAR = 4.0  # nats: where the contest is
KL = "KL to the reference, nats per answer"


def _line(axes: Any, line: Line, most: float | None) -> tuple[float, str]:
    """Plot one method with y's intervals, to the first point beyond `most`; returns the y of its
    right end and its name."""
    name, records, x, y = line
    values = [(*(r[k][0] if isinstance(r[k], list) else r[k] for k in (x, y)), *r[y][1:])
              for r in records]  # fmt: skip
    xs, ys, *ends = np.array(sorted(values)).T
    shown = slice(None if most is None else int((xs <= most).sum()) + 1)
    xs, ys, bars = xs[shown], ys[shown], np.abs(np.array(ends) - ys)[:, shown]
    colour, form = STYLES[name]
    style = {"label": name, "markersize": 5, "linewidth": 1.3, "elinewidth": 0.6}
    axes.errorbar(xs, ys, bars, fmt=form, color=colour, **style)
    return float(ys[-1] if most is None else np.interp(most, xs, ys)), name


def _plot(figure: Any, panels: Sequence[Panel]) -> None:
    """Plot panels, two in a row, and the legend of them all."""
    rows = len(panels) // 2
    figure.set_size_inches(11, 3.9 * rows + 0.9)
    marks: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(rows, 2).flat, panels, strict=True):
        title, x, y, most, lines = panel
        ends = sorted(_line(axes, line, most) for line in lines if line[1])
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if most is not None:
            axes.set_xlim(-0.03 * most, most)
        low, high = axes.get_ylim()
        places = [(end - low) / (high - low) for end, _ in ends]
        for i in range(1, len(places)):  # no name upon another
            places[i] = max(places[i], places[i - 1] + 0.062)
        for place, (_, name) in zip(places, ends, strict=True):
            place -= max(0.0, places[-1] - 1.0)
            axes.text(1.02, place, name, color=STYLES[name][0], fontsize=8, va="center",
                      transform=axes.transAxes)  # fmt: skip
        handles, names = axes.get_legend_handles_labels()
        marks |= dict(zip(names, handles, strict=True))
    order = [name for name in STYLES if name in marks]
    handles = [marks[name] for name in order]
    figure.legend(handles, order, loc="outside lower center", ncols=4, fontsize=8)


def _of(records: Sequence[Record], **wanted: Any) -> list[Record]:
    return [r for r in records if wanted.items() <= r.items()]


def one_objective(figure: Any, result: Record, name: str) -> None:
    """Plot reward against KL, where the contest is and as far as it goes; and blocks against
    best-of-N by the number of draws, and against tokenwise control by KL."""
    one = _of(result["one"], objective=name)
    blocks = [r | {"method": f"blocks of {r['block_length']}", "setting": r["k"]}
              for r in _of(result["blocks"], objective=name)]  # fmt: skip
    drawn = [r for r in one if r["method"].startswith("best")] + blocks
    drawn = [r | {"draws": np.log2(float(r["setting"]))} for r in drawn]
    shown = (
        (f"{name}, up to {NEAR:g} nats", KL, NEAR, one, "kl"),
        (f"{name}, all strengths", KL, None, one, "kl"),
        (f"{name}, blocks by draws", "log2 of K, or of N", None, drawn, "draws"),
        (f"{name}, blocks by KL", KL, 10.0, blocks + _of(one, method="CD-FUDGE"), "kl"),
    )
    _plot(figure, [
        (title, x, f"{name} reward", most,
         [(by, _of(records, method=by), field, "reward") for by in STYLES])
        for title, x, most, records, field in shown
    ])  # fmt: skip


def pareto(figure: Any, result: Record) -> None:
    """Plot the rewards of mixes of two objectives, and J against the first weight."""
    x, y = PAIR
    found = [r | {"at": r["weights"][0]} for r in result["two"]]
    front: list[Line] = [(by, _of(found, method=by), x, y) for by in STYLES]
    worth: list[Line] = [(by, _of(found, method=by), "at", "worth") for by in STYLES]
    j = f"J = w r - KL / {result['beta']:g}"
    _plot(figure, [
        ("two rewards, means over trainings", f"{x} reward", f"{y} reward", None, front),
        ("J, mean over trainings", f"weight of {x}", j, None, worth),
    ])  # fmt: skip


PICTURES: dict[str, Callable[[Any, Record], None]] = {
    f"control_{name}": functools.partial(one_objective, name=name) for name in PANELS
} | {"control_pareto": pareto}
