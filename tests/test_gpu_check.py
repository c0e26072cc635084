"""The GPU check without a GPU: the dry run goes through every stage, wrong results fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench is not installed

pytest.importorskip("triton")


def run(out: Path, code: str, *words: str) -> tuple[int, dict]:
    """Exit status and results of a run that does `code` first."""
    script = f"import sys\nfrom bench import gpu_check\n{code}\nsys.exit(gpu_check.main())"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, "--dry-run", "--out", str(out), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (out / "gpu.json").exists(), done.stderr
    return done.returncode, json.loads((out / "gpu.json").read_text())["stages"]


def test_dry_run_goes_through_every_stage_and_passes(tmp_path):
    from bench.gpu_check import STAGES

    status, stages = run(tmp_path, "")
    failed = [(n, i) for n, s in stages.items() for i in s["items"] if i["status"] == "FAILED"]
    assert failed == [] and status == 0
    assert set(stages) == {stage.name for stage in STAGES if not stage.named}
    assert {n for n, s in stages.items() if s["status"] != "passed"} == {"compile"}
    assert all(s["finished"] and s["items"] for s in stages.values())
    assert {"python", "torch", "triton", "commit", "GPU"} <= set(
        stages["machine"]["data"]["header"]
    )
    rows = stages["benchmark"]["data"]["rows"]
    assert [r["refused"] for r in rows] == [""] * len(rows) and rows
    assert {"kernel", "graph", "allocating", "read", "eager", "compile"} <= set(rows[0]["times"])
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in text for name in stages) and "## Benchmark" in text


# The kernels' results after them: a token that moves on from call to call, or one log-probability
# that is off by a thousandth part.
WRONG_TOKENS = """
import itertools
from mod_fused.triton_kernels import launch
right, calls = launch.sample, itertools.count(1)
def wrong(mixing, drawing):
    tokens, *others = right(mixing, drawing)
    return (tokens + next(calls)) % mixing.vocab_size, *others
launch.sample = wrong
"""
WRONG_LOG_PROBS = """
from mod_fused.triton_kernels import launch
right = launch.log_probs
launch.log_probs = lambda mixing: right(mixing) * 1.001
"""


def test_wrong_tokens_fail_every_stage_that_draws(tmp_path):
    names = ["matrix", "graphs", "streams", "poison", "tokens", "benchmark"]
    status, stages = run(tmp_path, WRONG_TOKENS, "--stages", *names)
    assert status == 1
    assert {n: s["status"] for n, s in stages.items()} == dict.fromkeys(names, "FAILED")
    rows = stages["benchmark"]["data"]["rows"]
    assert rows[0]["refused"] and rows[0]["times"] == {}
    assert "log-probability of a drawn token" in (tmp_path / "gpu.md").read_text()


def test_wrong_log_probs_fail_the_matrix(tmp_path):
    status, stages = run(tmp_path, WRONG_LOG_PROBS, "--stages", "matrix")
    assert status == 1 and stages["matrix"]["status"] == "FAILED"
    assert any("total variation" in i["detail"] for i in stages["matrix"]["items"])


def test_every_schedule_that_a_call_has_is_checked_timed_and_reported(tmp_path):
    status, stages = run(tmp_path, "", "--stages", "questions", "profile")
    failed = [(n, i) for n, s in stages.items() for i in s["items"] if i["status"] == "FAILED"]
    assert failed == [] and status == 0
    found = {r["label"]: r["schedules"] for r in stages["questions"]["data"]["schedules"]}
    jsd, reverse_kl = found.values()
    assert {"shipped", "a launch per phase", "resident", "moments, a launch per phase"} <= set(jsd)
    assert "1 evaluations" in jsd and jsd["moments, a launch per phase"]["launches"] == 3
    assert jsd["a launch per phase"]["launches"] == 6 and jsd["resident"]["launches"] == 1
    for name in ("a launch per phase", "resident"):  # the same search, not only where it ends
        assert jsd[name]["steps"] == jsd["shipped"]["steps"] != {"0": 2}
    assert set(reverse_kl) == {"shipped", "chunk 2", "chunk 4", "chunk 8"}
    assert all(not s["refused"] and s["tv"] <= 2e-5 for s in (*jsd.values(), *reverse_kl.values()))
    text = (tmp_path / "gpu.md").read_text()
    assert (
        "## Schedules" in text
        and "| empty kernel, graph |" in text
        and "| resident |" in text
        and "## Log-linear" in text
    )


WRONG_SCHEDULE = """
from bench.gpu import schedules
right = schedules.resident
def wrong(shipped):
    launched = right(shipped)
    if launched is None:
        return None
    m, r, w, seed, position = launched[0].arguments
    return [launched[0]._replace(arguments=(m, r, w, seed + 1, position))]
