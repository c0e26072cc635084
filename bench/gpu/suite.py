"""The shared tests on the GPU: pytest in several processes, each with its share of the tests.

This module is also the pytest plugin that cuts the shares and skips what time does not allow, so
that a process that does not come to its end is stuck, which is a failure.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .record import FAILED, PASSED, SKIPPED, Record

TESTS = Path(__file__).resolve().parents[2] / "tests"
FILES = ("combinations", "filters", "inputs", "log_probs", "sampling", "registration")
_SHARE, _END = "MOD_FUSED_TEST_SHARE", "MOD_FUSED_TEST_END"
_OUT_OF_TIME = "no time left"


# --- the plugin -----------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this process's share: Triton first, in an order that mixes all files."""
    own, shares = map(int, os.environ[_SHARE].split("/"))
    random.Random(0).shuffle(items)
    items.sort(key=lambda item: "triton" not in item.name)
    items[:] = items[own::shares]


def pytest_runtest_setup(item: Any) -> None:
    """Skip when the time is up."""
    if time.time() > float(os.environ[_END]):
        import pytest

        pytest.skip(_OUT_OF_TIME)


# --- the stage ------------------------------------------------------------------------------------


def _missing(file: Path) -> list[str]:
    """Packages that a test file imports and that are not here."""
    tree = ast.parse(file.read_text())
    names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module}
    known = {name.split(".")[0] for name in names} - {p.stem for p in TESTS.glob("*.py")}
    return sorted(n for n in known if importlib.util.find_spec(n) is None)


def tests(device: Any, record: Record) -> None:
    """Run what can be run; failures and what was left out are noted."""
    if importlib.util.find_spec("pytest") is None:
        record.item("tests", SKIPPED, "pytest is not installed")
        return
    files = []
    for name in device.pick(FILES, ("inputs",)):
        file = TESTS / f"test_{name}.py"
        if missing := _missing(file):
            record.item(file.name, SKIPPED, f"needs {', '.join(missing)}")
        else:
            files.append(str(file))
    # In a dry run three tests of arguments, where no kernel runs long.
    selection = device.pick("triton-cuda or torch-cuda", "triton-cpu and empty_batch")
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.suite", "-p", "no:cacheprovider"]
    command += ["-q", "-rA", "--tb=short", "-k", selection, *files]
    shares = device.pick(max(1, min(14, (os.cpu_count() or 2) - 2)), 1)
    limit = record.left()
    end = time.time() + 0.7 * limit
    running = []
    for i in range(shares):
        environment = os.environ | {_SHARE: f"{i}/{shares}", _END: str(end), "OMP_NUM_THREADS": "1"}
        log = (record.out / "logs" / f"tests_{i}.log").open("w+")
        running.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), log))
    counts: Counter[str] = Counter()
    for process, log in running:
        try:
            status = process.wait(max(1.0, record.left() - 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            record.item(Path(log.name).name, FAILED, "stuck: a test went on after its time was up")
            continue
        log.seek(0)
        text = log.read()
        found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b(.*)", text, re.MULTILINE)
        counts.update(outcome for outcome, _ in found)
        late = re.findall(rf"^SKIPPED \[(\d+)\].*{_OUT_OF_TIME}", text, re.MULTILINE)
        counts["out of time"] += sum(map(int, late))
        for outcome, what in found:
            if outcome in ("FAILED", "ERROR"):
                record.item(what.strip(" -")[:400], FAILED, f"see {Path(log.name).name}")
        if status not in (0, 1, 5):  # passed, failed, none selected
            record.item(
                Path(log.name).name, FAILED, f"pytest's exit status {status}: {text[-500:]}"
            )
    record.put(outcomes=dict(counts), processes=shares)
    detail = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
    if counts["PASSED"] == 0:
        record.item("tests", FAILED, "none passed: " + (detail or "none was found"))
    else:
        record.item("tests", PASSED, detail)
    if counts["out of time"]:
        record.item("tests", SKIPPED, f"{counts['out of time']} there was no time for")
