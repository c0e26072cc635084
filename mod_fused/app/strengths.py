"""Rewards and KL at each strength of value guidance and weight vector: measures, table, plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..decoding.ensemble import Ensemble
from ..guidance import Guidance
from . import trade_off as sweep
from .trade_off import Point, Reward, mean_and_error


class Guided(NamedTuple):
    """Responses at one strength, the same for all scorers, and one weight vector.

    Without value guidance the strength is None.
    """

    strength: float | None
    point: Point


def evaluating(
    ensemble: Ensemble,
    prompts: Sequence[Any],
    grid: Sequence[Sequence[float]],
    strengths: Sequence[float],
    guide: Guidance,
    rewards: Sequence[Reward] | None,
    *,
    done: int = 0,
    **options: Any,
) -> Iterator[list[Guided]]:
    """`trade_off.evaluating` at every strength, with the same arguments.

    Raises:
        ValueError: if a decode has an invalid step.
    """
    for strength in strengths:
        options |= {"value_fn": guide, "value_weights": [strength] * guide.num_values}
        left_out = min(done, len(grid))
        done -= left_out
        for points in sweep.evaluating(ensemble, prompts, grid, rewards, done=left_out, **options):
            yield [Guided(strength, point) for point in points]


def _columns(
    guided: Guided, names: Sequence[str], labels: Sequence[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The settings of a line, and the measured columns."""
    _, point = guided
    given = {f"weight_{name}": w for name, w in zip(names, point.weights, strict=True)}
    rewards = () if point.rewards is None else point.rewards
    measured = {f"reward_{name}": r for name, r in zip(labels, rewards, strict=True)}
    return {"strength": guided.strength} | given, measured | {"kl": point.kl}


def table_rows(
    found: Sequence[Guided], names: Sequence[str], labels: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: strength, weights if there are policies, rewards and KL with errors."""
    rows = []
    for guided in found:
        given, measured = _columns(guided, names, labels)
        cells = ["{:.3f} ±{:.3f}".format(*mean_and_error(x)) for x in measured.values()]
        rows.append([*(f"{x:.3g}" for x in given.values()), *cells])
    return ["strength", *(f"weight {name}" for name in names), *labels, "KL(pi*||ref)"], rows


def line(guided: Guided, names: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """One line of the CSV: strength, weights, rewards if measured, KL, their errors."""
    values, measured = _columns(guided, names, labels)
    for name, column in measured.items():
        values[name], values[f"{name}_se"] = mean_and_error(column)
    return values | {"prompts": len(guided.point.kl), "samples": guided.point.samples}


def draw(
    path: str | Path,
    found: Sequence[Guided],
    names: Sequence[str],
    labels: Sequence[str],
    title: str,
) -> None:
    """Plot one panel per reward: its mean against KL, with bands of 1.96 standard errors.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'mod-fused[demo]'") from error
    figure = Figure(figsize=(4.6 * len(labels), 4.4), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, label in zip(panels, labels, strict=True):
        for weights in dict.fromkeys(guided.point.weights for guided in found):
            line = [guided for guided in found if guided.point.weights == weights]
            line.sort(key=lambda guided: guided.point.kl.mean())
            measured = [_columns(guided, names, labels)[1] for guided in line]
            kl = np.array([m["kl"].mean() for m in measured])
            y, se = np.array([mean_and_error(m[f"reward_{label}"]) for m in measured]).T
            words = ", ".join(f"{w:.2g} {n}" for w, n in zip(weights, names, strict=True))
            (drawn,) = axes.plot(kl, y, "o-", markersize=4, label=words or "reference, guided")
            axes.fill_between(kl, y - 1.96 * se, y + 1.96 * se, color=drawn.get_color(), alpha=0.2)
            for guided, px, py in zip(line, kl, y, strict=True):
                note = f"{guided.strength:g}"
                axes.annotate(note, (px, py), (4, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel("KL(pi* || pi_ref) of responses (nats)")
        axes.set_ylabel(f"{label} (mean reward, 95% band)")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
