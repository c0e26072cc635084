"""The device under test: everything that is CUDA's own, and its stand-in for a dry run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime  # the built-in one from Python 3.11 on
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..measure import Call, Timing, seconds_of, timing

T = TypeVar("T")
Context = contextlib.AbstractContextManager[Any]


def _leaves(result: Any) -> list[Tensor]:
    """The tensors of a result: a tensor, or a tuple of tensors and None."""
    parts = [result] if isinstance(result, Tensor) else list(result)
    return [x for x in parts if isinstance(x, Tensor)]


class Gpu:
    """The one CUDA device."""

    dry = False
    device = torch.device("cuda")

    def pick(self, real: T, dry: T) -> T:
        """A size for the GPU, or a tiny one for the dry run."""
        return real

    def backend(self, index: int = 0) -> str:
        """The backend to check item number `index` with."""
        return "triton"

    def synchronize(self) -> None:
        """Wait for all streams; errors of earlier kernels show here."""
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Device memory that can be allocated."""
        return torch.cuda.mem_get_info()[0]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Operations that make the host wait raise."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def graph(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """A call as a CUDA graph: its outputs, and the function that replays it into them."""
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

    def streams(self, count: int) -> list[Context]:
        """Contexts of streams that begin after the work so far."""
        streams = [torch.cuda.Stream() for _ in range(count)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        return [torch.cuda.stream(stream) for stream in streams]

    def poison(self) -> None:
        """Fill the memory that the next allocations get with NaN (and -1 as integers)."""
        torch.cuda.synchronize()
        small = [512 << (i % 11) for i in range(4000)]  # 512 B to 512 KB
        blocks = [1 << 20, 2 << 20, 5 << 20, 12 << 20, 40 << 20, 150 << 20, 600 << 20] * 3
        limit = self.free_bytes() // 64
        held = [
            torch.full((n,), 255, dtype=torch.uint8, device="cuda")
            for n in small + blocks
            if n < limit
        ]
        del held  # back to the caching allocator, which hands them out again
        torch.cuda.synchronize()

    def microseconds(self, call: Call, *, cold: bool, budget: float = 0.15) -> Timing:
        """Device time of a call by events. Warm: blocks of calls one after another. Cold: each call
        by itself, after the L2 cache was filled with something else. The GPU is kept busy until
        the host has enqueued everything, so that its slowness does not count."""
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

    def map(
        self, function: Callable[[Any], T], items: Sequence[Any], workers: int, seconds: float
    ) -> Iterator[tuple[Any, T | None, str]]:
        """(item, result, error) as they come, from several processes: what takes time is
        compiling. `function` is a module's, its results are plain data."""
        pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=get_context("spawn"))
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures, timeout=max(1.0, seconds)):
                error = future.exception()
                found = None if error else future.result()
                yield futures.pop(future), found, "" if error is None else repr(error)
        except OutOfTime:
            for item in futures.values():
                yield item, None, "out of time"
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class DryRun(Gpu):
    """CPU tensors; the kernels in Triton's interpreter, as far as that is quick enough."""

    dry = True
    device = torch.device("cpu")

    def pick(self, real: T, dry: T) -> T:
        return dry

    def backend(self, index: int = 0) -> str:
        return "triton" if index == 0 else "torch"

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 30

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        yield

    def graph(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        outputs = call()

        def replay() -> None:
            for old, new in zip(_leaves(outputs), _leaves(call()), strict=True):
                old.copy_(new)

        return outputs, replay

    def streams(self, count: int) -> list[Context]:
        return [contextlib.nullcontext() for _ in range(count)]

    def poison(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)  # the fill is off without it
        torch.utils.deterministic.fill_uninitialized_memory = True

    def microseconds(self, call: Call, *, cold: bool, budget: float = 0.15) -> Timing:
        return timing([seconds_of(call)])

    def map(
        self, function: Callable[[Any], T], items: Sequence[Any], workers: int, seconds: float
    ) -> Iterator[tuple[Any, T | None, str]]:
        for item in items:
            yield item, function(item), ""


def make(dry: bool) -> Gpu:
    """The device to check.

    Raises:
        RuntimeError: if torch sees no GPU.
    """
    if dry:
        return DryRun()
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; --dry-run works without")
    return Gpu()
