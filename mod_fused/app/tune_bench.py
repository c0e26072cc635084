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
_CALLS = 10  # timed together
#: From this batch on the L2 cache is filled with something else before each call.
_COLD_FROM = 64
_SPOILER_BYTES = 256 << 20
#: Clock cycles that the GPU sleeps for a call while the host enqueues it, so that the host's
#: slowness does not count: about half a millisecond.
_ENQUEUE_CYCLES = 1_000_000


class Shape(NamedTuple):
    """A call to be fast at."""

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
        """Fill Triton's cache on disk, several processes at once. What fails there fails again,
        with its reason, where it is used."""
        # The grid is no part of what is compiled.
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
        """Of one call of each shape: wall time in the interpreter, device time by events else."""
        with using(dict.fromkeys(TABLE, configured)):
            time_of = _wall_seconds if INTERPRETED else _device_seconds
            return [
                time_of(calls[0], shape.batch >= _COLD_FROM)
                for shape, calls in zip(self.shapes, self.calls, strict=True)
            ]


def compile_one(shape: Shape, configured: Configuration) -> None:
    """Compile what a call needs, by making it."""
    with using(dict.fromkeys(TABLE, configured)):
        Device([shape]).calls[0][0]()
    torch.cuda.synchronize()


def _wall_seconds(call: Callable[[], Sample], cold: bool) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], Sample], cold: bool) -> float:
    """Warm: a block of calls one after another. Cold: the median of single calls, each after
    something else has filled the L2 cache."""
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