schedules.SCHEDULES["resident"] = wrong
"""


def test_a_schedule_with_other_tokens_is_refused(tmp_path):
    status, stages = run(tmp_path, WRONG_SCHEDULE, "--stages", "questions")
    assert status == 1
    resident = stages["questions"]["data"]["schedules"][0]["schedules"]["resident"]
    assert "tokens are not those of the shipped schedule" in resident["refused"]
    assert "kernel" not in resident


NCU = """
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","mixture_kernel","SpeedOfLight","Duration","us","9.5"
"0","mixture_kernel","Occupancy","Something Else","","1"
"1","mixture_kernel","SpeedOfLight","Duration","us","30.25"
"""


def test_a_profile_is_read_by_kernel():
    from bench.gpu.profile import metrics

    lines = ["==PROF== Connected", *NCU.splitlines(), "==PROF== Disconnected"]
    assert metrics(lines) == [{"Duration": "9.5 us"}, {"Duration": "30.25 us"}]


FAKE_STAGES = """
import os, signal, sys, time, types
fakes = types.ModuleType("bench.gpu.fakes")
def raises(device, record): record.expect("before", True); 1 / 0
def dies(device, record): record.expect("before", True); os.kill(os.getpid(), signal.SIGSEGV)
def hangs(device, record): record.expect("before", True); signal.pause()
def nothing(device, record): pass
def works(device, record): record.expect("fine", True)
vars(fakes).update(raises=raises, dies=dies, hangs=hangs, nothing=nothing, works=works)
sys.modules["bench.gpu.fakes"] = fakes
names = ("raises", "dies", "hangs", "nothing", "works")
limits = {"hangs": 1.0}
gpu_check.STAGES = tuple(gpu_check.Stage(n, "fakes", n, limits.get(n, 9.0)) for n in names)
"""


def test_a_stage_that_raises_dies_or_hangs_is_noted_and_the_next_one_runs(tmp_path):
    status, stages = run(tmp_path, FAKE_STAGES)
    assert status == 1
    assert {n: s["status"] for n, s in stages.items()} == {
        "raises": "FAILED", "dies": "FAILED", "hangs": "OUT OF TIME", "nothing": "FAILED",
        "works": "passed",
    }  # fmt: skip
    assert "ZeroDivisionError" in stages["raises"]["items"][1]["detail"]
    assert all(stages[n]["items"][0]["name"] == "before" for n in ("raises", "dies", "hangs"))
    assert "-11" in stages["dies"]["items"][1]["detail"]


def test_chi_squared_accepts_the_distribution_and_sees_a_bias():
    from bench.gpu.correctness import FALSE_ALARMS, chi_squared

    rng = np.random.default_rng(1)
    p = rng.gamma(0.2, size=2500)
    p /= p.sum()
    biased = p * np.where(np.arange(2500) < 1024, 1.03, 1.0)
    counts = rng.multinomial(1 << 22, p)
    assert chi_squared(counts, p)[2] > FALSE_ALARMS
    assert chi_squared(rng.multinomial(1 << 22, biased / biased.sum()), p)[2] < FALSE_ALARMS
    p = np.array([0.5, 0.45, 0.03, 0.02])  # the last two are merged
    statistic, freedom, value = chi_squared(np.array([60, 36, 1, 3]), p)
    assert freedom == 2 and statistic == pytest.approx(100 / 50 + 81 / 45 + 1 / 5)
    assert value == pytest.approx(np.exp(-statistic / 2))  # at two degrees of freedom
