"""Nsight Compute on a few calls: what keeps the kernels from their floors. As a script
(`python -m bench.gpu.profile`) the calls that are watched."""

from __future__ import annotations

import csv
import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable

from . import benchmark
from . import device as devices
from .benchmark import Row
from .device import Gpu
from .record import FAILED, PASSED, SKIPPED, TIMED_OUT, Record

ROWS = tuple(Row(name, batch) for name in ("jsd", "reverse_kl") for batch in (1, 64))
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
#: Of what the sections have, shown in the report; the log has everything.
METRICS = (
    "Duration",
    "SM Frequency",
    "Registers Per Thread",
    "Achieved Occupancy",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "L1/TEX Hit Rate",
    "L2 Hit Rate",
    "Warp Cycles Per Issued Instruction",
)


def find() -> str | None:
    """Path of ncu, if it is anywhere it is usually found."""
    places = [os.environ.get("PATH", ""), *glob.glob("/usr/local/cuda*/bin")]
    places += sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)
    return shutil.which("ncu", path=os.pathsep.join(places))


def workload(device: Gpu) -> None:
    """Each row once, so that each is one launch of the kernel."""
    for row in ROWS:
        benchmark.ours(row, benchmark.inputs(device, row), "triton")()
        device.synchronize()


def metrics(lines: Iterable[str]) -> list[dict[str, str]]:
    """A dictionary of `METRICS` for each kernel, out of ncu's CSV of details."""
    table = [line for line in lines if line.startswith('"')]
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(table):
        found = kernels.setdefault(row["ID"], {})
        if row["Metric Name"] in METRICS:
            found[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def profile(device: Gpu, record: Record) -> None:
    """Profiles the workload, where ncu is found and allowed."""
    tool = None if device.dry else find()
    if tool is None:
        record.item("ncu", SKIPPED, "a dry run" if device.dry else "ncu is not on this machine")
        return
    workload(device)  # compiles
    sections = [word for name in SECTIONS for word in ("--section", name)]
    # The clocks are as they are: the machine may be shared.
    command = [
        tool,
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "details",
        "--kernel-name",
        "mixture_kernel",
        *sections,
    ]
    command += [sys.executable, "-m", "bench.gpu.profile"]
    limit = max(5.0, record.left())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        record.item("ncu", TIMED_OUT, "ended before it was through")
        return
    (record.out / "logs" / "ncu.csv").write_text(done.stdout)
    found = metrics(done.stdout.splitlines())
    if done.returncode != 0 or not found:  # most often no permission to read the counters
        record.item(
            "ncu", SKIPPED, f"the tool does not work here: {(done.stdout + done.stderr)[-500:]}"
        )
        return
    record.put(metrics=found)
    record.expect("a profile for each call", len(found) == len(ROWS), f"{len(found)} profiles")
    for row, values in zip(ROWS, found, strict=False):
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        record.item(row.label(), PASSED if values else FAILED, shown)


if __name__ == "__main__":
    workload(devices.make(False))
