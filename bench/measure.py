"""Times several calls side by side, and watches how busy other processes are."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

Call = Callable[[], object]

MAX_ROUNDS = 200
_BLOCK = 0.003  # seconds per round: a shorter call is timed several times
_BLOCK_CALLS = 10
_LONG = 0.02  # seconds: a longer call refills the caches itself, without an untimed call first
_SLOW, _SLOW_ROUNDS = 0.3, 3  # a call over 0.3 s is timed in 3 rounds only


#: By name, the seconds of each call in each round.
Rounds = dict[str, list[list[float]]]


class Timing(NamedTuple):
    """Microseconds per call: median, 20th and 80th percentile, and the number of timed calls. JSON
    holds it as a list."""

    median_us: float
    p20_us: float
    p80_us: float
    calls: int


def timing(seconds: list[float]) -> Timing:
    """Percentiles of call times."""
    us = 1e6 * np.array(seconds)
    low, high = np.percentile(us, [20, 80], method="nearest").tolist()
    return Timing(float(np.median(us)), low, high, len(us))


def seconds_of(call: Call) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Others:
    """How many cores other processes kept busy, on average, since this was made (Linux).

    While another process has a core of ours, threads that meet at a barrier all wait for the thread
    on that core: a time measured then cannot be trusted.
    """

    def __init__(self, ours: Iterable[int] = ()) -> None:
        """`ours`: ids of the runner's own processes besides this one."""
        self._ours = tuple(ours)
        self._busy, self._wall = self._other_seconds(), time.perf_counter()

    def _other_seconds(self) -> float:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        ticks = user + nice + system + irq + softirq + steal
        for process in self._ours:  # after the name: 11 is utime, 12 stime
            after_name = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            ticks -= int(after_name[11]) + int(after_name[12])
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()

    def cores(self) -> float:
        """The average so far, accurate to about 0.01 over one second of measuring."""
        wall = time.perf_counter() - self._wall
        return max(0.0, (self._other_seconds() - self._busy) / wall)


def seconds_of_each(call: Call, count: int) -> list[float]:
    """Wall times of `count` calls in a row; a call in another process is timed there."""
    elsewhere = getattr(call, "seconds", None)
    return elsewhere(count) if elsewhere else [seconds_of(call) for _ in range(count)]


def rounds(calls: Mapping[str, Call], budget: float, min_rounds: int) -> Rounds:
    """Time calls in rounds. Each round times every call in turn, so that noise hits all alike.

    In a round a fast call is made once untimed, which brings its data and code back into the
    caches, and then timed up to ten times. A long call is timed once; one of over 0.3 s in three
    rounds only.

    Args:
        calls: by name. Each has been called before: nothing is compiled here.
        budget: seconds to spend on all repetitions of each call.
        min_rounds: rounds to make even when the budget is used up.
    """
    estimate = {name: seconds_of_each(call, 1)[0] for name, call in calls.items()}
    out: Rounds = {name: [] for name in calls}
    deadline = time.perf_counter() + budget * len(calls)
    for done in range(MAX_ROUNDS):
        if done >= min_rounds and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            if done >= _SLOW_ROUNDS and estimate[name] > _SLOW:
                continue
            if estimate[name] < _LONG:
                call()
            block = max(1, min(_BLOCK_CALLS, int(_BLOCK / estimate[name])))
            out[name].append(seconds_of_each(call, block))
    return out


def timings(measured: Rounds) -> dict[str, Timing]:
    """The percentiles of each call over all rounds."""
    return {name: timing([s for block in r for s in block]) for name, r in measured.items()}


def ratio(of: list[list[float]], to: list[list[float]]) -> dict[str, float]:
    """The ratio of two calls' medians, and percentiles of the ratios of the single rounds."""
    flat = [statistics.median(s for block in r for s in block) for r in (of, to)]
    each = [statistics.median(a) / statistics.median(b) for a, b in zip(of, to, strict=False)]
    low, high = np.percentile(each, [20, 80], method="nearest").tolist()
    return {"ratio": flat[0] / flat[1], "p20": low, "p80": high}
