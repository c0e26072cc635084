"""Tables of the READMEs, each from the JSON of a case: a part of what its Markdown shows."""

from __future__ import annotations

from typing import Any

from .report import disturbed, markdown_table, number

Row = dict[str, Any]


def origin(result: dict[str, Any], marked: bool) -> str:
    """The line under a table: what made it, on what; `marked` if it has disturbed rows."""
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['instruction set']}"
    out = f"`{result['command']}`; {where}, torch {machine['torch']}, commit {machine['commit']}."
    if marked:
        out += " \\*: other processes were busy meanwhile."
    return out


def _mine(result: dict[str, Any], row: Row) -> str:
    timing = row["timings"][result["contestants"][0]]
    return number(timing["median_us"]) + " \\*" * disturbed(row)


def _ratio(row: Row, name: str) -> str:
    return number(row["ratios"][name]) if name in row["ratios"] else ""


def cpu(result: dict[str, Any]) -> str:
    """One thread, the largest common vocabulary: time, how many times faster, distance from the
    floor."""
    rows = [
        row
        for row in result["rows"]
        if (row["dtype"], row["vocab"], row["threads"]) == ("bfloat16", 128256, 1)
        and row["timings"]
    ]
    header = ["divergence", "B", "µs", "torch.compile / ours", "eager / ours", "ours / floor"]
    cells = [
        [row["divergence"], str(row["batch"]), _mine(result, row)]
        + [_ratio(row, name) for name in ("compile", "eager", "floor")]
        for row in rows
    ]
    return markdown_table(header, cells)


def memory(result: dict[str, Any]) -> str:
    """Growth of the peak memory in one call, one thread."""
    cells = [
        [row["divergence"], row["contestant"], str(row["batch"]), str(row["vocab"])]
        + [number(row["growth_bytes"] / 1e6), f"{row['growth_bytes'] / row['logits_bytes']:.0%}"]
        for row in result["rows"]
        if row["threads"] == 1
    ]
    header = ["divergence", "contestant", "B", "V", "MB", "of the logits"]
    return markdown_table(header, cells)
