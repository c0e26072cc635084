"""`python -m bench.run CASE`: the one benchmark runner.

Each problem's inputs first go through a correctness check; a backend that fails it is not timed,
its row says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import check, measure, memory, report
from .problem import DIVERGENCES, Problem, logits
from .registry import Case, Contestant, Grid, cases, ours, set_threads

SCHEMA = 1
#: Seconds for all repetitions of one contestant in one cell, and the fewest rounds.
BUDGET, ROUNDS = 0.15, 5
QUICK_BUDGET = 0.01
MEMORY_SHAPES = ((1, 128256), (64, 128256))


def _shape(text: str) -> tuple[int, int]:
    try:
        batch, vocab = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected BxV such as 8x128256, got {text!r}") from None
    if batch < 1 or vocab < 1:
        raise argparse.ArgumentTypeError(f"expected positive B and V, got {text!r}")
    return batch, vocab


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = cases()
    out = argparse.ArgumentParser(
        prog="python -m bench.run",
        description="Time a case: " + "; ".join(f"{n}: {c.help}" for n, c in known.items()) + ".",
    )
    out.add_argument("case", choices=list(known))
    out.add_argument("--backends", nargs="+", metavar="NAME", help="of ours; the first is compared")
    out.add_argument("--contestants", nargs="*", metavar="NAME", help="besides ours; none if empty")
    out.add_argument("--divergences", nargs="+", choices=DIVERGENCES)
    out.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"))
    out.add_argument("--shapes", nargs="+", type=_shape, metavar="BxV")
    out.add_argument("--threads", nargs="+", type=int, metavar="N")
    out.add_argument("--budget", type=float, metavar="S", help="seconds per contestant and cell")
    out.add_argument("--quick", action="store_true", help="small shapes, seconds in all")
    out.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    out.add_argument("--out", type=Path, metavar="DIR", help="write CASE.json and CASE.md here")
    return out


def _command(argv: Sequence[str]) -> str:
    """The command as typed, less where it writes: paths are nobody else's business."""
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith(("--json=", "--out=")):
            skip = False
        elif word in ("--json", "--out"):
            skip = True
        else:
            kept.append(word)
    return "python -m bench.run " + shlex.join(kept)


def _grid(case: Case, args: argparse.Namespace) -> Grid:
    grid = case.quick if args.quick else case.grid
    if args.memory and not args.quick:
        grid = grid._replace(shapes=MEMORY_SHAPES, dtypes=("bfloat16",))
    for name in ("divergences", "dtypes", "shapes", "threads"):
        if getattr(args, name):
            grid = grid._replace(**{name: tuple(getattr(args, name))})
    return grid


def _contestants(case: Case, args: argparse.Namespace) -> tuple[list[str], dict[str, Contestant]]:
    """Names of ours, and all that is to be timed, ours first."""
    backends = list(args.backends or case.backends)
    if args.contestants is not None:
        if unknown := set(args.contestants) - set(case.contestants):
            raise SystemExit(
                f"unknown contestants {sorted(unknown)}, expected some of {list(case.contestants)}"
            )
        chosen = {name: case.contestants[name] for name in args.contestants}
    else:
        chosen = {
            name: c
            for name, c in case.contestants.items()
            if c.default and not (c.slow_to_compile and args.quick)
        }
    return backends, {name: ours(name) for name in backends} | chosen


def _foreseen(name: str, problem: Problem, rows: list[dict[str, Any]]) -> float:
    """Seconds a call should take, from the largest like problem that was timed; 0 if unknown."""
    like = [
        r
        for r in rows
        if (r["divergence"], r["dtype"], r["threads"])
        == (problem.divergence, problem.dtype, problem.threads)
        and name in r["timings"]
    ]
    if not like:
        return 0.0
    largest = max(like, key=lambda r: r["batch"] * r["vocab"])
    scale = problem.batch * problem.vocab / (largest["batch"] * largest["vocab"])
    return largest["timings"][name]["median_us"] * 1e-6 * scale


