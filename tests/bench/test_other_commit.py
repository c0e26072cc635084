"""`--base`: another commit beside the working tree, each in a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

from bench import measure, other_commit, report, run

ROOT = other_commit.ROOT
HISTORY = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True)
pytestmark = pytest.mark.skipif(HISTORY.returncode != 0, reason="no repository to take HEAD from")

WORDS = ["cpu", "--quick", "--budget", "0.001", "--backends", "torch", "--base=HEAD"]
WORDS += ["--dtypes", "float32", "--shapes", "1x256", "--threads", "1"]


def is_gone(tree: Path) -> bool:
    """Of the folder and of git's list (other tests may have their own there)."""
    words = ["git", "worktree", "list", "--porcelain"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    return not tree.exists() and str(tree) not in listed


def run_json(tmp_path: Path, *words: str) -> tuple[int, dict]:
    file = tmp_path / "result.json"
    status = run.main([*WORDS, *words, "--json", str(file)])
    return status, report.load(file)


def test_both_are_timed_and_the_ratio_is_of_their_medians(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(other_commit, "build", built.append)  # the C++ backend is not needed here
    words = ["--divergences", "jsd", "--contestants", "eager", "--out", str(tmp_path)]
    status, result = run_json(tmp_path, *words)
    assert status == 0 and result["contestants"] == ["torch", "base", "eager"]
    assert HISTORY.stdout.decode().startswith(result["base"]) and len(result["base"]) == 12
    (row,) = result["rows"]
    assert set(row["timings"]) == {"torch", "base", "eager"}
    medians = [row["timings"][name][0] for name in ("base", "torch")]
    assert row["base_ratio"]["ratio"] == pytest.approx(medians[0] / medians[1], rel=1e-4)
    assert row["base_ratio"]["p20"] <= row["base_ratio"]["p80"]
    assert f"- base: {result['base']}" in (tmp_path / "cpu.md").read_text()
    assert len(built) == 1 and is_gone(built[0])


def test_a_base_that_is_wrong_is_refused_and_ours_is_not_blamed(tmp_path, monkeypatch):
    trees = []

    def spoil(tree: Path) -> None:
        trees.append(tree)
        with (tree / "mod_fused" / "torch_kernels" / "launch.py").open("a") as file:
            file.write("\n_right = log_probs_out\n")
            file.write(
                "def log_probs_out(mixing, out):\n  _right(mixing, out)\n  out.mul_(0.999)\n"
            )

    monkeypatch.setattr(other_commit, "build", spoil)
    status, result = run_json(tmp_path, "--divergences", "jsd")
    assert status == 1
    assert result["rows"][0]["refused"].startswith("base: total variation")
    assert result["rows"][0]["timings"] == {} and is_gone(trees[0])


def test_what_cannot_be_compared_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(other_commit, "build", lambda tree: pytest.fail("built"))
    with pytest.raises(SystemExit, match="no-such-commit"):
        run.main([*WORDS, "--base=no-such-commit"])
    with pytest.raises(SystemExit, match="compares times"):
        run.main([*WORDS, "--memory"])
    with pytest.raises(SystemExit, match="one backend"):
        run.main([*WORDS, "--backends", "torch", "cpu"])


def test_time_of_the_runners_own_processes_is_not_that_of_others(monkeypatch):
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    mine = iter(["7 (a) b) R " + "0 " * 10 + "30 20 0", "7 (a) b) R " + "0 " * 10 + "90 60 0"])
    stat = iter(["cpu  100 0 0 0 0 0 0 0 0 0\n", "cpu  400 0 0 0 0 0 0 0 0 0\n"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(mine if "7" in str(self) else stat))
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measure.Others([7]).cores() == pytest.approx((300 - 60 - 40) * tick / 2.0)
