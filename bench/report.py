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


def head(result: dict[str, Any]) -> list[str]:
    """Title, command and machine of a report."""
    machine = [f"- {name}: {value}" for name, value in result["machine"].items()]
    if "base" in result:
        machine.append(f"- base: {result['base']}")
    return [f"# {result['case']}: {result['what']}", "", f"`{result['command']}`", "", *machine]


#: Fields of a problem that get a column where they differ between rows, and its heading.
_COLUMNS = {"reference": "models", "values": "J", "setting": "logits", "filters": "filters"}


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that need a column; the number of policies is shown with the reference."""
    fields = [f for f in _COLUMNS if len({row.get(f) for row in rows}) > 1]
    policies = len({row.get("policies") for row in rows}) > 1
    return ["reference", *fields] if policies and "reference" not in fields else fields


def _cell(row: Mapping[str, Any], field: str) -> str:
    if field == "reference":
        return "ref + " * row["reference"] + str(row["policies"])
    return str(row[field])


def labels(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the columns that say which problem a row is of."""
    fields = varying(rows)
    cells = [
        [r["divergence"], str(r["batch"]), str(r["vocab"]), *(_cell(r, f) for f in fields)]
        for r in rows
    ]
    return ["divergence", "B", "V", *(_COLUMNS[f] for f in fields)], cells


def _ratio_cell(row: Mapping[str, Any], name: str) -> str:
    if name == "base":
        of = row["base_ratio"]
        return f"{of['ratio']:.3f} ({of['p20']:.3f} to {of['p80']:.3f})"
    return number(row["ratios"][name]) if name in row["ratios"] else ""


def _timing_cells(row: dict[str, Any], names: Sequence[str], ratios: Sequence[str]) -> list[str]:
    if row["refused"]:
        return ["refused: " + row["refused"], *[""] * (len(names) + len(ratios))]
    timings, mine = row["timings"], row["timings"][names[0]]
    first = f"{number(mine['median_us'])} ({number(mine['p20_us'])} to {number(mine['p80_us'])})"
    cells = [first + " \\*" * disturbed(row)]
    cells += [number(timings[n]["median_us"]) if n in timings else "" for n in names[1:]]
    cells += [_ratio_cell(row, k) for k in ratios]
    return [*cells, number(row["gb_per_s"])]


def _distance(tv: Mapping[str, float | None], name: str) -> str:
    found = tv.get(name, "")
    return "NaN" if found is None else f"{found:.1e}" if found != "" else ""


def timing_markdown(result: dict[str, Any]) -> str:
    """Tables of a timing run: one per dtype and thread count, then accuracy and what is missing."""
    names = result["contestants"]
    out = head(result)
    if count := sum(disturbed(row) for row in result["rows"]):
        warning = f"**{count} of {len(result['rows'])} rows, marked \\*, were disturbed:** other "
        out += [
            "",
            warning + f"processes kept more than {DISTURBED} cores busy. Do not trust them.",
        ]
    ratios = list(dict.fromkeys(k for r in result["rows"] for k in r["ratios"]))
    times = [f"{names[0]} µs (p20 to p80)", *(f"{name} µs" for name in names[1:])]
    times += ["ours / floor" if k == "floor" else f"{k} / ours" for k in ratios]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["dtype"], row["threads"]), []).append(row)
    for (dtype, threads), rows in groups.items():
        rows = sorted(rows, key=lambda r: (r["vocab"], r["batch"]))
        rows = sorted(rows, key=lambda r: result["divergences"].index(r["divergence"]))
        title = f"## {dtype}, {threads} thread{'s' * (threads > 1)}"
        heading, cells = labels(rows)
        cells = [c + _timing_cells(r, names, ratios) for c, r in zip(cells, rows, strict=True)]
        out += ["", title, "", markdown_table([*heading, *times, "GB/s"], cells)]

    accurate = [name for name in names if any(name in r["tv"] for r in result["rows"])]
    heading, cells = labels(result["rows"])
    seen: dict[tuple[str, ...], dict[str, float | None]] = {}  # the same for all batches
    for cell, row in zip(cells, result["rows"], strict=True):
        seen.setdefault((cell[0], row["dtype"], *cell[2:]), {}).update(row["tv"])
    rows_tv = [[*key, *(_distance(tv, n) for n in accurate)] for key, tv in seen.items()]
    out += ["", "## Total variation from the float64 oracle, first row", ""]
    out.append(markdown_table([heading[0], "dtype", *heading[2:], *accurate], rows_tv))
    skipped = sorted(
        {f"- {name}: {why}" for r in result["rows"] for name, why in r["skipped"].items()}
        | {f"- {problem}" for problem in result.get("left_out", ())}
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
    return "\n".join([*head(result), "", markdown_table(header, rows)]) + "\n"
