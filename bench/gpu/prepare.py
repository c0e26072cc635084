"""Stages that come before the checks: the machine, the package's own build, compiled kernels."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import report
from ..problem import DIVERGENCES
from . import device as devices
from .device import Gpu
from .record import FAILED, PASSED, SKIPPED, Record

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("numpy", "scipy", "pytest", "hypothesis", "transformers", "matplotlib")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def smi(field: str) -> str:
    """A field of nvidia-smi, empty where it is not to be had."""
    query = ("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", "0")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_header(device: Gpu) -> dict[str, str]:
    """What a GPU figure depends on besides the code."""
    if device.dry:
        return {"GPU": "none (dry run: CPU tensors, Triton's interpreter)"}
    properties = torch.cuda.get_device_properties(device.device)
    l2 = getattr(properties, "L2_cache_size", 0)
    return {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "L2 cache": f"{l2 / 2**20:.0f} MiB" if l2 else "unknown",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "highest SM clock": f"{smi('clocks.max.sm') or 'unknown'} MHz",
        "driver": smi("driver_version") or "unknown",
        "CUDA of torch": str(torch.version.cuda),
    }


def machine(device: Gpu, record: Record) -> None:
    """Hardware and versions."""
    header = gpu_header(device) | report.machine()
    header["commit"] = os.environ.get("MOD_FUSED_COMMIT", header["commit"])
    header["triton"] = _version("triton")
    from mod_fused import backends

    header |= {f"backend {name}": status for name, status in backends().items()}
    record.put(header=header, packages={name: _version(name) for name in _PACKAGES})
    record.item("mod_fused.triton_kernels", PASSED, link_kernels())
    available = backends()["triton"] == "available"
    record.expect("the Triton backend is available", available, backends()["triton"])


def link_kernels() -> str:
    """Make `mod_fused.triton_kernels` importable where the package is not installed: pyproject
    maps it to a folder that lies elsewhere."""
    try:
        importlib.import_module("mod_fused.triton_kernels")
        return "there"
    except ModuleNotFoundError as error:
        if error.name != "mod_fused.triton_kernels":
            raise
    link = ROOT / "mod_fused" / "triton_kernels"
    with contextlib.suppress(FileExistsError):  # the stages do it side by side
        link.symlink_to(Path("..", "triton_kernels"))
    importlib.invalidate_caches()
    importlib.import_module("mod_fused.triton_kernels")
    return "linked"


def build(device: Gpu, record: Record) -> None:
    """The C++ extension in place, if it is missing and can be built."""
    if not glob.glob(str(ROOT / "mod_fused" / "_cpu*.so")):
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        record.put(build_seconds=time.monotonic() - start, build_output=done.stdout[-2000:])
        if done.returncode != 0:
            record.item("C++ backend", SKIPPED, "build failed: " + done.stderr[-1000:])
            return
    from mod_fused import backends

    status = backends()["cpu"]
    record.item("C++ backend", PASSED if status == "available" else SKIPPED, status)


def workers() -> int:
    """Processes to compile in."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def compile_one(job: tuple[str, tuple[Any, ...]]) -> float:
    """Compile what a later stage needs, into the caches on disk; seconds. A job is the name of a
    function of a stage's module, and its arguments after the device."""
    start = time.monotonic()
    (module, function), arguments = job[0].split("."), job[1]
    found = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
    found(devices.make(False), *arguments)
    return time.monotonic() - start


def compile_ahead(device: Gpu, record: Record) -> None:
    """Fill the caches on disk, several processes at once: later stages then only load."""
    from . import benchmark, execution

    if device.dry:
        record.item("compiling ahead", SKIPPED, "there is nothing to compile in a dry run")
        return
    rows = benchmark.rows(device)
    jobs: list[tuple[str, tuple[Any, ...]]] = [("sanitizer.workload", ())]
    jobs += [("execution.warm", (name,)) for name in execution.CALLS]
    jobs += [("correctness.warm", (divergence,)) for divergence in DIVERGENCES]
    jobs += [("benchmark.compile_row", (r, "compile")) for r in benchmark.compiled_rows(rows)]
    jobs += [("benchmark.compile_row", (r, "ours")) for r in rows]
    seconds, processes = {}, workers()
    for (name, arguments), took, error in device.map(compile_one, jobs, processes, record.left()):
        label = f"{name}{arguments}"
        if error:  # it will be compiled, or fail, when it is used
            record.item(label, SKIPPED, error)
        else:
            seconds[label] = took
    record.put(workers=processes, seconds=seconds)
    record.item("compiled ahead", PASSED if seconds else FAILED, f"{len(seconds)} of {len(jobs)}")
