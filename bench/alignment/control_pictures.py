"""Pictures of value guidance: reward against KL, and two objectives with MAVIS's iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .guided import PAIR, PANELS

# Marker, line and label of each method.
STYLES = {
    "CD-FUDGE": ("o", "-", "tokenwise, shipped CD-FUDGE scorer"),
    "CD-FUDGE, as CD-Q": ("o", ":", "tokenwise, CD-FUDGE trained as CD-Q"),
    "CD-Q": ("D", "--", "tokenwise, CD-Q scorer"),
    "FUDGE": ("P", "-.", "FUDGE, reward above 0.5"),
    "MOD": ("s", "-", "MOD, one DPO policy"),
    "blockwise": ("^", "-", "blockwise best of K (KL: its bound)"),
    "best of N, reward": ("v", ":", "best of N, true reward (KL: bound)"),
    "best of N, scorer": ("<", ":", "best of N, scorer (KL: bound)"),
}
PAIR_STYLES = {
    "MAVIS": ("o", "-"),
    "CD": ("D", "--"),
    "MOD": ("s", "-"),
    "retrained": ("*", ""),
}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """`control.png` and `mavis.png` in `folder`; returns their paths.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    paths = [folder / "control.png", folder / "mavis.png"]
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, objective in zip(figure.subplots(1, 2), PANELS, strict=True):
        _draw_panel(axes, objective, result["points"])
    figure.savefig(paths[0], dpi=80)
    figure = Figure(figsize=(12, 4), layout="constrained")
    _draw_pair(figure.subplots(1, 3), result)
    figure.savefig(paths[1], dpi=80)
    return paths


def _draw_panel(axes: Any, objective: str, points: list[dict[str, Any]]) -> None:
    for name, (marker, line, label) in STYLES.items():
        found = [p for p in points if p["objective"] == objective and p["method"] == name]
        x = [p["kl"]["value"] for p in found]
        y, low, high = ([p[objective][k] for p in found] for k in ("value", "low", "high"))
        (drawn,) = axes.plot(x, y, marker + line, label=label, markersize=5, linewidth=1.2)
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)
        single = [p for p in found if name == "MOD" and p["setting"] == 1.0]
        for p in single:
            axes.plot(p["kl"]["value"], p[objective]["value"], "k*", label="the DPO policy itself")
    base = next(p for p in points if (p["objective"], p["method"]) == (objective, "reference"))
    axes.plot(base["kl"]["value"], base[objective]["value"], "kx", label="reference")
    axes.set_xlabel("KL to the reference (nats per answer)")
    axes.set_ylabel(f"{objective} (mean reward, 95% bands)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _draw_pair(panels: Any, result: dict[str, Any]) -> None:
    front, worth, iterations = panels
    for name, (marker, line) in PAIR_STYLES.items():
        found = [p for p in result["two"] if p["method"] == name]
        size = 12 if marker == "*" else 5
        form: dict[str, Any] = {"label": name, "markersize": size, "linewidth": 1.2}
        x, y = ([p[k]["value"] for p in found] for k in PAIR)
        front.plot(x, y, marker + line, **form)
        at = [p["setting"][0] for p in found]
        value, low, high = ([p["worth"][k] for p in found] for k in ("value", "low", "high"))
        (drawn,) = worth.plot(at, value, marker + line, **form)
        worth.fill_between(at, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)
    for name, history in result["mavis"].items():
        value, error = ([it[k] for it in history] for k in ("objective", "error"))
        iterations.errorbar(range(len(value)), value, error, marker="o", capsize=3, label=name)
    labels = (
        (front, *(f"{name} (mean reward)" for name in PAIR)),
        (worth, f"weight of {PAIR[0]}", f"J = w r - KL / {result['beta']:g}"),
        (iterations, "MAVIS iteration", "its own J, one standard error"),
    )
    for axes, x_label, y_label in labels:
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
