"""The device under test: properties, timing, memory; and its replacement in a dry run."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import mod_fused

from .. import report
from ..measure import Call, Timing, seconds_of, timing

T = TypeVar("T")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def link_kernels() -> None:
    """Make `mod_fused.triton_kernels` importable where the package is not installed: its folder
    lies beside `mod_fused/`, and pyproject.toml maps it."""
    try:
        importlib.import_module("mod_fused.triton_kernels")
    except ModuleNotFoundError as error:
        if error.name != "mod_fused.triton_kernels":
            raise
        link = Path(mod_fused.__file__).parent / "triton_kernels"
        with contextlib.suppress(FileExistsError):  # another process may have made it
            link.symlink_to(Path("..", "triton_kernels"))
        importlib.invalidate_caches()


def workers() -> int:
    """How many processes compile at once."""
    return max(1, min(14, (os.cpu_count() or 2) - 2))


def smi(field: str) -> str:
    """A field of nvidia-smi; empty where it is not available."""
    query = ("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", "0")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Gpu:
    """The current CUDA device."""

    dry = False
    device = torch.device("cuda")

    def pick(self, real: T, dry: T) -> T:
        """A size for the GPU, or a tiny one for the dry run."""
        return real

    def synchronize(self) -> None:
        """Wait for all streams; errors of earlier kernels show here."""
        torch.cuda.synchronize()

    def card(self) -> dict[str, str]:
        """The properties of the GPU that times depend on."""
        properties = torch.cuda.get_device_properties(self.device)
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

    def header(self) -> dict[str, str]:
        """GPU, host, versions and backends. MOD_FUSED_COMMIT names the commit where the tree is a
        copy without its history."""
        header = self.card() | report.machine() | {"triton": metadata.version("triton")}
        header["commit"] = os.environ.get("MOD_FUSED_COMMIT", header["commit"])
        return header | {f"backend {name}": x for name, x in mod_fused.backends().items()}

    def graph(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """A call as a CUDA graph: its outputs, and the function that replays the graph."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return outputs, graph.replay

    def own_memory(self, batch: int, vocab: int, policies: int) -> dict[str, Any]:
        """The arguments `out` and `workspace` of `mod_fused.sample`."""
        out = mod_fused.Sample(
            torch.zeros(batch, dtype=torch.int64, device=self.device),
            torch.zeros(batch, device=self.device),
            torch.zeros(batch, dtype=torch.bool, device=self.device),
            None,
        )
        size = mod_fused.workspace_size(batch, vocab, policies)
        workspace = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return {"out": out, "workspace": workspace}

    def microseconds(self, call: Call, *, cold: bool, budget: float = 0.15) -> Timing:
        """Device time of a call by events. Warm: blocks of calls one after another. Cold: each call
        by itself, after the L2 cache was overwritten. The GPU is kept busy until the host has
        enqueued everything, so that the host's time does not count."""
        self.synchronize()
        host = min(seconds_of(call) for _ in range(3))
        self.synchronize()
        one = seconds_of(lambda: (call(), self.synchronize()))
        count = max(3, min(20 if cold else 50, int(budget / 5 / max(one, 1e-6))))
        spoiler = torch.empty(256 << 20, dtype=torch.int8, device="cuda") if cold else None
        seconds: list[float] = []
        for _ in range(5):
            marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
            torch.cuda._sleep(int(min(0.1, 2 * count * (host + 3e-5)) * 1.5e9))
            for _ in range(count if cold else 1):
                if spoiler is not None:
                    spoiler.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(1 if cold else count):
                    call()
                end.record()
                marks.append((begin, end))
            self.synchronize()
            each = 1 if cold else count
            seconds += [begin.elapsed_time(end) * 1e-3 / each for begin, end in marks]
        return timing(seconds)

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy far larger than any cache."""
        size = self.pick(1 << 30, 1 << 20)
        source = torch.zeros(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        took = self.microseconds(lambda: target.copy_(source), cold=False, budget=0.3)
        return 2 * size / took.median_us * 1e6


class DryRun(Gpu):
    """The replacement in a dry run: CPU tensors, and the kernels in Triton's interpreter."""

    dry = True
    device = torch.device("cpu")

    def pick(self, real: T, dry: T) -> T:
        return dry

    def synchronize(self) -> None:
        pass

    def card(self) -> dict[str, str]:
        return {"GPU": "none (dry run: CPU tensors, Triton's interpreter)"}

    def graph(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        outputs = call()

        def replay() -> None:
            for old, new in zip(outputs, call(), strict=True):  # type: ignore[call-overload]
                if isinstance(old, Tensor):
                    old.copy_(new)

        return outputs, replay

    def microseconds(self, call: Call, *, cold: bool, budget: float = 0.15) -> Timing:
        return timing([seconds_of(call)])


def make() -> Gpu:
    """The device to check; its replacement if TRITON_INTERPRET=1.

    Raises:
        RuntimeError: if torch sees no GPU.
    """
    if INTERPRETED:
        return DryRun()
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; --dry-run, or TRITON_INTERPRET=1, needs none")
    return Gpu()
