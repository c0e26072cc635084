"""Tables of the READMEs, each from the JSON of a case: a part of what its Markdown shows."""

from __future__ import annotations

from typing import Any

from . import decoder as decoder_case
from . import scaling as scaling_case
from .report import disturbed, labels, markdown_table, number

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


def comparison(result: dict[str, Any], rows: list[Row]) -> str:
    """All columns that tell problems apart, our time, and ratios to all others."""
    rows = [row for row in rows if row["timings"]]
    heading, cells = labels(rows)
    ratios = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    heading = [*heading, "µs", *(f"{name} / ours" for name in ratios)]
    for cell, row in zip(cells, rows, strict=True):
        cell += [_mine(result, row), *(_ratio(row, name) for name in ratios)]
    return markdown_table(heading, cells)


def filters(result: dict[str, Any]) -> str:
    """The largest batch; which samplers were not there."""
    largest = max(row["batch"] for row in result["rows"])
    text = comparison(result, [row for row in result["rows"] if row["batch"] == largest])
    reasons = {why for row in result["rows"] for why in row["skipped"].values()}
    missing = sorted(why for why in reasons if why.endswith("not installed"))
    return "\n\n".join([text, *[f"Not timed: {', '.join(missing)}."] * bool(missing)])


def distributions(result: dict[str, Any]) -> str:
    """Our time: logits down, divergences across."""
    divergences = result["divergences"]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["rows"]:
        key = (row["setting"], str(row["batch"]), str(row["vocab"]))
        shown = _mine(result, row) if row["timings"] else "refused"
        cells.setdefault(key, {})[row["divergence"]] = shown
    body = [[*key, *(times.get(d, "") for d in divergences)] for key, times in cells.items()]
    return markdown_table(["logits", "B", "V", *(f"{d} µs" for d in divergences)], body)


def scaling(result: dict[str, Any]) -> str:
    """From where on the C++ backend is faster than torch; the sizes are in the picture."""
    cells = [[d, where] for d, where in scaling_case.crossings(result["rows"]).items()]
    return markdown_table(["divergence", "cpu is faster than torch (B = 1)"], cells)


def host(result: dict[str, Any]) -> str:
    """Microseconds of a whole call, of its parts and of bare ops."""
    names = result["contestants"]
    rows = [row for row in result["rows"] if row["timings"]]
    heading, cells = labels(rows)
    for cell, row in zip(cells, rows, strict=True):
        cell += [_mine(result, row)]
        cell += [number(row["timings"][name]["median_us"]) for name in names[1:]]
    return markdown_table([*heading, "sample", *names[1:]], cells)


def decoder(result: dict[str, Any]) -> str:
    """Tokens per second and what drawing takes of it."""
    return markdown_table(*decoder_case.cells(result, result["rows"]))
