"""The case `host` under pytest-benchmark: `pytest bench/test_host.py --benchmark-only`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is not installed

from bench.case import ours, set_threads
from bench.cases.host import HOST
from bench.problem import Problem, logits

CONTESTANTS = {"sample": ours("cpu"), **HOST.contestants}


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("name", list(CONTESTANTS))
def test_host(benchmark: Any, name: str, divergence: str) -> None:
    set_threads(1)
    problem = Problem(divergence, "bfloat16", 1, 64, 1)
    benchmark(CONTESTANTS[name].build(problem, logits(problem, 1)))
