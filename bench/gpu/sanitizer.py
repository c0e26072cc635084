"""compute-sanitizer on small shapes; as a script (`python -m bench.gpu.sanitizer`) the calls that
are watched."""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import mod_fused

from ..problem import DIVERGENCES
from . import device as devices
from .device import Gpu
from .record import FAILED, PASSED, SKIPPED, TIMED_OUT, Record

TOOLS = ("memcheck", "racecheck")
_FOUND_SOMETHING = 86


def find() -> str | None:
    """Path of compute-sanitizer, if it is anywhere it is usually found."""
    if path := shutil.which("compute-sanitizer"):
        return path
    places = ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    places += glob.glob("/usr/local/cuda-*/bin")
    for package in ("triton", "nvidia"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            places += [str(p.parent) for p in Path(folder).rglob("compute-sanitizer")]
    return next((p for d in places if (p := shutil.which("compute-sanitizer", path=d))), None)


def workload(device: Gpu) -> None:
    """Every divergence once, odd sizes; filters, log_probs and candidates of one."""
    batch, vocab = device.pick((3, 2600), (1, 33))
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(batch, vocab, generator=generator).bfloat16() for _ in range(3)]
    ref, *policies = (x.to(device.device) for x in rows)
    weights = [0.6, 0.3]
    for i, divergence in enumerate(DIVERGENCES):
        options = {"divergence": divergence, "backend": device.backend(i)}
        mod_fused.sample(ref, policies, weights, seed=1, return_model_logprobs=True, **options)
    options = {"divergence": "jsd", "backend": device.backend(1)}
    filters = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8}
    mask = torch.ones(batch, vocab, dtype=torch.bool, device=device.device)
    mod_fused.sample(ref, policies, weights, seed=2, mask=mask, **filters, **options)
    mod_fused.log_probs(ref, policies, weights, **options)
    device.synchronize()


def sanitizer(device: Gpu, record: Record) -> None:
    """memcheck and racecheck, where the tool is found."""
    if device.dry:
        workload(device)
        record.item("the calls to be watched", PASSED, "made, unwatched")
    tool = find()
    if tool is None or device.dry:
        why = "compute-sanitizer is not on this machine" if tool is None else "a dry run"
        for name in TOOLS:
            record.item(name, SKIPPED, why)
        return
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", str(_FOUND_SOMETHING)]
        command += [sys.executable, "-m", "bench.gpu.sanitizer"]
        # Allocations of their own, not slices of the allocator's blocks: overruns show.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True,
                timeout=max(5.0, record.left() / (2 if name == TOOLS[0] else 1)),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            record.item(name, TIMED_OUT, "ended before it was through")
            continue
        output = done.stdout + done.stderr
        (record.out / "logs" / f"{name}.log").write_text(output)
        summary = next((x for x in output.splitlines()[::-1] if "SUMMARY" in x), output[-500:])
        if done.returncode in (0, _FOUND_SOMETHING):
            record.item(name, PASSED if done.returncode == 0 else FAILED, summary)
        elif "SUMMARY: 0 " in summary or "0 errors" in summary:  # the calls failed, not the check
            record.item(name, FAILED, f"exit status {done.returncode}: {output[-1500:]}")
        else:  # no permission to watch, a driver that does not fit
            record.item(name, SKIPPED, f"the tool does not work here: {output[-500:]}")


if __name__ == "__main__":
    workload(devices.make(False))
