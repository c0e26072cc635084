"""`python -m bench.alignment`: trains, decodes, scores, and writes JSON, Markdown and pictures."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ..report import machine
from . import findings, jobs, pictures, plan, report, results

TABULAR_WORLDS = 40


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m bench.alignment",
        description="MOD against merging, retraining and best-of-N on the embedded world.",
    )
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    out.add_argument(
        "--work",
        type=Path,
        default=Path("build/alignment"),
        metavar="DIR",
        help="keeps what is trained and measured, so that an interrupted run goes on",
    )
    out.add_argument("--workers", type=int, default=2, metavar="N", help="processes")
    out.add_argument("--tiny", action="store_true", help="two steps and six prompts: does it run")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing and writes `alignment.json`, `alignment.md` and the pictures."""
    args = parser().parse_args(argv)
    if args.workers < 1:
        raise SystemExit(f"--workers must be at least 1, got {args.workers}")
    sizes = plan.TINY if args.tiny else plan.Sizes()
    try:
        seconds = jobs.run(args.work, sizes, args.workers)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    began = time.perf_counter()
    result = results.summary(args.work, sizes, 2 if args.tiny else TABULAR_WORLDS)
    # What the jobs took in their processes; an interrupted run's lost jobs are not in it.
    result |= {"seconds_of_jobs": round(seconds), "machine": machine()}
    result["command"] = "python -m bench.alignment" + " --tiny" * args.tiny
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, allow_nan=False)
    (args.out / "alignment.json").write_text(text.replace('{"method"', '\n{"method"') + "\n")
    result = json.loads(text)  # what a reader of the file has
    (args.out / "alignment.md").write_text(report.markdown(result, findings.findings(result)))
    drawn = pictures.draw(result, args.out)
    print(f"{seconds:.0f} s of jobs, {time.perf_counter() - began:.0f} s of statistics")
    print(f"wrote alignment.json, alignment.md and {len(drawn)} pictures to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
