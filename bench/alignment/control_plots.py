"""The plots of the study of value guidance. Every line has its name at its right end, every mark
stands in the legend; the colours are those of Okabe and Ito, which colour-blind readers can tell
apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .guided import PAIR, PANELS

Record = dict[str, Any]
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
#: Colour, marker and line by method.
ONE = {
    "MOD": (BLUE, "s-"), "soft values": (GREEN, "D-"), "CD-FUDGE": (ORANGE, "o-"),
    "CD-Q": (PURPLE, "P--"), "FUDGE": (SKY, "X-."), "best of N by reward": (BLACK, "v:"),
    "best of N by scorer": (VERMILLION, "^:"), "reference": (BLACK, "*"),
}  # fmt: skip
TWO = {
    "MOD": (BLUE, "s-"), "soup": (VERMILLION, "^--"), "retrained": (BLACK, "v:"),
    "soft values": (GREEN, "D-"), "CD": (ORANGE, "o-"), "CD at half strength": (SKY, "X-."),
    "MAVIS": (PURPLE, "P--"),
}  # fmt: skip
BLOCKS = ((GREEN, "D-"), (BLUE, "s-"), (PURPLE, "P-"), (SKY, "X-"), (VERMILLION, "^-"))
NEAR = 4.0  # nats: where the contest is
KL = "KL to the reference, nats per answer"


class Panel:
    """Axes that collect lines, and name them at their right ends."""

    def __init__(self, axes: Any, x: str, y: str, title: str, most: float | None = None) -> None:
        self.axes, self.most = axes, most
        self.ends: list[tuple[float, str, str]] = []
        axes.set(xlabel=x, ylabel=y, title=title)
        axes.grid(alpha=0.3)

    def line(
        self, name: str, style: tuple[str, str], records: Sequence[Record], x: str, y: str
    ) -> None:
        """Plot y against x, with y's interval where it has one."""
        points = sorted((_value(r[x]), _value(r[y]), r[y]) for r in records)
        if self.most is not None:  # up to the first point outside, where the line is cut
            inside = sum(p[0] <= self.most for p in points)
            points = points[: inside + 1]
        if not points:
            return
        xs, ys = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        bars = np.abs(np.array([p[2] for p in points])[:, 1:].T - ys)
        colour, form = style
        self.axes.errorbar(xs, ys, bars, fmt=form, color=colour, label=name, markersize=5,
                           linewidth=1.3, elinewidth=0.6)  # fmt: skip
        end = np.interp(self.most, xs, ys) if self.most is not None else ys[-1]
        self.ends.append((float(end), name, colour))

    def finish(self) -> None:
        """Set the limits and write the names, none upon another."""
        if self.most is not None:
            self.axes.set_xlim(-0.03 * self.most, self.most)
        low, high = self.axes.get_ylim()
        places = [(end - low) / (high - low) for end, *_ in sorted(self.ends)]
        for i in range(1, len(places)):
            places[i] = max(places[i], places[i - 1] + 0.062)
        over = max(0.0, places[-1] - 1.0)
        for place, (_, name, colour) in zip(places, sorted(self.ends), strict=True):
            self.axes.text(1.02, place - over, name, color=colour, fontsize=8, va="center",
                           transform=self.axes.transAxes)  # fmt: skip


def _value(x: Any) -> float:
    return x[0] if isinstance(x, list) else x


def _finish(figure: Any, panels: Sequence[Panel]) -> None:
    marks: dict[str, Any] = {}
    for panel in panels:
        panel.finish()
        handles, names = panel.axes.get_legend_handles_labels()
        marks |= dict(zip(names, handles, strict=True))
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=4, fontsize=8)


def against_kl(figure: Any, result: Record) -> None:
    """Plot reward against KL for each objective: where the contest is, and as far as it goes."""
    figure.set_size_inches(11, 8.5)
    panels = []
    for row, objective in zip(figure.subplots(2, 2), PANELS, strict=True):
        shown = [p for p in result["points"] if p["objective"] == objective]
        for axes, most, title in zip(row, (NEAR, None), ("up to 4 nats", "all"), strict=True):
            panels.append(Panel(axes, KL, f"{objective} reward", f"{objective}, {title}", most))
            for name, style in ONE.items():
                records = [p for p in shown if p["method"] == name]
                panels[-1].line(name, style, records, "kl", "reward")
    _finish(figure, panels)


def blocks(figure: Any, result: Record) -> None:
    """Plot blockwise control for each objective: against best-of-N by the number of samples, and
    against tokenwise control by KL."""
    figure.set_size_inches(11, 8.5)
    panels = []
    for row, objective in zip(figure.subplots(2, 2), PANELS, strict=True):
        one, found = (
            [p for p in result[part] if p["objective"] == objective]
            for part in ("points", "blocks")
        )
        by_draws, by_kl = (
            Panel(row[0], "K of blocks, or N", f"{objective} reward", f"{objective}, by draws"),
            Panel(row[1], KL, f"{objective} reward", f"{objective}, by KL", 2.5 * NEAR),
        )
        for style, length in zip(BLOCKS, result["sizes"]["block_lengths"], strict=False):
            records = [p for p in found if p["block_length"] == length]
            by_draws.line(f"blocks of {length}", style, records, "k", "reward")
            by_kl.line(f"blocks of {length}", style, records, "kl", "reward")
        for name in ("best of N by reward", "best of N by scorer"):
            records = [p | {"n": int(p["setting"])} for p in one if p["method"] == name]
            style = BLACK, ONE[name][1]
            by_draws.line(name, style, records, "n", "reward")
        by_kl.line("CD-FUDGE", ONE["CD-FUDGE"], [p for p in one if p["method"] == "CD-FUDGE"],
                   "kl", "reward")  # fmt: skip
        by_draws.axes.set_xscale("log", base=2)
        panels += [by_draws, by_kl]
    _finish(figure, panels)


def pareto(figure: Any, result: Record) -> None:
    """Plot the rewards of mixes of two objectives, and J against the first weight."""
    figure.set_size_inches(11, 4.8)
    x, y = PAIR
    left, right = figure.subplots(1, 2)
    front = Panel(left, f"{x} reward", f"{y} reward", "two rewards, mean over trainings")
    worth = Panel(right, f"weight of {x}", f"J = w r - KL / {result['beta']:g}", "J")
    for name, style in TWO.items():
        found = [p | {"at": p["weights"][0]} for p in result["two"] if p["method"] == name]
        front.line(name, style, found, x, y)
        worth.line(name, style, found, "at", "worth")
    reference = [p for p in result["points"] if p["method"] == "reference"][:1]
    front.line("reference", ONE["reference"], reference, x, y)
    _finish(figure, [front, worth])


PICTURES: dict[str, Callable[[Any, Record], None]] = {
    "control_kl": against_kl,
    "control_blocks": blocks,
    "control_pareto": pareto,
}
