"""`mod-fused tune`: measures launch configurations of the Triton kernels on the GPU at hand, and
writes the table that MOD_FUSED_TRITON_TABLE takes.

A *regime* is a row of the table: a kind of divergence and a batch that is small or large. For each
regime the neighbours of the package's configuration are compared with it. Their results must be the
same bits; then their times are measured side by side in the same rounds. The fastest replaces the
package's configuration only if a second measurement, of these two alone, confirms it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from ..dispatch.backends import AVAILABLE, triton_status
from ..ops import Sample
from ..triton_kernels.configurations import (
    TABLE,
    TABLE_VARIABLE,
    Configuration,
    device_name,
    read_table,
    regime,
)
from . import options
from .doctor import versions
from .options import UsageError
from .terminal import table, write
from .tune_bench import Bench, Device, Shape

#: By how much the fastest must beat the package's configuration to replace it.
MARGIN = 0.02
ROUNDS, LEAST_ROUNDS = 15, 3
#: Fields that are varied together: those of the mixture first, then those of the filters.
_MIXTURE = ("threads", "chunk", "programs_per_processor")
_FILTERS = ("filter_threads", "filter_block")


class Outcome(NamedTuple):
    """The result for a regime. Times are medians in microseconds, one for each shape."""

    default: Configuration
    fastest: Configuration  # the default, if time ran out before others were measured
    default_us: list[float]
    fastest_us: list[float]
    kept: bool  # the fastest replaces the default
    refused: list[dict[str, Any]]  # configurations and the reasons
    tried: int  # how many others than the default were measured
    out_of_time: bool

    def ratio(self) -> float:
        """Time of the fastest over that of the default, geometric mean over the shapes."""
        return _ratio(self.fastest_us, self.default_us)


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    logs = [math.log(x / y) for x, y in zip(times, others, strict=True)]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def neighbours(configured: Configuration, names: Sequence[str]) -> list[Configuration]:
    """All combinations of half, the same and double of the named fields; combinations that change
    the fewest fields come first."""
    near: dict[Configuration, int] = {}
    for factors in itertools.product((1.0, 2.0, 0.5), repeat=len(names)):
        changes = {n: int(getattr(configured, n) * f) for n, f in zip(names, factors, strict=True)}
        try:
            found = replace(configured, **changes)
        except ValueError:  # below the smallest value
            continue
        # A warp (64 threads on AMD) at least, 1024 threads at most.
        if all(64 <= t <= 1024 for t in (found.threads, found.filter_threads)):
            near[found] = sum(f != 1.0 for f in factors)
    near.pop(configured, None)
    return sorted(near, key=near.__getitem__)


def refusal(found: Sequence[Sample], expected: Sequence[Sample]) -> str:
    """How results differ from the default's; "" if every bit is equal."""
    for got, want in zip(found, expected, strict=True):
        if not torch.equal(got.tokens, want.tokens):
            return f"{int((got.tokens != want.tokens).sum())} tokens are not the default's"
        bits, wanted = (x.logprobs.view(torch.int32) for x in (got, want))
        if not torch.equal(bits, wanted) or not torch.equal(got.valid, want.valid):
            off = float((got.logprobs - want.logprobs).abs().max())
            return f"log-probabilities are not the default's: up to {off:.1e} off"
    return ""


def _medians(
    bench: Bench, candidates: Sequence[Configuration], end: float, clock: Callable[[], float]
) -> dict[Configuration, list[float]]:
    """Median microseconds of each shape. Each round times all candidates; empty if time ran out."""
    rounds: dict[Configuration, list[list[float]]] = {c: [] for c in candidates}
    for done in range(ROUNDS):
        if clock() >= end:
            if done < LEAST_ROUNDS:
                return {}
            break
        for candidate in candidates if done % 2 else reversed(candidates):
            rounds[candidate].append(bench.seconds(candidate))
    return {c: [1e6 * median(x) for x in zip(*r, strict=True)] for c, r in rounds.items()}


