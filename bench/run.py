"""`python -m bench.run CASE`: the one benchmark runner.

Before anything is timed, each problem's inputs go through a check of correctness. If a backend
fails it, the problem is not timed, its row says why, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import grid, report
from .case import Case, Procedure
from .cases import CASES

SCHEMA = 1


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per case, with its options."""
    out = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    subcommands = out.add_subparsers(dest="case", required=True, metavar="CASE")
    for name, case in CASES.items():
        command = subcommands.add_parser(name, help=case.help, description=case.help)
        if isinstance(case, Case):
            grid.add_options(command, case)
        else:
            case.options(command)
        command.add_argument("--quick", action="store_true", help="small shapes, seconds in all")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
        command.add_argument(
            "--out", type=Path, metavar="DIR", help="write CASE.json and CASE.md here"
        )
    return out


def _command(argv: Sequence[str]) -> str:
    """The command as typed, without the paths that it writes to: results are published."""
    paths = argparse.ArgumentParser(add_help=False)
    paths.add_argument("--json")
    paths.add_argument("--out")
    _, kept = paths.parse_known_args(argv)
    return "python -m bench.run " + shlex.join(kept)


def _run(case: Case | Procedure, args: argparse.Namespace) -> dict[str, Any]:
    if isinstance(case, Procedure):
        return case.run(args)
    if args.memory:
        return grid.measure_memory(case, args.case, args)
    return grid.time_case(case, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a case. Returns 0, or 1 if a row was refused."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    case = CASES[args.case]
    machine = report.machine()  # before measuring: the commit may change meanwhile
    head = {"schema": SCHEMA, "case": args.case, "command": _command(argv), "machine": machine}
    result = {**head, **_run(case, args)}
    text = case.report(result)
    print(text)
    if args.json:
        report.save(result, args.json)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.case + "_memory" * getattr(args, "memory", False)
        report.save(result, args.out / f"{stem}.json")
        (args.out / f"{stem}.md").write_text(text)
    refused = [r for r in result["rows"] if r.get("refused")]
    if refused:
        report.note(f"{len(refused)} of {len(result['rows'])} rows refused: the check failed")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
