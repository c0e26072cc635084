"""Measures how one call raises the peak of resident memory (Linux), in a process of its own.

`python -m bench.memory CASE CONTESTANT PROBLEM` prints it in bytes; PROBLEM is a JSON list of the
fields of a `Problem`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from .case import ours, set_threads
from .measure import Call
from .problem import Problem

_ROOT = Path(__file__).resolve().parents[1]


def growth(case: str, contestant: str, problem: Problem) -> int:
    """Bytes by which one call raises the peak of a new process; the noise is about 0.1 MB."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", case, contestant, json.dumps(problem)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the measuring process failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


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


if __name__ == "__main__":
    case, contestant, fields = sys.argv[1:]
    problem = Problem(*json.loads(fields))
    print(_measure(case, contestant, problem._replace(weights=tuple(problem.weights))))
