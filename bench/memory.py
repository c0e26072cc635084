"""Measures how one call raises the peak of resident memory (Linux), in a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .case import ours, set_threads
from .measure import Call
from .problem import Problem


def growth(case: str, contestant: str, problem: Problem) -> int:
    """Bytes by which one call raises the peak of a new process; the noise is about 0.1 MB."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, case, contestant, problem).result()


def _peak() -> int:
    # Not getrusage's ru_maxrss: it keeps the peak of the parent process across exec.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _measure(case: str, contestant: str, problem: Problem) -> int:
    from .cases import CASES

    known = getattr(CASES[case], "contestants", {})
    build = (known[contestant] if contestant in known else ours(contestant)).build
    set_threads(problem.threads)
    dtype = getattr(torch, problem.dtype)

    def call_on(batch: int, vocab: int) -> Call:
        # Filled in place: no temporary may raise the peak.
        rows = [torch.empty(batch, vocab, dtype=dtype).normal_(0.0, 3.0)]
        more = len(problem.weights) + problem.reference - 1
        rows += [rows[0] + 0.25 for _ in range(more)]
        return build(problem._replace(batch=batch, vocab=vocab), rows)

    call_on(2, 2048)()  # loads the code and starts the threads
    call = call_on(problem.batch, problem.vocab)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident size
    before = _peak()
    call()
    return _peak() - before
