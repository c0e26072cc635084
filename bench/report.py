"""The machine, and results as Markdown."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

#: A row during which other processes kept more cores than this busy is marked: not to be trusted.
DISTURBED = 0.1
_ROOT = Path(__file__).resolve().parents[1]


def _output(*command: str) -> str:
    """A command's standard output, stripped; empty when it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _caches() -> str:
    found = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = (cache / "level").read_text().strip(), (cache / "type").read_text().strip()
        if kind != "Instruction":
            found.append(f"L{level} {(cache / 'size').read_text().strip()}")
    return ", ".join(found) or "unknown"


def _instruction_set() -> str:
    from mod_fused import backends, cpu_backend

    status = backends()["cpu"]
    return cpu_backend.instruction_set() if status == "available" else f"none ({status})"


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    code = ("csrc", "mod_fused", "triton_kernels", "bench/*.py")
    changed = _output("git", "status", "--porcelain", "--", *code)
    return commit + (" with uncommitted changes" if changed else "")


def machine() -> dict[str, str]:
    """What a figure depends on besides the code: hardware and versions."""
    compiler = _output(os.environ.get("CXX", "g++"), "--version").splitlines()
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "caches": _caches(),
        "instruction set": _instruction_set(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "compiler": compiler[0] if compiler else "none",
        "commit": _commit(),
    }


def disturbed(row: Mapping[str, Any]) -> bool:
    """Whether other processes were too busy for this row's times to be trusted."""
    return (row.get("other_cores") or 0.0) > DISTURBED


def number(x: float) -> str:
    """At most three digits that mean something."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _head(result: dict[str, Any]) -> list[str]:
    machine = [f"- {name}: {value}" for name, value in result["machine"].items()]
    return [f"# {result['case']}: {result['what']}", "", f"`{result['command']}`", "", *machine]


def _timing_row(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    cells = [row["divergence"], str(row["batch"]), str(row["vocab"])]
    if row["refused"]:
        return [*cells, "refused: " + row["refused"], *[""] * (len(names) + 3)]
    timings, first = row["timings"], names[0]
    mine = timings[first]
    cells.append(
        f"{number(mine['median_us'])} ({number(mine['p20_us'])} to {number(mine['p80_us'])})"
    )
    if disturbed(row):
        cells[-1] += " \\*"
    cells += [number(timings[n]["median_us"]) if n in timings else "" for n in names[1:]]
    ratios = row["ratios"]
    cells += [number(ratios[k]) if k in ratios else "" for k in ("compile", "eager", "floor")]
    return [*cells, number(row["gb_per_s"])]


def timing_markdown(result: dict[str, Any]) -> str:
    """Tables of a timing run: one per dtype and thread count, then accuracy and what is missing."""
    names = result["contestants"]
    out = _head(result)
    if count := sum(disturbed(row) for row in result["rows"]):
        warning = (
            f"**{count} of {len(result['rows'])} rows, marked \\*, were disturbed:** other "
        )
        out += [
            "",
            warning + f"processes kept more than {DISTURBED} cores busy. Do not trust them.",
        ]
    header = ["divergence", "B", "V", f"{names[0]} µs (p20 to p80)"]
    header += [f"{name} µs" for name in names[1:]]
    header += ["compile / ours", "eager / ours", "ours / floor", "GB/s"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["dtype"], row["threads"]), []).append(row)
    for (dtype, threads), rows in groups.items():
        rows = sorted(rows, key=lambda r: (r["vocab"], r["batch"]))
        rows = sorted(rows, key=lambda r: result["divergences"].index(r["divergence"]))
        title = f"## {dtype}, {threads} thread{'s' * (threads > 1)}"
        out += ["", title, "", markdown_table(header, [_timing_row(r, names) for r in rows])]

    accurate = [name for name in names if any(name in r["tv"] for r in result["rows"])]
    seen = {(r["divergence"], r["dtype"], r["vocab"]): r["tv"] for r in result["rows"]}
    rows_tv = [
        [d, dtype, str(v), *[f"{tv[n]:.1e}" if tv.get(n) is not None else "NaN" for n in accurate]]
        for (d, dtype, v), tv in seen.items()
    ]
    out += ["", "## Total variation from the float64 oracle, first row", ""]
    out.append(markdown_table(["divergence", "dtype", "V", *accurate], rows_tv))
    skipped = sorted(
        {f"- {name}: {why}" for r in result["rows"] for name, why in r["skipped"].items()}
    )
    if skipped:
        out += ["", "## Not timed", "", *skipped]
    return "\n".join(out) + "\n"


def memory_markdown(result: dict[str, Any]) -> str:
    """The table of a memory run."""
    header = ["divergence", "contestant", "dtype", "B", "V", "threads", "growth MB"]
    header += ["bytes / (V · threads)", "of the logits"]
    rows = []
    for r in result["rows"]:
        cells = [r["divergence"], r["contestant"], r["dtype"]]
        cells += [str(r[k]) for k in ("batch", "vocab", "threads")]
        per_entry = r["growth_bytes"] / (r["vocab"] * r["threads"])
        share = f"{r['growth_bytes'] / r['logits_bytes']:.1%}"
        rows.append([*cells, number(r["growth_bytes"] / 1e6), number(per_entry), share])
    return "\n".join([*_head(result), "", markdown_table(header, rows)]) + "\n"
