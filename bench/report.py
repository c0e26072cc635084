"""Results as JSON and Markdown, with the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

#: A row is marked as disturbed if other processes kept more cores than this busy.
DISTURBED = 0.1
Row = Mapping[str, Any]
Result = dict[str, Any]
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
    from mod_fused import backends
    from mod_fused.dispatch.backends import instruction_set

    status = backends()["cpu"]
    return instruction_set() if status == "available" else f"none ({status})"


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    code = ("csrc", "mod_fused", "triton_kernels", "bench/*.py")
    changed = _output("git", "status", "--porcelain", "--", *code)
    return commit + (" with uncommitted changes" if changed else "")


def machine() -> dict[str, str]:
    """Hardware, versions and commit: figures depend on them."""
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


def note(text: str) -> None:
    """Print progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def disturbed(row: Row) -> bool:
    """Whether other processes were too busy for this row's times to be trusted."""
    return (row.get("other_cores") or 0.0) > DISTURBED


def number(x: float) -> str:
    """A number with about three significant digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def cells(row: Row) -> dict[str, str]:
    """The cells that a table can show of a row, by name: its fields, and figures such as
    `eager µs`, `eager / ours`, `eager TV` (total variation from the oracle), `eager tok/s`,
    `eager draws`."""
    fields = {name: x for name, x in row.items() if not isinstance(x, (dict, list))}
    out = {name: number(x) if isinstance(x, float) else str(x) for name, x in fields.items()}
    if "policies" in row:
        out["mixture"] = "ref + " * row["reference"] + str(row["policies"])
    if "parameters" in row:
        out["size"] = f"{row['models']} ({row['parameters'] / 1e6:.3g} M)"
    if "growth_bytes" in row:
        out["MB"] = number(row["growth_bytes"] / 1e6)
        out["of the logits"] = f"{row['growth_bytes'] / row['logits_bytes']:.0%}"
    if "tokens / s" in row and disturbed(row):
        out["tokens / s"] += " \\*"
    timings = row.get("timings", {})
    for name, (median, low, high, _) in timings.items():
        ours = name == next(iter(timings))
        out[f"{name} µs"] = number(median) + " \\*" * (ours and disturbed(row))
        if ours:
            out[f"{name} p20 to p80"] = f"{number(low)} to {number(high)}"
    if row.get("gb_per_s"):
        out["GB/s"] = number(row["gb_per_s"])
    out |= {f"{name} / ours": number(x) for name, x in row.get("ratios", {}).items()}
    for name, x in row.get("tokens_per_s", {}).items():
        mark = " \\*" * (disturbed(row) and name == next(iter(timings)))
        out[f"{name} tok/s"] = number(x) + mark
    out |= {f"{name} draws": f"{x:.1%}" for name, x in row.get("draw_share", {}).items()}
    for name, tv in row.get("tv", {}).items():
        out[f"{name} TV"] = "NaN" if tv is None else f"{tv:.1e}"
    if "floor / ours" in out:
        out["ours / floor"] = out.pop("floor / ours")
    if "base_ratio" in row:
        of = row["base_ratio"]
        out["base / ours"] = f"{of['ratio']:.3f} ({of['p20']:.3f} to {of['p80']:.3f})"
    return out


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table of rows. `columns` maps headings to names of `cells`. If a row was refused,
    a last column says why."""
    if any(row.get("refused") for row in rows):
        columns = {**columns, "refused": "refused"}
    lines = [[shown.get(name, "") for name in columns.values()] for shown in map(cells, rows)]
    return markdown_table(list(columns), lines)


#: By heading: the fields that say which problem a row is of.
_LABELS = {
    "models": "size", "divergence": "divergence", "contestant": "contestant", "dtype": "dtype",
    "threads": "threads", "B": "batch", "V": "vocab", "mixture": "mixture", "J": "values",
    "logits": "setting", "filters": "filters", "L2": "l2",
}  # fmt: skip
_FIGURES = "µs|p20 to p80|/ ours|/ floor|GB/s|tok/s|draws|TV|MB|of the logits".split("|")


def all_columns(rows: Sequence[Row]) -> dict[str, str]:
    """Columns of a whole report: the labels that differ between rows, then all figures."""
    shown = [cells(row) for row in rows]
    names = list(dict.fromkeys(name for line in shown for name in line))
    out = {"divergence": "divergence"}
    for heading, name in _LABELS.items():
        if name in ("batch", "vocab") or len({line.get(name) for line in shown}) > 1:
            out[heading] = name
    figures = [name for kind in _FIGURES for name in names if name.endswith(kind)]
    return out | {name: name for name in figures}


def missing(result: Result) -> list[str]:
    """The contestants and problems that were not timed, and why."""
    skipped = [pair for row in result["rows"] for pair in row.get("skipped", {}).items()]
    return sorted({f"{name}: {why}" for name, why in skipped} | set(result.get("left_out", ())))


def head(title: str, result: Result) -> str:
    """Title, command and machine of a report."""
    lines = [f"- {name}: {value}" for name, value in result["machine"].items()]
    lines += [f"- {name}: {result[name]}" for name in ("base", "device") if name in result]
    return f"# {title}\n\n`{result['command']}`\n\n" + "\n".join(lines)


def _whole(result: Result, tables: Sequence[str], marked: str = "") -> str:
    """A report: title, command and machine, disturbed rows, tables, what was not timed."""
    rows = result["rows"]
    parts = [head(f"{result['case']}: {result['what']}", result)]
    if count := sum(map(disturbed, rows)):
        parts.append(
            f"**{count} of {len(rows)} rows{marked} were disturbed:** other processes kept "
            f"more than {DISTURBED} cores busy. Do not trust them."
        )
    parts += tables
    if found := missing(result):
        parts.append("## Not timed\n\n" + "\n".join(f"- {line}" for line in found))
    return "\n\n".join(parts) + "\n"


def markdown(result: Result) -> str:
    """The whole report of a run: all rows and figures."""
    rows = result["rows"]
    return _whole(result, [table(rows, all_columns(rows))], ", marked \\*,")


def plain(result: Result) -> str:
    """A report with all columns of the rows as they stand, and of "memory" where there is one."""
    tables = []
    for records in filter(None, (result["rows"], result.get("memory"))):
        names = [name for name in records[0] if name != "other_cores"]
        lines = [
            [number(x) if isinstance(x := row[name], float) else str(x) for name in names]
            for row in records
        ]
        tables.append(markdown_table(names, lines))
    return _whole(result, tables)


def rounded(x: Any) -> Any:
    """Every number to six digits, and tuples as lists, as JSON has them."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {name: rounded(y) for name, y in x.items()}
    return [rounded(y) for y in x] if isinstance(x, (list, tuple)) else x


def save(result: Result, file: Path) -> None:
    """Write a result as JSON. A list of records is written as a table: the names of the fields
    once, then a line for each record."""
    parts = []
    for name, value in rounded(result).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            fields = list(dict.fromkeys(field for record in value for field in record))
            rows = [[record.get(field) for field in fields] for record in value]
            lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
            text = f'{{"fields": {json.dumps(fields)}, "records": [\n{lines}\n]}}'
        parts.append(f"{json.dumps(name)}: {text}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def load(file: Path) -> Result:
    """The result that `save` wrote. A field that a record did not have is None."""
    result = json.loads(file.read_text())
    for name, value in result.items():
        if isinstance(value, dict) and value.keys() == {"fields", "records"}:
            fields = value["fields"]
            result[name] = [dict(zip(fields, row, strict=True)) for row in value["records"]]
    return result
