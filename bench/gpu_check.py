"""`python -m bench.gpu_check --out DIR`: everything there is to show on a machine with one GPU.

Each stage is a process of its own with a time limit, so that neither an exception nor an illegal
access, a dead lock or a crash in one keeps the next from running; `DIR/gpu.json` and `DIR/gpu.md`
are rewritten after every stage. The exit status is 0 when no stage failed.

`--dry-run` runs the same code on CPU tensors, the kernels in Triton's interpreter, on tiny shapes.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .gpu.record import FAILED, PASSED, SKIPPED, TIMED_OUT, Record, read_all, status_of, write

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    """`function` of module `bench.gpu.MODULE`, called with the device and the record."""

    name: str
    module: str
    function: str
    seconds: float  # its time limit
    background: bool = False  # starts first and runs beside the others
    after: tuple[str, ...] = ()  # background stages it waits for
    named: bool = False  # runs only where --stages names it


#: In the order they run; what is worth most comes first, in case the time runs out.
STAGES = (
    Stage("build", "prepare", "build", 240.0, background=True),
    Stage("machine", "prepare", "machine", 40.0),
    Stage("compile", "prepare", "compile_ahead", 150.0, background=True),
    Stage("matrix", "correctness", "matrix", 110.0),
    Stage("graphs", "execution", "graphs", 50.0),
    Stage("streams", "execution", "streams", 60.0),
    Stage("statistics", "correctness", "statistics", 60.0),
    Stage("poison", "execution", "poison", 40.0),
    Stage("large", "execution", "large", 60.0),
    Stage("tokens", "correctness", "tokens", 90.0, after=("build",)),
    Stage("benchmark", "benchmark", "benchmark", 180.0, after=("compile",)),
    Stage("sanitizer", "sanitizer", "sanitizer", 90.0),
    Stage("tests", "suite", "tests", 120.0, after=("build",)),  # as many as time allows
    Stage("questions", "questions", "questions", 420.0, named=True),
    Stage("profile", "profile", "profile", 150.0, named=True),
)
TOTAL_SECONDS = 470.0
_SLOWER = 8  # the interpreter, on a busy machine: more time in a dry run


def _run(stage: Stage, out: Path, dry: bool, seconds: float) -> None:
    """In the stage's own process: its output goes to a log, its result to a file."""
    os.setsid()  # so that what it starts can be ended with it
    log = os.open(out / "logs" / f"{stage.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    record = Record(out, stage.name, deadline=time.monotonic() + 0.9 * seconds)
    try:
        from .gpu import device, prepare

        prepare.link_kernels()
        function = getattr(importlib.import_module(f"bench.gpu.{stage.module}"), stage.function)
        function(device.make(dry), record)
    except BaseException:
        record.item("the stage itself", FAILED, traceback.format_exc())
    record.finish()
    sys.stdout.flush()
    os._exit(0)  # a broken CUDA context must not hang the way out


class _Running:
    """A started stage."""

    def __init__(self, stage: Stage, out: Path, dry: bool, seconds: float) -> None:
        self.stage, self.out, self.seconds = stage, out, seconds
        self.start = time.monotonic()
        # Forked: torch is imported once. Nothing in this process may touch CUDA before.
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_run, args=(stage, out, dry, seconds))
        self.process.start()

    def wait(self) -> None:
        """Until it ends or its time is up; notes what became of it."""
        self.process.join(max(0.0, self.start + self.seconds - time.monotonic()))
        late = self.process.is_alive()
        try:  # whatever it has left behind, too
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.join()
        record = Record.resume(self.out, self.stage.name)
        if late:
            why = f"not over after {self.seconds:.0f} s and ended; the log has what it said"
            record.item("the stage itself", TIMED_OUT, why)
        elif not record.finished:
            code = self.process.exitcode
            record.item("the stage itself", FAILED, f"the process died with exit status {code}")
        record.finish(seconds=time.monotonic() - self.start)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [stage.name for stage in STAGES]
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go here")
    out.add_argument("--dry-run", action="store_true", help="without a GPU, in the interpreter")
    out.add_argument("--stages", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    out.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all stages together")
    out.add_argument("--commit", help="to be noted where the tree is a copy without its history")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if none failed."""
    args = parser().parse_args(argv)
    os.chdir(ROOT)
    if args.commit:
        os.environ["MOD_FUSED_COMMIT"] = args.commit
    if args.dry_run:  # before triton and mod_fused are imported
        os.environ.update(TRITON_INTERPRET="1", MOD_FUSED_BENCH_COMPILER="eager")
    out = args.out.resolve()
    for folder in ("stages", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    chosen = [s for s in STAGES if (s.name in args.stages if args.stages else not s.named)]
    for stage in STAGES:  # of an earlier run
        (out / "stages" / f"{stage.name}.json").unlink(missing_ok=True)
    import torch  # noqa: F401 the stages are forked from here

    end = time.monotonic() + args.seconds * (_SLOWER if args.dry_run else 1)
    running: dict[str, _Running] = {}
    if args.dry_run:  # one at a time: what runs beside others is hard to time and to read
        chosen = [s._replace(background=False, seconds=_SLOWER * s.seconds) for s in chosen]

    def left(stage: Stage) -> float:
        return max(1.0, min(stage.seconds, end - time.monotonic()))

    def finish(name: str) -> None:
        if name in running:
            running.pop(name).wait()
            _report(name, out, chosen, args.dry_run)

    for stage in (s for s in chosen if s.background):
        running[stage.name] = _Running(stage, out, args.dry_run, left(stage))
    for stage in (s for s in chosen if not s.background):
        for name in stage.after:
            finish(name)
        if time.monotonic() > end:
            record = Record(out, stage.name)
            record.item("the stage itself", TIMED_OUT, "not begun: the time was up")
            record.finish()
            _report(stage.name, out, chosen, args.dry_run)
            continue
        running[stage.name] = _Running(stage, out, args.dry_run, left(stage))
        finish(stage.name)
    for name in list(running):
        finish(name)
    results = read_all(out, [s.name for s in chosen])
    return int(any(status_of(r) not in (PASSED, SKIPPED) for r in results.values()))


def _report(name: str, out: Path, chosen: Sequence[Stage], dry: bool) -> None:
    results = read_all(out, [s.name for s in chosen])
    write(out, results, dry)
    print(f"{name}: {status_of(results[name])}, {results[name]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
