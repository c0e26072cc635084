"""Runs a `Case`: checks each problem of its grids, then times the contestants on it, or measures
their memory."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mod_fused.divergence import DIVERGENCES

from . import check, measure, memory, other_commit, report
from .case import Case, Contestant, Grid, NotTimed, Refused, ours, set_threads
from .logits import RECORDED, SETTINGS
from .problem import FILTERS, WEIGHTS, Problem, logits
from .report import note

#: Seconds for all repetitions of one contestant on one problem, and the fewest rounds.
BUDGET, ROUNDS = 0.15, 5
QUICK_BUDGET = 0.01
TRIES = 3  # for a row that other processes disturb; the least disturbed try counts
MEMORY_SHAPES = ((1, 128256), (64, 128256))
BASE = "base"  # the name of the other commit among the contestants
Row = dict[str, Any]
#: Axes of a grid that a command may narrow or widen.
_AXES = ("divergences", "dtypes", "shapes", "threads", "policies", "filters", "settings")


def _shape(text: str) -> tuple[int, int]:
    try:
        batch, vocab = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected BxV such as 8x128256, got {text!r}") from None
    if batch < 1 or vocab < 1:
        raise argparse.ArgumentTypeError(f"expected positive B and V, got {text!r}")
    return batch, vocab


def add_options(parser: argparse.ArgumentParser, case: Case) -> None:
    """The options of a case's grid."""
    add = parser.add_argument
    add("--backends", nargs="+", metavar="NAME", help="of ours; the first is compared")
    others = list(case.contestants)
    add("--contestants", nargs="*", choices=others, metavar="NAME", help="besides ours, or none")
    add("--divergences", nargs="+", choices=DIVERGENCES)
    add("--dtypes", nargs="+", choices=("bfloat16", "float32"))
    add("--shapes", nargs="+", type=_shape, metavar="BxV")
    add("--threads", nargs="+", type=int, metavar="N")
    add("--policies", nargs="+", type=int, metavar="M", choices=range(9))
    add("--filters", nargs="+", metavar="NAME", choices=list(FILTERS))
    add("--settings", nargs="+", metavar="NAME", choices=[*SETTINGS, RECORDED])
    add("--budget", type=float, metavar="S", help="seconds per contestant and cell")
    add("--base", metavar="REV", help="time our first backend beside that of another commit")
    add("--memory", action="store_true", help="measure peak memory instead of time")


def _problems(case: Case, args: argparse.Namespace) -> list[Problem]:
    """The problems of the case's grids with the command's axes, each once."""

    def chosen(grid: Grid) -> Grid:
        if args.memory and not args.quick:
            grid = grid._replace(shapes=MEMORY_SHAPES, dtypes=("bfloat16",))
        wanted = {name: tuple(getattr(args, name)) for name in _AXES if getattr(args, name)}
        return grid._replace(**wanted)

    grids = map(chosen, case.quick if args.quick else case.grids)
    return list(dict.fromkeys(p for grid in grids for p in grid.problems()))


def _contestants(case: Case, args: argparse.Namespace) -> tuple[list[str], dict[str, Contestant]]:
    """The names of our backends, and all contestants, ours first."""
    backends = list(args.backends or case.backends)
    every = case.contestants
    chosen = args.contestants
    if chosen is None:
        chosen = [name for name, c in every.items() if not (c.slow_to_compile and args.quick)]
    return backends, {name: ours(name) for name in backends} | {n: every[n] for n in chosen}


