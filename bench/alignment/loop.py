"""The job loop of both studies: each job writes a file into a cache folder and is done once."""

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


class Job(NamedTuple):
    """A job: its file `name` in the folder `work` holds the result of `make(work, *arguments)`."""

    name: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]


Phases = list[tuple[str, list[Job]]]  # titles and jobs; jobs may need those of earlier phases


def file_of(work: Path, name: str) -> Path:
    """The file of a job's result."""
    return work / f"{name.replace(':', '')}.pt"


def load(work: Path, name: str) -> Any:
    """The result of a job."""
    return torch.load(file_of(work, name), weights_only=False)


def _do(work: Path, job: Job) -> tuple[str, float]:
    began, file = time.perf_counter(), file_of(work, job.name)
    unfinished = file.with_name(f"unfinished-{os.getpid()}")
    torch.save(job.make(work, *job.arguments), unfinished)
    unfinished.rename(file)  # only a complete file gets the name
    return job.name, time.perf_counter() - began


def _alone() -> None:
    torch.set_num_threads(1)  # the models are small: processes share the cores better


def _results(jobs: Sequence[Job], work: Path, workers: int) -> Iterator[tuple[str, float]]:
    do = functools.partial(_do, work)
    if workers == 1:
        _alone()
        yield from map(do, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _alone) as pool:
        yield from pool.imap_unordered(do, jobs)


def run(work: Path, phases: Phases, sizes: Any, workers: int) -> float:
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
    for title, jobs in phases:
        missing = [job for job in jobs if not file_of(work, job.name).exists()]
        done = _results(missing, work, workers)
        for name, took in track(done, f"{title}, {len(missing)} of {len(jobs)}", len(missing)):
            seconds[name] = took
            log.write_text(json.dumps(seconds))
    return sum(seconds.values())
