"""The roofline: how much of the machine's issue slots and bandwidth each row uses."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .record import PASSED, SKIPPED


def draw(file: Path, rows: Sequence[Mapping[str, Any]], bandwidth: float) -> tuple[str, str]:
    """Write the picture; the status and what there is to say. Each point is a row: its floor by
    bytes and its floor by instructions, both as shares of its time."""
    timed = [r for r in rows if r.get("floors_us")]
    if importlib.util.find_spec("matplotlib") is None:
        return SKIPPED, "matplotlib is not installed"
    if not timed:
        return SKIPPED, "no row was timed"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    divergences = list(dict.fromkeys(r["divergence"] for r in timed))
    for divergence in divergences:
        points = [r for r in timed if r["divergence"] == divergence]
        size = [r["bytes"] for r in points]
        speed = [r["bytes"] / r["times"]["kernel"]["median_us"] / 1e3 for r in points]
        (line,) = axes.loglog(size, speed, "o", label=divergence)
        issue = sorted(
            (r["bytes"], r["bytes"] / r["floors_us"]["issue"] / 1e3)
            for r in points
            if r["floors_us"]["issue"]
        )
        if issue:
            axes.loglog(*zip(*issue, strict=True), ":", color=line.get_color(), linewidth=1)
    roof = bandwidth / 1e9
    axes.axhline(roof, color="black", linewidth=1, label="copy")
    axes.set_xlabel("bytes of logits")
    axes.set_ylabel("GB/s (dotted: what the instructions allow)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return PASSED, file.name