class Timer:
    """Checks and times problems one after another."""

    def __init__(
        self, backends: list[str], contestants: dict[str, Contestant], largest: int, budget: float
    ) -> None:
        """`largest` is the largest batch; smaller batches are its first rows."""
        self.backends, self.contestants = backends, contestants
        self.largest, self.budget = largest, budget
        # By contestant and problem without its shape: seconds per byte of the last problem timed.
        self._seconds: dict[tuple[str, Problem], float] = {}

    def row(self, problem: Problem) -> Row:
        """Check, then time one problem."""
        set_threads(problem.threads)
        inputs = logits(problem, self.largest)
        row: Row = {
            **problem.shown(), "refused": "", "tv": {}, "timings": {}, "ratios": {},
            "gb_per_s": None, "other_cores": None, "skipped": {},
        }  # fmt: skip
        expected = check.oracle(problem, self.largest)
        for name in self.backends:
            result = check.check(problem, inputs, expected, name)
            row["tv"][name] = result.tv
            if not result.passed:
                return row | {"refused": f"{name}: {result.reason}"}
        calls = self._build(problem, inputs, row)
        if row["refused"]:
            return row
        for name in calls:
            of = self.contestants[name].log_probs
            if of is not None and problem.weights == WEIGHTS:
                log_p = of([x[:1] for x in inputs], problem.divergence)[0]
                tv = check.total_variation(log_p, expected)
                row["tv"][name] = tv if tv == tv else None  # NaN
        rounds, row["other_cores"] = self._least_disturbed(calls)
        timings = row["timings"] = measure.timings(rounds)
        for name, t in timings.items():
            self._seconds[name, _shapeless(problem)] = t.median_us * 1e-6 / problem.bytes
        mine = timings[self.backends[0]].median_us
        peers = {n: t.median_us for n, t in timings.items() if not self.contestants[n].floor}
        row["ratios"] = {name: us / mine for name, us in peers.items() if name != self.backends[0]}
        if floor := [t.median_us for n, t in timings.items() if self.contestants[n].floor]:
            row["ratios"]["floor"] = mine / max(floor)
        if BASE in rounds:
            row["base_ratio"] = measure.ratio(rounds[BASE], rounds[self.backends[0]])
        row["gb_per_s"] = problem.bytes / mine / 1e3
        return row

    def _least_disturbed(self, calls: dict[str, measure.Call]) -> tuple[measure.Rounds, float]:
        """The times, and how many cores other processes kept busy meanwhile."""
        processes = [c.pid for c in calls.values() if isinstance(c, other_commit.Process)]
        tries: list[tuple[measure.Rounds, float]] = []
        while len(tries) < TRIES and not (tries and tries[-1][1] <= report.DISTURBED):
            others = measure.Others(processes)
            tries.append((measure.rounds(calls, self.budget, ROUNDS), others.cores()))
        return min(tries, key=lambda one: one[1])

    def _build(
        self, problem: Problem, inputs: list[torch.Tensor], row: Row
    ) -> dict[str, measure.Call]:
        """The calls to time, each made once. The row gets the contestants not timed, and why."""
        calls: dict[str, measure.Call] = {}
        for name, contestant in self.contestants.items():
            limit = contestant.call_limit
            foreseen = self._seconds.get((name, _shapeless(problem)), 0.0) * problem.bytes
            if name not in self.backends and foreseen > limit:
                row["skipped"][name] = f"{problem.label()}: a call would take over {limit:g} s"
                continue
            try:
                call = contestant.build(problem, inputs)
                call()  # compiles
                calls[name] = call
            except (OSError, subprocess.CalledProcessError) as error:  # no compiler
                row["skipped"][name] = f"cannot be built: {type(error).__name__}"
            except ImportError as error:
                row["skipped"][name] = f"{(error.name or 'a package').split('.')[0]} not installed"
            except NotTimed as error:
                row["skipped"][name] = str(error)
            except Refused as error:
                row["refused"] = f"{name}: {error}"
        return calls


def _shapeless(problem: Problem) -> Problem:
    return problem._replace(batch=0, vocab=0)


@contextmanager
def _beside_base(
    revision: str, backend: str, others: dict[str, Contestant], largest: int
) -> Iterator[dict[str, Contestant]]:
    """The contestants of a run with --base: our backend and the other commit's, each in a process
    of its own, then `others`."""
    with other_commit.checkout(revision) as tree:
        trees = {backend: other_commit.ROOT, BASE: tree}
        two = {name: other_commit.Process(t, backend, largest) for name, t in trees.items()}
        try:
            yield {name: process.contestant() for name, process in two.items()} | others
        finally:
            for process in two.values():
                process.end()


def time_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a timing run: its rows and its settings."""
    backends, contestants = _contestants(case, args)
    problems = _problems(case, args)
    largest = max(p.batch for p in problems)
    if not args.base:
        return _time(args, problems, backends, contestants, largest)
    if len(args.backends or ()) > 1:
        raise SystemExit(f"--base compares one backend, got {backends}")
    others = {name: contestants[name] for name in args.contestants or ()}
    with _beside_base(args.base, backends[0], others, largest) as beside:
        commit = other_commit.commit(args.base)
        return {"base": commit, **_time(args, problems, backends[:1], beside, largest)}


def _time(
    args: argparse.Namespace,
    problems: list[Problem],
    backends: list[str],
    contestants: dict[str, Contestant],
    largest: int,
) -> dict[str, Any]:
    budget = args.budget or (QUICK_BUDGET if args.quick else BUDGET)
    timer = Timer(backends, contestants, largest, budget)
    rows: list[Row] = []
    left_out: list[str] = []
    threads, start = torch.get_num_threads(), time.monotonic()
    try:
        for i, problem in enumerate(problems, 1):
            try:
                rows.append(row := timer.row(problem))
            except ImportError as error:  # recorded logits need transformers
                left_out.append(f"{problem.label()}: {error.name} not installed")
                note(left_out[-1])
                continue
            times = {n: round(t.median_us) for n, t in row["timings"].items()}
            shown = row["refused"] or " ".join(f"{n} {us}" for n, us in times.items())
            if report.disturbed(row):
                shown += f"  DISTURBED: others kept {row['other_cores']:.2f} cores busy"
            spent = f"{time.monotonic() - start:4.0f} s  {i}/{len(problems)}"
            note(f"{spent}  {problem.label()}: {shown}")
    finally:
        set_threads(threads)
    head = {"what": "time", "budget_s": budget, "contestants": list(contestants)}
    return {**head, "rows": rows, "left_out": left_out}


def measure_memory(case: Case, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a memory run."""
    if args.base:
        raise SystemExit("--base compares times, --memory measures none")
    _, contestants = _contestants(case, args)
    rows = []
    for problem in _problems(case, args):
        for contestant, its in contestants.items():
            if its.floor or its.slow_to_compile:
                continue
            grown = memory.growth(name, contestant, problem)
            row = {**problem.shown(), "contestant": contestant, "growth_bytes": grown}
            rows.append({**row, "logits_bytes": problem.bytes})
            note(f"{problem.label()}: {contestant} {grown / 1e6:.2f} MB")
    return {"what": "peak memory of one call", "rows": rows}
