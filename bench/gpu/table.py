"""The report as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..report import markdown_table, number
from .record import FAILED, SKIPPED, TIMED_OUT

_PEERS = ("graph", "allocating", "eager", "compile", "read", "flashinfer")


def _benchmark(data: Mapping[str, Any]) -> list[str]:
    header = ["divergence", "B", "V", "M", "filters", "L2", "kernel µs (p20 to p80)"]
    header += [f"{name} µs" for name in _PEERS]
    header += ["GB/s", "of the larger floor", "eager / ours", "compile / ours"]
    lines = []
    for r in data["rows"]:
        cells = [r["divergence"], str(r["batch"]), str(r["vocab"]), str(r["policies"])]
        cells += [r["filters"] or "none", "cold" if r["cold"] else "warm"]
        if r["refused"]:
            lines.append([*cells, "refused: " + r["refused"], *[""] * (len(_PEERS) + 4)])
            continue
        times, ratios = r["times"], r["ratios"]
        low, high = number(times["kernel"]["p20_us"]), number(times["kernel"]["p80_us"])
        cells.append(f"{number(times['kernel']['median_us'])} ({low} to {high})")
        cells += [number(times[n]["median_us"]) if n in times else "" for n in _PEERS]
        cells += [number(r["gb_per_s"]), f"{r['of_floor']:.0%}"]
        cells += [number(ratios[n]) if n in ratios else "" for n in ("eager", "compile")]
        lines.append(cells)
    roof = data.get("copy_bytes_per_second", 0.0) / 1e9
    out = ["", "## Benchmark", "", f"bfloat16; copy bandwidth {number(roof)} GB/s."]
    out += ["", markdown_table(header, lines), ""]
    out.append(
        "Kernel: device time of one call by events, into outputs and a workspace that are there. "
        "Graph: of one replay. Allocating: a call without them, which zeroes counters first. Cold: "
        "the L2 cache was filled with something else before each call; warm: calls one after "
        "another. Floors: bytes over copy bandwidth, and (M = 2) instructions over issue slots at "
        "the highest clock, for an f-divergence those of an ideal of two sweeps."
    )
    missing = Counter(
        f"{name}: {why.splitlines()[0]}" for r in data["rows"] for name, why in r["skipped"].items()
    )
    out += [f"- {what} ({count} rows)" for what, count in missing.items()]
    return out


def _questions(data: Mapping[str, Any]) -> list[str]:
    costs = [[name, number(x["median_us"])] for name, x in data.get("launch", {}).items()]
    out = ["", "## Launch", "", markdown_table(["what", "µs"], costs), "", "## Schedules", ""]
    lines = []
    for row in data.get("schedules", []):
        base = row["schedules"].get("shipped", {}).get("kernel", {}).get("median_us")
        for name, found in row["schedules"].items():
            if found["refused"]:
                lines.append([row["label"], name, "refused: " + found["refused"], *[""] * 4])
                continue
            took = found["kernel"]["median_us"]
            steps = ", ".join(f"{n}: {rows}" for n, rows in found.get("steps", {}).items())
            cells = [number(took), number(took / base) if base else ""]
            cells += [number(found["graph"]["median_us"]), str(found["launches"]), steps]
            lines.append([row["label"], name, *cells])
    header = ["call", "schedule", "kernel µs", "of the shipped", "graph µs", "launches"]
    out += [markdown_table([*header, "rows by evaluations"], lines), "", "## Log-linear", ""]
    lines = []
    for row in data.get("scaling", []):
        times = {name: t["median_us"] for name, t in row["times"].items()}
        cells = [number(times[name]) for name in ("kernel", "graph", "read")]
        cells += [number(row["bytes"] / times["kernel"] / 1e3)]
        lines.append([row["label"], *cells, f"{times['read'] / times['kernel']:.0%}"])
    header = ["call", "kernel µs", "graph µs", "read kernel µs", "GB/s", "of the read kernel"]
    return [*out, markdown_table(header, lines)]


def markdown(stages: Mapping[str, Any], dry: bool) -> str:
    """Header, what each stage came to, what failed or was left out and why, the table."""
    out = ["# GPU check" + (" (dry run: no GPU, its times mean nothing)" if dry else ""), ""]
    header = stages.get("machine", {}).get("data", {}).get("header", {})
    out += [f"- {name}: {value}" for name, value in header.items()]
    lines = []
    for name, stage in stages.items():
        counts = Counter(item["status"] for item in stage["items"])
        shown = ", ".join(f"{n} {status}" for status, n in counts.items())
        lines.append([name, stage["status"], f"{stage['seconds']:.0f}", shown])
    out += ["", markdown_table(["stage", "status", "seconds", "items"], lines)]
    for status, title in ((FAILED, "Failures"), (TIMED_OUT, "Out of time"), (SKIPPED, "Skipped")):
        found = [(n, i) for n, s in stages.items() for i in s["items"] if i["status"] == status]
        if not found:
            continue
        out += ["", f"## {title}", ""]
        for name, item in found:
            first, *rest = item["detail"].rstrip().splitlines() or [""]
            out.append(f"- {name}: {item['name']}: {rest[-1].strip() if rest else first}")
            if rest and status == FAILED:
                out += ["", "  ```", *[f"  {line}" for line in [first, *rest][-25:]], "  ```", ""]
    details = [
        (n, i)
        for n, s in stages.items()
        if n not in ("benchmark", "questions")
        for i in s["items"]
        if i["detail"]
    ]
    found = [f"- {n}: {i['name']}: {i['detail']}" for n, i in details if i["status"] == "passed"]
    out += ["", "## What was found", "", *found]
    if "benchmark" in stages and stages["benchmark"]["data"].get("rows"):
        out += _benchmark(stages["benchmark"]["data"])
    if "questions" in stages:
        out += _questions(stages["questions"]["data"])
    return "\n".join(out) + "\n"
