"""A sweep that is interrupted keeps what it has and goes on; what cannot fit is refused first."""

import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch

from mod_fused import world
from mod_fused.app import sweep_log
from mod_fused.cli import main

SIMPLEX = ["--points", "3", "--objectives", "helpful,humorous", "--batch-size", "5"]
STRENGTHS = ["--values", "harmless", "--strength", "0,4", "--objectives", "helpful,humorous"]
STRENGTHS += ["--points", "2", "--batch-size", "5"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*argv: str) -> int:
    small = ["--prompts", "4", "--samples", "2", "--max-new-tokens", "6"]
    return main(["sweep", *small, "--csv", "s.csv", "--picture", "s.png", *argv])


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def interrupt(monkeypatch, after: int, stop) -> None:
    """Call `stop` when so many points are on disk."""
    add = sweep_log.SweepLog.add
    written = 0

    def stopping(log, points):
        nonlocal written
        for point in points or [None]:
            if written == after:
                stop()
            add(log, [] if point is None else [point])
            written += point is not None

    monkeypatch.setattr(sweep_log.SweepLog, "add", stopping)


def ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [SIMPLEX, STRENGTHS], ids=["weights", "strengths"])
def test_an_interrupted_sweep_keeps_its_points_and_goes_on_to_the_same_files(
    kind, tmp_path, capsys, monkeypatch
):
    assert run(*kind) == 0
    whole, shown = files(tmp_path), capsys.readouterr().out
    lines = whole["s.csv"].splitlines(keepends=True)
    for points in range(len(lines) - 1):
        for name in whole:
            (tmp_path / name).unlink()
        with monkeypatch.context() as patch:
            interrupt(patch, points, ctrl_c)
            assert run(*kind) == 130
        assert f"{points} points are in s.csv, out of {len(lines) - 1};" in capsys.readouterr().err
        if points:
            assert (tmp_path / "s.csv").read_bytes() == b"".join(lines[: points + 1])
        assert run(*kind, "--resume") == 0
        assert capsys.readouterr().out == shown
        assert files(tmp_path) == whole


