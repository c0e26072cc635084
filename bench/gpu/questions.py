"""What only a GPU answers about the kernels' design: other schedules beside the shipped one, the
log-linear path against B and V, and what a launch costs. Runs when it is named."""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import triton
from mod_fused.triton_kernels.configurations import MANY_ROWS
from mod_fused.triton_kernels.launching import Launch
from mod_fused.triton_kernels.tiles import STATE_FIELDS, STEPS
from torch import Tensor

from ..measure import seconds_of
from . import benchmark, prepare, reading, schedules
from .benchmark import Row
from .device import Gpu
from .record import FAILED, PASSED, SKIPPED, TIMED_OUT, Record

_WARM_CALLS = 200  # of which the host's time is taken


def schedule_rows(device: Gpu) -> list[Row]:
    """Calls whose schedule is varied, latency first."""
    if device.dry:
        return [Row("jsd", 2, 1000), Row("reverse_kl", 1, 1000)]
    names = ("jsd", "forward_kl", "jeffrey", "reverse_kl")
    rows = [Row(name, batch) for batch in (1, 64, 256, 8) for name in names]
    return [*rows, Row("jsd", 3)]  # the most that is resident


def scaling_rows(device: Gpu) -> list[Row]:
    """The log-linear path against B, and against V."""
    if device.dry:
        return [Row("reverse_kl", 1, 1024)]
    batches = [Row("reverse_kl", 1 << k) for k in range(10)]
    vocabularies = [1 << k for k in range(10, 19)] + [50257]
    return batches + [Row("reverse_kl", b, v) for b in (1, 64) for v in vocabularies]


def _made(device: Gpu, name: str, call: Callable[[], Any]) -> list[Launch] | None:
    """Make the call with a schedule; its launches, or None where it has no such form."""
    with schedules.using(name) as launches:
        try:
            call()
        except schedules.Inapplicable:
            return None
        device.synchronize()
        return list(launches)


def compile_schedule(device: Gpu, row: Row, name: str) -> None:
    """What timing this row with this schedule compiles."""
    tensors = benchmark.inputs(device, row)
    _made(device, name, benchmark.ours(row, tensors, "triton"))


def _steps(launches: list[Launch], rows: int) -> dict[str, int]:
    """How many rows took how many evaluations of G after that of the deficits."""
    states = launches[0].arguments[2].states.view(rows, STATE_FIELDS.value)
    counts = Counter(states[:, STEPS.value].tolist())
    return {f"{steps:.0f}": counts[steps] for steps in sorted(counts)}


def _time_schedule(
    device: Gpu, row: Row, tensors: list[Tensor], name: str, expected: Tensor
) -> dict[str, Any] | None:
    """Check one schedule, then time it; None where the call has no such form."""
    launches = _made(device, name, benchmark.ours(row, tensors, "triton"))
    if launches is None:
        return None
    with schedules.using(name):
        tv, refused = benchmark.refusal(device, row, tensors, "triton")
        differ = int((benchmark.ours(row, tensors, "triton")().tokens != expected).sum())
        if not refused and differ:
            refused = f"{differ} tokens are not those of the shipped schedule"
        out: dict[str, Any] = {"refused": refused, "tv": tv, "launches": len(launches)}
        if refused:
            return out
        time = functools.partial(device.microseconds, cold=row.batch >= benchmark.COLD_FROM)
        call = benchmark.in_own_memory(device, row, tensors, "triton")
        out["kernel"] = time(call)._asdict()
        out["graph"] = time(device.graph(call)[1])._asdict()
    if launches[0].variant.evaluations:
        out["steps"] = _steps(launches, row.batch)
    return out