def choose(
    bench: Bench,
    default: Configuration,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Look for a configuration faster than `default` within `seconds`, compilation included. A call
    that runs when the time is up is finished first.

    A candidate that gives other results than the default, or fails, is refused. When the time is
    up, the measurements so far count, and no configuration is kept that was not measured twice.
    """
    end = clock() + seconds
    log_linear = all(s.divergence == "reverse_kl" for s in bench.shapes)
    # The log-linear kernel starts one program per task, so their number cannot be varied.
    stages = [_MIXTURE[:2] if log_linear else _MIXTURE]
    if any(shape.filters for shape in bench.shapes):
        stages.append(_FILTERS)
    best, refused, tried, late = default, [], 0, False
    bench.compile_ahead([default], 0.3 * seconds)
    expected = bench.results(default)
    for index, names in enumerate(stages):
        share = (end - clock()) / (len(stages) - index + 0.25)  # the rest is for the confirmation
        compiled, stop = clock() + 0.7 * share, clock() + share
        near = neighbours(best, names)
        bench.compile_ahead(near, 0.6 * share)
        equal = list(dict.fromkeys([default, best]))
        for candidate in near:
            if clock() >= compiled:
                late = True
                break
            try:
                reason = refusal(bench.results(candidate), expected)
            except Exception as error:  # for example, too few registers for so many threads
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if reason:
                refused.append({"configuration": asdict(candidate), "reason": reason})
            elif candidate not in equal:
                equal.append(candidate)
        found = _medians(bench, equal, stop, clock)
        late |= not found
        if found:
            best = min(equal, key=lambda c: _ratio(found[c], found[default]))
            tried += len(equal) - 1
    times = _medians(bench, list(dict.fromkeys([default, best])), end, clock)
    if not times:
        return Outcome(default, default, [], [], False, refused, tried, True)
    kept = _ratio(times[best], times[default]) <= 1.0 - MARGIN
    return Outcome(default, best, times[default], times[best], kept, refused, tried, late)


def machine() -> dict[str, str]:
    """The device and the versions, which the times depend on."""
    found = {"device": device_name(), "capability": "none", "driver": "none"}
    if torch.cuda.is_available():
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
            found["driver"] = done.stdout.strip() or "unknown"
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = "unknown"
    return found | {n: v for n, v in versions().items() if n in ("torch", "triton", "mod_fused")}


def run(shapes: Sequence[Shape], minutes: float, out: Path) -> None:
    """Tune the regimes of these shapes, write `out`, and print the result.

    Raises:
        RuntimeError: if the kernels cannot run here.
        ValueError: if arguments do not fit each other, as `mod_fused.sample` says.
    """
    if (status := triton_status()) != AVAILABLE:
        raise RuntimeError(f"nothing to tune: {status}")
    groups: dict[str, list[Shape]] = {}
    for shape in shapes:
        groups.setdefault(regime(shape.divergence, shape.batch), []).append(shape)
    end = time.monotonic() + 60.0 * minutes
    outcomes: dict[str, Outcome] = {}
    for index, (name, group) in enumerate(groups.items()):
        write(f"{name}: " + ", ".join(f"{s.divergence} B={s.batch}" for s in group))
        seconds = (end - time.monotonic()) / (len(groups) - index)
        outcome = outcomes[name] = choose(Device(group), TABLE[name], seconds)
        for refused in outcome.refused:
            changed = _changes(Configuration(**refused["configuration"]), TABLE[name])
            write(f"REFUSED {changed}: {refused['reason']}", style="bold red")
        if outcome.out_of_time:
            write(f"out of time: {outcome.tried} other configurations measured", style="bold")
    record = {
        "configurations": {n: asdict(o.fastest) for n, o in outcomes.items() if o.kept},
        **machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "margin": MARGIN,
        "measured": {
            name: {"shapes": [s._asdict() for s in groups[name]]}
            | {n: asdict(x) if isinstance(x, Configuration) else x for n, x in o._asdict().items()}
            for name, o in outcomes.items()
        },
    }
    out.write_text(json.dumps(record, indent=2) + "\n")
    read_table(out)
    _report(groups, outcomes, out)


def _changes(configured: Configuration, default: Configuration) -> str:
    """The fields that differ from the default."""
    before, after = asdict(default), asdict(configured)
    changed = [f"{name}={x}" for name, x in after.items() if x != before[name]]
    return " ".join(changed) or "as before"


def _report(groups: dict[str, list[Shape]], outcomes: dict[str, Outcome], out: Path) -> None:
    rows = []
    for name, outcome in outcomes.items():
        changed = _changes(outcome.fastest, outcome.default)
        verdict = "kept" if outcome.kept else f"not kept: {1 - outcome.ratio():.1%} faster"
        if outcome.fastest == outcome.default:
            verdict = "-"
        times = itertools.zip_longest(groups[name], outcome.default_us, outcome.fastest_us)
        for shape, before, after in times:
            us = ["-" if x is None else f"{x:.1f}" for x in (before, after)]
            rows.append([name, f"{shape.divergence} B={shape.batch}", *us, changed, verdict])
    table(["regime", "shape", "default µs", "fastest µs", "configuration", "verdict"], rows)
    write(f"table: {out}")
    if any(outcome.kept for outcome in outcomes.values()):
        write(f"to use it: export {TABLE_VARIABLE}={out.resolve()}")
    else:
        write(f"nothing beat the package's own table by {MARGIN:.0%}: there is no need to use it")


def add_options(commands: Any) -> None:
    """Add the command `tune` and its options."""
    tune = commands.add_parser("tune", help="measure launch configurations of the Triton kernels")
    tune.add_argument("--vocab-size", type=options.whole(1), required=True, metavar="V")
    tune.add_argument(
        "--policies", type=options.whole(1), default=2, metavar="M", help="(default: 2)"
    )
    tune.add_argument(
        "--dtype", choices=options.DTYPES[1:], default="bfloat16", help="of the logits"
    )
    tune.add_argument(
        "--divergences",
        type=options.each(options.divergence),
        default=["reverse_kl", "jsd"],
        metavar="A,B",
        help="(default: reverse_kl,jsd)",
    )
    tune.add_argument(
        "--batch-sizes",
        type=options.each(options.whole(1)),
        default=[1, 64],
        metavar="A,B",
        help="few rows and many have configurations of their own (default: 1,64)",
    )
    tune.add_argument("--top-k", type=int, metavar="K", help="tune the filters too")
    tune.add_argument("--top-p", type=float, metavar="P", help="tune the filters too")
    tune.add_argument("--min-p", type=float, metavar="P", help="tune the filters too")
    tune.add_argument(
        "--minutes",
        type=options.minutes,
        default=10.0,
        metavar="N",
        help="for everything, compilation included (default: 10)",
    )
    tune.add_argument(
        "--out",
        type=Path,
        default=Path("mod_fused_table.json"),
        metavar="FILE",
        help="(default: mod_fused_table.json)",
    )
    tune.set_defaults(run=run_tune)


def run_tune(args: argparse.Namespace) -> int:
    if not args.out.parent.is_dir() or args.out.is_dir():
        raise UsageError(f"cannot write {args.out}: expected a file in a folder that exists")
    filters = {n: getattr(args, n) for n in ("top_k", "top_p", "min_p")}
    filters = {name: x for name, x in filters.items() if x is not None}
    shapes = [
        Shape(divergence, batch, args.vocab_size, args.policies, args.dtype, filters)
        for divergence in args.divergences
        for batch in args.batch_sizes
    ]
    run(shapes, args.minutes, args.out)
    return 0
