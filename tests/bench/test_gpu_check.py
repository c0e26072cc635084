"""The GPU check without a GPU: its dry run passes, wrong results fail it, and neither a crash nor a
test that hangs keeps the rest from being run and noted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # bench is not installed

pytest.importorskip("triton")

from bench import gpu_check, report  # noqa: E402
from bench.gpu import device  # noqa: E402


def outcomes(folder: Path) -> dict[tuple[str, str], list[str]]:
    """What pytest's reports say of each test, by file and name; nothing where it passed."""
    return {
        (file.stem, case.get("name")): [child.tag for child in case]
        for file in folder.glob("*.xml")
        for case in ElementTree.parse(file).iter("testcase")
    }


def test_the_dry_run_passes(tmp_path):
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "bench.gpu_check",
        "--dry-run",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = outcomes(tmp_path)
    assert {file for file, _ in found} == {"oracle", "execution", "sanitizer"}
    skipped = [name for (_, name), tags in found.items() if tags]
    assert skipped == ["test_a_call_runs_on_the_device_of_its_tensors"]  # there is one
    result = report.load(tmp_path / "gpu.json")
    assert {"python", "torch", "triton", "commit", "GPU"} <= set(result["machine"])
    assert [r["refused"] for r in result["rows"]] == [""] * 2 and result["left_out"] == []
    row = result["rows"][0]
    assert {"kernel", "graph", "allocating", "eager", "compile"} <= set(row["timings"])
    assert row["ratios"]["floor"] == pytest.approx(
        row["timings"]["kernel"][0] / row["floors_us"]["bytes"], rel=1e-4
    )
    text = (tmp_path / "gpu.md").read_text()
    assert "| jsd | 1 | 1024 | ref + 2 |  |" in text
    assert "| reverse_kl | 1 | 1024 | ref + 1 | top_k=50 |" in text
    assert "kernel p20 to p80" in text and "compile / ours" in text and "ours / floor" in text


# The kernels' results after them: a token that moves on from call to call, log-probabilities that
# are off by a thousandth part.
WRONG = """
import itertools
from mod_fused.triton_kernels import launch
calls, sample_out, log_probs_out = itertools.count(1), launch.sample_out, launch.log_probs_out
def moved(mixing, drawing, outputs, workspace=None):
    sample_out(mixing, drawing, outputs, workspace)
    outputs[0].add_(next(calls)).remainder_(mixing.vocab_size)
def scaled(mixing, out, workspace=None):
    log_probs_out(mixing, out, workspace)
    out.mul_(1.001)
launch.sample_out, launch.log_probs_out = moved, scaled
"""


def test_wrong_results_fail_every_test_that_compares_and_refuse_the_rows(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(WRONG)  # each process does that first
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k 'triton or another or jsd or different or beyond'")
    files = {name: gpu_check.TESTS / f"test_{name}.py" for name in ("oracle", "execution")}
    assert not gpu_check.run_tests(files, tmp_path, 880.0, 1)
    found = outcomes(tmp_path)
    passed = {name for (_, name), tags in found.items() if not tags}
    by_torch = {name for name in passed if "torch-jsd" in name or "millions" in name}
    assert passed == by_torch | {"test_no_call_makes_the_host_wait[jsd]"}
    assert len(found) >= len(passed) + 14
    words = ["-m", "bench.gpu.benchmark", "--out", str(tmp_path)]
    assert not gpu_check.run("benchmark", words, tmp_path / "gpu.log", 880.0)
    rows = report.load(tmp_path / "gpu.json")["rows"]
    assert all("total variation" in row["refused"] and not row["timings"] for row in rows)
    assert "| total variation" in (tmp_path / "gpu.md").read_text()


TWO_TESTS = """
import os, signal, pytest
pytestmark = pytest.mark.gpu
def test_before(): pass
def test_it(): {}
"""
FILES = {
    "hangs": "signal.pause()",
    "dies": "os.kill(os.getpid(), signal.SIGSEGV)",
    "fails": "assert 1 == 2",
    "works": "assert 1 == 1",
}


def test_a_file_that_hangs_dies_or_fails_is_noted_and_the_next_one_runs(tmp_path, capfd):
    files = {name: tmp_path / f"test_{name}.py" for name in FILES}
    for name, line in FILES.items():
        files[name].write_text(TWO_TESTS.format(line))
    hangs = {"hangs": files.pop("hangs")}
    assert not gpu_check.run_tests(hangs, tmp_path, 10.0, 1)
    assert not gpu_check.run_tests(files, tmp_path, 300.0, 1)
    said = capfd.readouterr().out
    for words in ("hangs: OUT OF TIME", "dies: FAILED", "fails: FAILED", "works: passed"):
        assert words in said
    log = (tmp_path / "gpu.log").read_text()
    assert log.count("test_before PASSED") == 4  # also of those that came to no end
    assert "Timeout" in log and "Segmentation fault" in log  # with the line where they were
    assert {x.stem for x in tmp_path.glob("*.xml")} == {"fails", "works"}
    works = {"works": files["works"]}
    assert gpu_check.run_tests(works, tmp_path, 300.0, 2)  # by several processes
    assert "created: 2/2 workers" in (tmp_path / "gpu.log").read_text()


def test_it_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "torch sees no GPU" in err and err.count("\n") == 1
    monkeypatch.setattr(device, "make", device.DryRun)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check, "run", lambda name, *rest: name == "benchmark")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # set by the dry run: taken back after the test
    monkeypatch.setenv("MOD_FUSED_BENCH_COMPILER", "eager")
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "pytest is not installed: no test was run\n"