def test_sigterm_keeps_the_points_and_leaves_the_handler_as_it_was(tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    interrupt(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(*SIMPLEX) == 130
    assert len((tmp_path / "s.csv").read_bytes().splitlines()) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_resuming_survives_files_that_are_cut_off_anywhere(tmp_path, capsys, monkeypatch):
    assert run(*SIMPLEX) == 0
    whole = files(tmp_path)
    sizes = {name: len(whole[name]) for name in ("s.csv", "s.csv.points")}
    settings = whole["s.csv.points"].index(b"\n") + 1
    for name, size in [
        ("s.csv", 0),
        ("s.csv", 10),
        ("s.csv", sizes["s.csv"] - 1),
        ("s.csv.points", settings),
        ("s.csv.points", settings + 1),
        ("s.csv.points", sizes["s.csv.points"] - 1),
        ("s.csv.points", sizes["s.csv.points"] - 300),
    ]:
        with open(tmp_path / name, "r+b") as file:
            file.truncate(size)
        assert run(*SIMPLEX, "--resume") == 0
        assert files(tmp_path) == whole
    (tmp_path / "s.csv").unlink()
    assert run(*SIMPLEX, "--resume") == 0
    assert files(tmp_path) == whole


def test_a_finished_sweep_is_shown_again_without_decoding(tmp_path, capsys, monkeypatch):
    assert run(*SIMPLEX) == 0
    whole, shown = files(tmp_path), capsys.readouterr().out
    monkeypatch.setattr("mod_fused.app.trade_off.generate", ctrl_c)
    assert run(*SIMPLEX, "--resume") == 0
    assert capsys.readouterr().out == shown and files(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--divergence", "jsd"], "divergence reverse_kl, not jsd"),
        (["--normalizer", "zero"], "normalizer exact, not zero"),
        (["--sequence-history"], "sequence_history False, not True"),
        (["--plausibility", "0.1"], "plausibility auto, not 0.1"),
        (["--points", "4"], "points 3, not 4"),
        (["--samples", "3"], "samples 2, not 3"),
        (["--batch-size", "6"], "batch_size 5, not 6"),
        (["--max-new-tokens", "7"], "max_new_tokens 6, not 7"),
        (["--objectives", "humorous,helpful"], "models ['reference', 'helpful', 'humorous'], not"),
        (["--prompts", "5"], "prompts 4 ("),
        (["--prompt-file", "other.txt"], "prompts 4 ("),
        (["--values", "helpful"], "strength [], not [0.0, 2.0"),
        (["--dtype", "bfloat16"], "dtype None, not bfloat16"),
    ],
)
def test_resuming_with_other_options_is_refused_by_name(change, said, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("What?\n" * 4)
    assert run(*SIMPLEX) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert run(*SIMPLEX, *change, "--resume") == 2
    out, err = capsys.readouterr()
    assert f"mod-fused: --resume: s.csv was made with {said}" in err and err.count("\n") == 1
    assert files(tmp_path) == before


def test_resuming_into_files_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "s.csv").write_text("name,age\nx,1\n")
    assert run(*SIMPLEX, "--resume") == 2
    assert "s.csv.points, which says how s.csv was made, is not there" in capsys.readouterr().err
    assert run(*SIMPLEX) == 0  # without --resume a sweep replaces what is there
    text = (tmp_path / "s.csv").read_bytes()
    for changed, line in [
        (text.replace(b"weight_helpful", b"weight_other"), 1),
        (text.replace(b"\r\n1.0,", b"\r\n0.9,"), 2),
    ]:
        (tmp_path / "s.csv").write_bytes(changed)
        capsys.readouterr()
        assert run(*SIMPLEX, "--resume") == 2
        assert f"line {line} of s.csv is not what this sweep wrote" in capsys.readouterr().err
        assert (tmp_path / "s.csv").read_bytes() == changed
    lines = (tmp_path / "s.csv.points").read_bytes().splitlines(keepends=True)
    (tmp_path / "s.csv").unlink()
    for damaged, number in [
        ([b"{}x\n", *lines[2:]], 2),
        ([b"{}\n", *lines[2:]], 2),
        ([lines[2], lines[1], *lines[3:]], 2),
        ([*lines[1:], lines[-1]], len(lines) + 1),
    ]:
        (tmp_path / "s.csv.points").write_bytes(lines[0] + b"".join(damaged))
        assert run(*SIMPLEX, "--resume") == 2
        assert f"line {number} of s.csv.points is damaged" in capsys.readouterr().err
        assert not (tmp_path / "s.csv").exists()


def test_other_weights_of_a_model_in_the_same_folder_are_noticed(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for name in ("reference", "helpful"):
        shutil.copytree(world.checkpoint(name), tmp_path / name)
    (tmp_path / "prompts.txt").write_text("User: Why?\nUser: Who?\n")
    own = ["--reference", "./reference", "--policy", "./helpful", "--prompt-file", "prompts.txt"]
    assert run(*own) == 0
    tensors = load_file(tmp_path / "helpful" / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, tmp_path / "helpful" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run(*own, "--resume") == 2
    assert "was made with tensors of policy_1" in capsys.readouterr().err


def test_a_reward_that_fails_is_one_line_and_the_points_before_are_kept(tmp_path, capsys):
    (tmp_path / "failing.py").write_text(
        "count = 0\n"
        "def reward(prompt, response):\n"
        "    global count\n"
        "    count += 1\n"
        "    return {}['x'] if count > 5 else 1\n"
    )
    (tmp_path / "prompts.txt").write_text("User: Why?\nUser: Who?\n")
    own = ["--reference", str(world.checkpoint("reference")), "--prompt-file", "prompts.txt"]
    for name in ("helpful", "humorous"):
        own += ["--policy", str(world.checkpoint(name)), "--reward", "failing:reward"]
    assert run(*own, "--samples", "1", "--batch-size", "1") == 2
    err = capsys.readouterr().err
    assert "--reward failing:reward: KeyError: 'x'" in err and "Traceback" not in err
    assert len((tmp_path / "s.csv").read_bytes().splitlines()) == 2
    sys.modules.pop("failing")


@pytest.mark.parametrize(
    "size",
    [
        ["--samples", "1000000000000"],
        ["--points", "1000000000"],
        ["--prompts", "1000000000000"],
        ["--points", "1000000", "--values", "helpful", "--objectives", "helpful,humorous,harmless"],
    ],
    ids=" ".join,
)
def test_a_sweep_that_cannot_fit_is_refused_before_it_begins(size, tmp_path, capsys):
    assert run(*size) == 2
    out, err = capsys.readouterr()
    assert "of memory" in err and err.count("\n") == 1
    assert files(tmp_path) == {}


def test_a_batch_that_cannot_fit_leaves_an_older_table_alone(tmp_path, capsys, monkeypatch):
    (tmp_path / "s.csv").write_text("old")
    monkeypatch.setattr("mod_fused.decoding.memory.available_bytes", lambda device: 2**20)
    assert run(*SIMPLEX, "--batch-size", "1000000000") == 2
    err = capsys.readouterr().err
    assert "decoding 24 rows of up to 6 new tokens takes at least" in err and "1.0 MiB are" in err
    assert files(tmp_path) == {"s.csv": b"old"}


def test_points_without_rewards_or_numbers_come_back_as_they_were(tmp_path):
    import numpy as np

    from mod_fused.app.strengths import Guided
    from mod_fused.app.trade_off import Point

    log = sweep_log.SweepLog(tmp_path / "x.csv", {"a": (1,)}, ["kl"], lambda x: {"kl": 1.0})
    point = Point((), None, np.zeros((0, 2)), np.array([0.1, math.nan]), 3)
    log.add([Guided(2.5, point)])
    again = sweep_log.SweepLog(tmp_path / "x.csv", {"a": [1]}, ["kl"], lambda x: {"kl": 1.0})
    ((strength, found),) = again.resume([(2.5, ())])
    assert strength == 2.5 and found.weights == () and found.rewards is None and found.samples == 3
    assert found.log_ratios.shape == (0, 2)
    np.testing.assert_array_equal(found.kl, point.kl)
    json.loads((tmp_path / "x.csv.points").read_text().splitlines()[0])
