"""The floors (lower bounds of the time) of `floors.cpp`, built on first use, called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from mod_fused.divergence import DIVERGENCES

from ..case import NotTimed
from ..problem import POLICIES, Problem

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (_ROOT / "bench/contestants/floors.cpp", _ROOT / "csrc/scalar_math.h")
_DIVERGENCES = 5  # the first of the list have an entry in floors.cpp
_LIBRARY = _ROOT / "build/bench/floors.so"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-funroll-loops", "-shared", "-fPIC"]
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-mprefer-vector-width=512")  # no effect where there is no AVX-512


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled floors; compiles them when they are missing or older than their sources."""
    newest = max(path.stat().st_mtime for path in _SOURCES)
    if not _LIBRARY.exists() or _LIBRARY.stat().st_mtime < newest:
        _LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        # Build under another name, then rename: two runners may build at once.
        made = _LIBRARY.with_suffix(f".{os.getpid()}.so")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *FLAGS, str(_SOURCES[0]), "-o", str(made)], check=True)
        made.replace(_LIBRARY)
    # torch's OpenMP is loaded and has the same soname, so the floors share its threads.
    floors = ctypes.CDLL(str(_LIBRARY))
    floors.floor_read.restype = ctypes.c_uint64
    floors.floor_math.restype = ctypes.c_float
    return floors


def _pointers(logits: list[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(logits))(*(x.data_ptr() for x in logits))


def read(problem: Problem, logits: list[torch.Tensor]) -> Callable[[], object]:
    """A call that reads all the logits once and adds up their raw words."""
    pointers, size = _pointers(logits), logits[0].numel() * logits[0].element_size()
    call, threads = library().floor_read, ctypes.c_int(problem.threads)
    length = ctypes.c_int64(size)
    return lambda: call(pointers, length, threads)


def transcendentals(problem: Problem, logits: list[torch.Tensor]) -> Callable[[], object]:
    """A call that evaluates the divergence's transcendentals on the logits and adds them up."""
    if len(logits) != POLICIES + 1:
        raise ValueError(f"the floors are written for {POLICIES} policies, got {len(logits) - 1}")
    if problem.divergence not in DIVERGENCES[:_DIVERGENCES]:
        raise NotTimed(f"no floor is written for {problem.divergence}")
    norms = torch.stack([x.float().logsumexp(-1) for x in logits], 1).contiguous()
    weights = torch.tensor([1.0 - sum(problem.weights), *problem.weights], dtype=torch.float32)
    call = library().floor_math
    arguments = (
        ctypes.c_int(DIVERGENCES.index(problem.divergence)),
        ctypes.c_int(problem.dtype == "bfloat16"),
        _pointers(logits),
        ctypes.c_void_p(norms.data_ptr()),
        ctypes.c_void_p(weights.data_ptr()),
        ctypes.c_int64(problem.batch),
        ctypes.c_int64(problem.vocab),
        ctypes.c_int(problem.threads),
    )

    def run(keep: tuple[torch.Tensor, ...] = (norms, weights)) -> object:  # keeps them alive
        return call(*arguments)

    return run
