"""The calls that `mod-fused tune` measures, on the current GPU or in Triton's interpreter."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from statistics import median
from typing import NamedTuple, Protocol

import torch

from ..dispatch.backends import INTERPRETED
from ..ops import Sample, sample
from ..triton_kernels.configurations import TABLE, Configuration, using

#: Sets of seeds whose tokens and log-probabilities are compared.
DRAWS = 2 if INTERPRETED else 8
_CALLS = 10  # calls of one measurement
#: From this batch size on the L2 cache is overwritten before each call.
_COLD_FROM = 64
_SPOILER_BYTES = 256 << 20
#: Clock cycles, about half a millisecond, that the GPU sleeps per call while the host enqueues the
#: calls, so that the host's time does not count.
_ENQUEUE_CYCLES = 1_000_000


class Shape(NamedTuple):
    """The shape of a call that is measured."""

    divergence: str
    batch: int
    vocab: int
    policies: int
    dtype: str
    filters: dict[str, float]


class Bench(Protocol):
    """Runs the calls of a regime's shapes."""

    shapes: Sequence[Shape]

    def compile_ahead(self, candidates: Sequence[Configuration], seconds: float) -> None: ...
    def results(self, configured: Configuration) -> list[Sample]: ...
    def seconds(self, configured: Configuration) -> list[float]: ...


class Device:
    """A `Bench` on the current GPU, or in Triton's interpreter on the CPU."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = shapes
        self.device = torch.device("cpu" if INTERPRETED else "cuda")
        self.calls = [self._calls(shape) for shape in shapes]

    def _calls(self, shape: Shape) -> list[Callable[[], Sample]]:
        """The call, with several sets of seeds."""
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def normal() -> torch.Tensor:
            size = (shape.batch, shape.vocab)
            return torch.randn(size, generator=generator, device=self.device)

        base = 3.0 * normal()
        logits = [base.to(dtype), *((base + normal()).to(dtype) for _ in range(shape.policies))]
        seeds = torch.arange(DRAWS * shape.batch, device=self.device).view(DRAWS, shape.batch)
        return [
            functools.partial(
                sample,
                logits[0],
                logits[1:],
                [1.0 / shape.policies] * shape.policies,
                divergence=shape.divergence,
                seed=x.clone(),
                backend="triton",
                **shape.filters,  # type: ignore[arg-type]
            )
            for x in seeds
        ]

    def compile_ahead(self, candidates: Sequence[Configuration], seconds: float) -> None:
        """Fill Triton's cache on disk, with several processes at once. A failure is ignored here:
        it shows again, with its reason, when the configuration is used."""
        # The number of programs does not enter the compiled code.
        kinds = {replace(c, programs_per_processor=1) for c in candidates}
        jobs = [(shape, c) for shape in self.shapes for c in kinds]
        workers = min(8, (os.cpu_count() or 2) // 2, len(jobs))
        if INTERPRETED or workers < 2:
            return
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        wait([pool.submit(compile_one, *job) for job in jobs], timeout=max(0.0, seconds))
        pool.shutdown(wait=False, cancel_futures=True)

    def results(self, configured: Configuration) -> list[Sample]:
        with using(dict.fromkeys(TABLE, configured)):
            return [call() for calls in self.calls for call in calls]

    def seconds(self, configured: Configuration) -> list[float]:
        """Seconds of one call of each shape: device time, or wall time in the interpreter."""
        with using(dict.fromkeys(TABLE, configured)):
            time_of = _wall_seconds if INTERPRETED else _device_seconds
            return [
                time_of(calls[0], shape.batch >= _COLD_FROM)
                for shape, calls in zip(self.shapes, self.calls, strict=True)
            ]


def compile_one(shape: Shape, configured: Configuration) -> None:
    """Compile the kernels of a call by making the call."""
    with using(dict.fromkeys(TABLE, configured)):
        Device([shape]).calls[0][0]()
    torch.cuda.synchronize()


def _wall_seconds(call: Callable[[], Sample], cold: bool) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], Sample], cold: bool) -> float:
    """Warm: the mean of a block of calls. Cold: the median of single calls, each after the L2 cache
    has been overwritten."""
    spoiler = torch.empty(_SPOILER_BYTES if cold else 0, dtype=torch.int8, device="cuda")
    blocks, block = (_CALLS, 1) if cold else (1, _CALLS)
    marks = []
    torch.cuda.synchronize()
    torch.cuda._sleep(_CALLS * _ENQUEUE_CYCLES)
    for _ in range(blocks):
        spoiler.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(block):
            call()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in marks) * 1e-3 / block