def vary_schedules(device: Gpu, record: Record) -> None:
    """Every schedule for every row, each checked before it is timed. The resident one comes after
    all others: should its programs wait for each other for ever, they end the stage."""
    rows = schedule_rows(device)
    found: list[dict[str, Any]] = [{"label": row.label(), "schedules": {}} for row in rows]
    safe = [name for name in schedules.SCHEDULES if name != "resident"]
    for names, (row, line) in product((safe, ["resident"]), list(zip(rows, found, strict=True))):
        tensors = benchmark.inputs(device, row)
        expected = benchmark.ours(row, tensors, "triton")().tokens
        for name in names:
            label = f"{row.label()}, {name}"
            if record.left() < 3.0:
                record.item(f"{label} and what comes after it", TIMED_OUT, "not timed")
                return
            try:
                timed = _time_schedule(device, row, tensors, name, expected)
            except Exception:
                record.item(label, FAILED, traceback.format_exc())
                continue
            if timed is None:
                continue
            line["schedules"][name] = timed
            record.put(schedules=found)
            refused = timed["refused"]
            shown = refused or f"{timed['kernel']['median_us']:.1f} µs"
            record.item(label, FAILED if refused else PASSED, shown)


def scale(device: Gpu, record: Record) -> None:
    """The log-linear path beside a kernel that reads the same bytes."""
    found: list[dict[str, Any]] = []
    for row in scaling_rows(device):
        if record.left() < 3.0:
            record.item(f"{row.label()} and the rows after it", TIMED_OUT, "not timed")
            return
        tensors = benchmark.inputs(device, row)
        tv, refused = benchmark.refusal(device, row, tensors, device.backend())
        record.item(row.label(), FAILED if refused else PASSED, refused)
        if refused:
            continue
        call = benchmark.in_own_memory(device, row, tensors, "triton")
        time = functools.partial(device.microseconds, cold=row.batch >= benchmark.COLD_FROM)
        timed = {
            "kernel": time(call)._asdict(),
            "graph": time(device.graph(call)[1])._asdict(),
            "read": time(reading.read(tensors))._asdict(),
        }
        line = {**row._asdict(), "label": row.label(), "bytes": row.problem().bytes, "tv": tv}
        found.append(line | {"times": timed})
        record.put(scaling=found)


@triton.jit
def _empty_kernel(x):
    pass


def launch_costs(device: Gpu, record: Record) -> None:
    """Microseconds of an empty kernel, launched and replayed; the host's, of calls of ours."""
    x = torch.zeros(1, device=device.device)

    def empty() -> Tensor:
        _empty_kernel[(1,)](x)
        return x

    out = {
        "empty kernel": device.microseconds(empty, cold=False)._asdict(),
        "empty kernel, graph": device.microseconds(device.graph(empty)[1], cold=False)._asdict(),
    }
    for divergence in ("reverse_kl", "jsd"):
        row = Row(divergence, 1, device.pick(4096, 64))
        call = benchmark.in_own_memory(device, row, benchmark.inputs(device, row), "triton")
        call()
        device.synchronize()
        count = device.pick(_WARM_CALLS, 1)
        seconds = seconds_of(lambda call=call, count=count: [call() for _ in range(count)])
        out[f"host, a call of {divergence}"] = {"median_us": 1e6 * seconds / count}
    record.put(launch=out)
    record.item(
        "launch costs", PASSED, ", ".join(f"{k} {v['median_us']:.1f} µs" for k, v in out.items())
    )


def questions(device: Gpu, record: Record) -> None:
    """All of it; kernels are compiled first, several processes at once."""
    record.put(header=prepare.gpu_header(device))
    if not device.dry:
        # Batches of a regime share their kernels, and so do schedules that change arguments alone.
        regimes = ((1, MANY_ROWS)[r.batch >= MANY_ROWS] for r in schedule_rows(device))
        rows = dict.fromkeys(
            r._replace(batch=b) for r, b in zip(schedule_rows(device), regimes, strict=True)
        )
        names = [n for n in schedules.SCHEDULES if not n.startswith(("rows in flight", "programs"))]
        jobs = [("questions.compile_schedule", (r, n)) for n in names for r in rows]
        limit, seconds = 0.5 * record.left(), {}
        for job, took, error in device.map(prepare.compile_one, jobs, prepare.workers(), limit):
            if error:
                record.item(f"compile {job[1]}", SKIPPED, error)
            else:
                seconds[f"{job[1][0].label()}, {job[1][1]}"] = took
        record.put(compile_seconds=seconds)
    launch_costs(device, record)
    scale(device, record)
    vary_schedules(device, record)
