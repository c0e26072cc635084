"""The job loop of all studies: each job writes a file into a cache folder and is done once."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mod_fused.app.terminal import track


class Phase(NamedTuple):
    """Jobs of one kind: each record's file holds the result of `make(work, sizes, record)`."""

    title: str
    make: Callable[[Path, Any, Any], Any]  # may load the results of earlier phases
    records: Sequence[Any]


def file_of(work: Path, title: str, record: Any) -> Path:
    """The file of a job's result."""
    words = record if isinstance(record, tuple) else (record,)
    return work / f"{'-'.join(map(str, (title, *words))).replace(':', '')}.pt"


def load(work: Path, title: str, record: Any) -> Any:
    """The result of a job."""
    return torch.load(file_of(work, title, record), weights_only=False)


def _do(work: Path, sizes: Any, phase: Phase, record: Any) -> tuple[str, float]:
    began, file = time.perf_counter(), file_of(work, phase.title, record)
    unfinished = file.with_name(f"unfinished-{os.getpid()}")
    torch.save(phase.make(work, sizes, record), unfinished)
    unfinished.rename(file)  # only a complete file gets the name
    return file.stem, time.perf_counter() - began


def _alone() -> None:
    torch.set_num_threads(1)  # the models are small: processes share the cores better


def _results(
    do: Callable[[Any], tuple[str, float]], records: Sequence[Any], workers: int
) -> Iterator[tuple[str, float]]:
    if workers == 1:
        _alone()
        yield from map(do, records)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _alone) as pool:
        yield from pool.imap_unordered(do, records)


def run(work: Path, phases: Sequence[Phase], sizes: Any, workers: int) -> float:
    """Does the jobs that are missing in `work`; returns the seconds of all jobs together.

    Raises:
        ValueError: the folder holds results of other sizes.
    """
    work.mkdir(parents=True, exist_ok=True)
    stamp, log = work / "sizes.json", work / "seconds.json"
    wanted = json.dumps(sizes)
    if stamp.exists() and stamp.read_text() != wanted:
        raise ValueError(
            f"{work} holds results of other sizes, {stamp.read_text()}, expected {wanted}; "
            "remove it or name another folder"
        )
    stamp.write_text(wanted)
    seconds: dict[str, float] = json.loads(log.read_text()) if log.exists() else {}
    for phase in phases:
        missing = [r for r in phase.records if not file_of(work, phase.title, r).exists()]
        done = _results(functools.partial(_do, work, sizes, phase), missing, workers)
        heading = f"{phase.title}, {len(missing)} of {len(phase.records)}"
        for name, took in track(done, heading, len(missing)):
            seconds[name] = took
            log.write_text(json.dumps(seconds))
    return sum(seconds.values())
