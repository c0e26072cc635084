"""The report of `predict.py`, from its JSON."""

from __future__ import annotations

from typing import Any

from .. import report

_ABOUT = """The times are computed from the instructions of the compiled kernels and nominal
latencies; nothing has run. Trust ratios more than times, which are right to about 30%.
`bench/gpu/predict.py` lists what is assumed; so moments solve the rows of forward KL and
Jensen-Shannon. *Latency*: of a full GPU's tasks; *chain*: of one row's phases, one after the
other; *filters*: of their launch. The floors are the time to read the
logits once at 4.3 TB/s, and the time to issue the instructions on a full GPU. *Sweeping*: with all
sweeps of the filters over a row's keys, which several programs share where rows are few. A search
of the filters whose code does not show its passes has {search}; a flat row whose logits are like a
normal distribution has 5 or 6 rounds, 8 with top-k and top-p. With few rows a task of the
log-sum-exps is one tile and has no loop: there *a further tile* shows next to nothing, and the
issue floor lacks it."""
_PHASES = """## Phases

V = 128256. A task is a program's way to its arrival with one tile; then what a further tile of 1024
tokens costs a warp; then what the last program to arrive does to end the phase. A program of the
filters does a row, or a slice of one, shown as an end. *Kernel* is the registers of all phases
together, *programs* how many a multiprocessor holds."""


def _number(x: float | None) -> str:
    return "" if x is None else report.number(x)


def _count(x: float | None) -> str:
    return "" if x is None else f"{x:.0f}"


def _times(rows: list[dict[str, Any]]) -> str:
    before = any(row.get("before_us") for row in rows)
    header = ["call", "V", "B", "µs", *["before", "before / now"] * before]
    header += ["bound by", "HBM floor", "issue floor", "µs, sweeping"]
    lines = []
    for row in rows:
        line = [row["call"], str(row["vocab"]), str(row["batch"]), _number(row["us"])]
        if before:
            old = row["before_us"]
            line += [_number(old), _number(old / row["us"] if old else None)]
        line += [row["bound"], _number(row["hbm_us"]), _number(row["issue_us"])]
        lines.append([*line, _number(row.get("sweeping_us"))])
    return report.markdown_table(header, lines)


#: By heading: the field of a phase, whether it is a count.
_COLUMNS = {
    "registers": ("registers", True), "kernel": ("kernel_registers", True),
    "threads": ("threads", True), "programs": ("programs", True), "task µs": ("task_us", False),
    "tile: cycles": ("tile_cycles", True), "instructions": ("tile_instructions", True),
    "barriers": ("tile_barriers", True), "shuffles": ("tile_shuffles", True),
    "special": ("tile_special", True), "wide loads": ("tile_wide_loads", True),
    "end: µs": ("end_us", False), "instructions ": ("end_instructions", True),
    "barriers ": ("end_barriers", True), "shuffles ": ("end_shuffles", True),
    "float64": ("end_float64", True),
}  # fmt: skip


def _phases(records: list[dict[str, Any]]) -> str:
    lines = []
    for x in records:
        line = [x["call"], str(x["batch"]), x["phase"]]
        for name, count in _COLUMNS.values():
            line.append((_count if count else _number)(x.get(name)))
        lines.append(line)
    header = ["call", "B", "phase", *map(str.strip, _COLUMNS)]
    return report.markdown_table(header, lines)


def markdown(result: report.Result) -> str:
    """The report."""
    parts = [report.head(f"{result['case']}: {result['what']}", result)]
    parts.append(_ABOUT.format(search=result["search"]))
    parts += [_times(result["rows"]), _PHASES, _phases(result["phases"])]
    return "\n\n".join(parts) + "\n"
