"""The command of both studies: it runs the missing jobs, then writes JSON, tables and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import readme, report
from .loop import Phase, run


class Study(NamedTuple):
    """A study, which `python -m COMMAND` runs."""

    name: str  # of its JSON, its tables and its pictures
    command: str
    sizes: Any  # a NamedTuple
    tiny: Any
    phases: Callable[[Any], list[Phase]]
    summary: Callable[[Path, Any], dict[str, Any]]


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """Runs the missing jobs and writes the study's JSON, tables and pictures."""
    parser = argparse.ArgumentParser(prog=f"python -m {study.command}", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for the results")
    add("--work", type=Path, default=Path("build") / study.name, metavar="DIR", help="the cache")
    add("--workers", type=int, default=2, metavar="N", help="processes")
    add("--tiny", "--quick", action="store_true", help="a few steps and prompts: does it run")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise SystemExit(f"--workers must be at least 1, got {args.workers}")
    sizes = study.tiny if args.tiny else study.sizes
    try:
        seconds = run(args.work, study.phases(sizes), sizes, args.workers)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    result = study.summary(args.work, sizes)
    # The sum over the jobs' processes, without jobs that an interrupted run lost.
    result |= {"seconds_of_jobs": round(seconds), "machine": report.machine()}
    result["command"] = f"python -m {study.command}" + " --tiny" * args.tiny
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{study.name}.json"
    report.save(result, file)
    for made, text in readme.reports([file]):
        made.write_text(text)
    for picture, source in readme.stale_pictures([file]):
        readme.draw(picture, source)
    print(f"wrote {file}, its tables and its pictures; {seconds:.0f} s of jobs")
    return 0