def _row(
    problem: Problem,
    largest_batch: int,
    backends: list[str],
    contestants: dict[str, Contestant],
    earlier: list[dict[str, Any]],
    budget: float,
    tv_of_peer: dict[tuple[str, ...], float | None],
) -> dict[str, Any]:
    """Check, then time one problem."""
    set_threads(problem.threads)
    inputs = logits(problem, largest_batch)
    expected = check.oracle(problem, largest_batch)
    row: dict[str, Any] = {
        **{k: v for k, v in problem._asdict().items() if k != "weights"},
        "logits_bytes": problem.bytes,
        "refused": "",
        "tv": {},
        "timings": {},
        "ratios": {},
        "gb_per_s": None,
        "other_cores": None,  # kept busy by other processes meanwhile, on average
        "skipped": {},
    }
    for name in backends:
        result = check.check(problem, inputs, expected, name)
        row["tv"][name] = result.tv
        if not result.passed:
            row["refused"] = f"{name}: {result.reason}"
            return row
    for name, contestant in contestants.items():
        if contestant.log_probs is None:
            continue
        key = (name, problem.divergence, problem.dtype, str(problem.vocab))
        if key not in tv_of_peer:
            log_p = contestant.log_probs([x[:1] for x in inputs], problem.divergence)[0]
            distance = check.total_variation(log_p, expected)
            tv_of_peer[key] = distance if distance == distance else None
        row["tv"][name] = tv_of_peer[key]

    calls: dict[str, measure.Call] = {}
    for name, contestant in contestants.items():
        limit = contestant.call_limit
        if name not in backends and _foreseen(name, problem, earlier) > limit:
            where = f"{problem.divergence}, {problem.dtype}, B={problem.batch}, V={problem.vocab}"
            row["skipped"][name] = f"{where}: a call would take over {limit:g} s"
            continue
        try:
            calls[name] = contestant.build(problem, inputs)
            calls[name]()  # compiles
        except (OSError, subprocess.CalledProcessError) as error:  # no compiler
            calls.pop(name, None)
            row["skipped"][name] = f"cannot be built: {type(error).__name__}"
    others = measure.Others()
    timings = measure.interleaved(calls, budget, ROUNDS)
    row["other_cores"] = others.cores()
    row["timings"] = {name: timing._asdict() for name, timing in timings.items()}

    mine = timings[backends[0]].median_us
    peers = {n: t.median_us for n, t in timings.items() if not contestants[n].floor}
    floor = [t.median_us for n, t in timings.items() if contestants[n].floor]
    row["ratios"] = {name: us / mine for name, us in peers.items() if name != backends[0]}
    if floor:
        row["ratios"]["floor"] = mine / max(floor)
    row["gb_per_s"] = problem.bytes / mine / 1e3
    return row


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def time_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of a timing run, and how they were made."""
    backends, contestants = _contestants(case, args)
    budget = args.budget or (QUICK_BUDGET if args.quick else BUDGET)
    grid = _grid(case, args)
    problems = grid.problems()
    largest_batch = max(p.batch for p in problems)
    threads = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    tv_of_peer: dict[tuple[str, ...], float | None] = {}
    start = time.monotonic()
    try:
        for i, problem in enumerate(problems, 1):
            row = _row(problem, largest_batch, backends, contestants, rows, budget, tv_of_peer)
            rows.append(row)
            times = {n: round(t["median_us"]) for n, t in row["timings"].items()}
            shown = row["refused"] or " ".join(f"{n} {us}" for n, us in times.items())
            where = " ".join(str(x) for x in problem[:5])
            if report.disturbed(row):
                shown += f"  DISTURBED: others kept {row['other_cores']:.2f} cores busy"
            _note(f"{time.monotonic() - start:4.0f} s  {i}/{len(problems)}  {where}: {shown}")
    finally:
        set_threads(threads)
    return {
        "what": "time",
        "budget_s": budget,
        "contestants": list(contestants),
        "divergences": list(grid.divergences),
        "rows": rows,
    }


def measure_memory(case: Case, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of a memory run."""
    _, contestants = _contestants(case, args)
    kept = [n for n, c in contestants.items() if not c.floor and not c.slow_to_compile]
    rows = []
    for problem in _grid(case, args).problems():
        for contestant in kept:
            grown = memory.growth(name, contestant, problem)
            shape = {k: v for k, v in problem._asdict().items() if k != "weights"}
            row = {**shape, "contestant": contestant, "growth_bytes": grown}
            rows.append({**row, "logits_bytes": problem.bytes})
            _note(f"{' '.join(str(x) for x in problem[:5])}: {contestant} {grown / 1e6:.2f} MB")
    return {"what": "peak memory of one call", "contestants": kept, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a case; 0, or 1 if a result was refused."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    case = cases()[args.case]
    machine = report.machine()  # first: a later commit is not what was measured
    done = measure_memory(case, args.case, args) if args.memory else time_case(case, args)
    result = {
        "schema": SCHEMA, "case": args.case, "command": _command(argv), "machine": machine, **done
    }  # fmt: skip
    text = report.memory_markdown(result) if args.memory else report.timing_markdown(result)
    print(text)
    written = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if args.json:
        args.json.write_text(written)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.case + "_memory" * args.memory
        (args.out / f"{stem}.json").write_text(written)
        (args.out / f"{stem}.md").write_text(text)
    refused = [r for r in done["rows"] if r.get("refused")]
    if refused:
        _note(f"{len(refused)} of {len(done['rows'])} rows refused: the check failed")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
