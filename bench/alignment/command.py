"""The command of all studies: it runs the missing jobs, then writes JSON, tables and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import readme, report
from .loop import run


def main(
    command: str,
    jobs: Any,
    summary: Callable[[Path, Any], dict[str, Any]],
    argv: Sequence[str] | None = None,
    options: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> int:
    """`python -m COMMAND`: runs the missing jobs and writes the study's JSON, tables and pictures.

    `jobs` is a module with `Sizes`, `TINY` and `phases`; `summary` makes the JSON of a work folder.
    `options` are fields of `Sizes` that the command line sets: the arguments of add_argument.
    """
    name = command.rpartition(".")[2]
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for the results")
    add("--work", type=Path, default=Path("build") / name, metavar="DIR", help="the cache")
    add("--workers", type=int, default=2, metavar="N", help="processes")
    add("--tiny", "--quick", action="store_true", help="a few steps and prompts: does it run")
    for field, how in options.items():
        add(f"--{field}", **how)
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise SystemExit(f"--workers must be at least 1, got {args.workers}")
    sizes = jobs.TINY if args.tiny else jobs.Sizes()
    sizes = sizes._replace(**{field: getattr(args, field) for field in options})
    try:
        seconds = run(args.work, jobs.phases(sizes), sizes, args.workers)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    result = summary(args.work, sizes)
    # The sum over the jobs' processes, without jobs that an interrupted run lost.
    result |= {"seconds_of_jobs": round(seconds), "machine": report.machine()}
    given = [f" --{x} {getattr(args, x)}" for x in options if getattr(args, x)]
    result["command"] = f"python -m {command}" + " --tiny" * args.tiny + "".join(given)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name}.json"
    report.save(result, file)
    for made, text in readme.reports([file]):
        made.write_text(text)
    for picture, source in readme.stale_pictures([file]):
        readme.draw(picture, source)
    print(f"wrote {file}, its tables and its pictures; {seconds:.0f} s of jobs")
    return 0
