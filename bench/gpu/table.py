"""The benchmark's results as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..report import markdown_table, number

_PEERS = ("graph", "allocating", "eager", "compile", "flashinfer")
_EXPLAINED = (
    "Kernel: device time of one call by events, into outputs and a workspace that are there. "
    "Graph: of one replay. Allocating: a call without them, which zeroes counters first. Cold: "
    "the L2 cache was filled with something else before each call; warm: calls one after "
    "another. Floors: bytes over copy bandwidth, and (M = 2) instructions over issue slots at "
    "the highest clock, for an f-divergence those of an ideal of two sweeps."
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [row["divergence"], *(str(row[k]) for k in ("batch", "vocab", "policies"))]
    cells += [row["filters"] or "none", "cold" if row["cold"] else "warm"]
    if row["refused"]:
        return [*cells, "refused: " + row["refused"], *[""] * (len(_PEERS) + 4)]
    times, ratios, kernel = row["times"], row["ratios"], row["times"]["kernel"]
    low, high = number(kernel["p20_us"]), number(kernel["p80_us"])
    cells.append(f"{number(kernel['median_us'])} ({low} to {high})")
    cells += [number(times[n]["median_us"]) if n in times else "" for n in _PEERS]
    cells += [number(row["gb_per_s"]), f"{row['of_floor']:.0%}"]
    return cells + [number(ratios[n]) if n in ratios else "" for n in ("eager", "compile")]


def markdown(report: Mapping[str, Any]) -> str:
    """The report: machine, table, and the rows and peers that are missing, with the reasons."""
    dry = " (dry run: no GPU, its times mean nothing)" * report["dry_run"]
    header = ["divergence", "B", "V", "M", "filters", "L2", "kernel µs (p20 to p80)"]
    header += [f"{name} µs" for name in _PEERS]
    header += ["GB/s", "of the larger floor", "eager / ours", "compile / ours"]
    bandwidth = number(report["copy_bytes_per_second"] / 1e9)
    skipped = Counter(
        f"{name}: {(why.splitlines() or [''])[0]}"
        for row in report["rows"]
        for name, why in row.get("skipped", {}).items()
    )
    return "\n".join(
        [
            f"# Benchmark on a GPU{dry}",
            "",
            *(f"- {name}: {value}" for name, value in report["header"].items()),
            "",
            f"bfloat16; copy bandwidth {bandwidth} GB/s.",
            "",
            markdown_table(header, map(_cells, report["rows"])),
            "",
            _EXPLAINED,
            "",
            *(f"- {what} ({count} rows)" for what, count in skipped.items()),
            *(f"- not timed: {label}" for label in report["not_timed"]),
            *(f"- {label} failed:\n\n```\n{why}```\n" for label, why in report["failed"].items()),
            "`python -m bench.gpu.benchmark`\n",
        ]
    )
