"""The study of value guidance: its estimators against closed forms, and a quick run of it all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

from bench import report
from bench.alignment import command, control, guided
from bench.alignment.statistics import best_of_kl, lead_at_kl
from mod_fused import world


def test_lead_at_equal_kl_is_that_over_the_joined_curve():
    # Reward sqrt(KL) at KL 0, 1, 4, in any order; joined, 5/3 at KL 3 up to the prompts' noise.
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(500, 1))
    kl = np.tile([4.0, 0.0, 1.0], (500, 1))
    rewards = np.sqrt(kl) + noise
    own = np.full(500, 2.0) + noise[:, 0]
    found = lead_at_kl(np.subtract, own, np.full(500, 3.0), rewards, kl)
    assert found is not None
    assert found.value == pytest.approx(1.0 / 3.0, abs=1e-4)
    # The noise is the prompt's, so it cancels in the difference.
    assert found.high - found.low <= 1e-4
    assert lead_at_kl(np.subtract, own, np.full(500, 4.1), rewards, kl) is None


def test_a_point_is_compared_with_control_by_the_shipped_scorer_and_cd_q_with_its_twin_too():
    def point(method: str, reward: float, kl: float) -> control.Found:
        return control.Found("helpful", method, 1.0, np.full((4, 3), reward), np.full(4, kl))

    reference, shipped = point("reference", 0.2, 0.0), point("CD-FUDGE", 0.6, 2.0)
    twin, cd_q = point("CD-FUDGE, as CD-Q", 0.4, 2.0), point("CD-Q", 0.5, 1.0)
    points = [reference, shipped, twin, cd_q, point("under jsd", 0.9, 1.0)]
    found = [{k: round(x.value, 5) for k, x in control.leads(p, points).items()} for p in points]
    twice = {"CD-FUDGE": 0.1, "CD-FUDGE, as CD-Q": 0.2}
    assert found == [{}, {}, {"CD-FUDGE": -0.2}, twice, {}]


def test_worth_differences_are_means_over_common_weights():
    kl, rewards = np.array([1.0, 3.0]), np.array([[0.4, 0.9, 0.8], [0.2, 0.9, 0.6]])
    points = [
        control.Found("both", "MAVIS", (0.5, 0.5), rewards, kl),
        control.Found("both", "MAVIS", (1.0, 0.0), rewards, kl),
        control.Found("both", "other", (0.5, 0.5), rewards - 0.1, kl - 1.0),
    ]
    (found,) = control.worth_differences(points)
    assert (found["against"], found["weights"]) == ("other", 1)
    assert found["weighted"].value == pytest.approx(0.1)
    assert found["worth"].value == pytest.approx(0.1 - 1.0 / guided.BETA)
    assert control.estimates(points[1])["weighted"].value == pytest.approx(0.3)


def test_a_quick_run_writes_every_point_table_and_picture(tmp_path):
    words = ["--quick", "--workers", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert command.main("bench.alignment.control", guided, control.summary, words) == 0
    result = report.load(tmp_path / "control.json")
    assert set(result) == {
        "sizes", "beta", "points", "mavis", "two", "differences", "seconds_of_jobs",
        "machine", "command",
    }  # fmt: skip
    methods = {p["method"] for p in result["points"] if not p["method"].startswith("under")}
    assert methods == {
        "reference", "CD-FUDGE", "CD-FUDGE, as CD-Q", "CD-Q", "FUDGE", "MOD", "blockwise",
        "best of N, reward", "best of N, scorer",
    }  # fmt: skip
    for p in result["points"]:
        assert all(0.0 <= p[name][0] <= 1.0 for name in world.OBJECTIVES)
        assert p["bound"] == p["method"].startswith("b")
        if p["method"] == "best of N, reward":
            assert p["kl"][0] == pytest.approx(best_of_kl(p["setting"]), abs=1e-5)
        if p["method"] == "reference":
            assert p["kl"][0] == pytest.approx(0.0, abs=1e-4)
    assert {p["method"] for p in result["two"]} == {"MAVIS", "CD", "MOD", "retrained"}
    assert [m["iteration"] for m in result["mavis"]] == [0, 1, 0, 1]
    text = (tmp_path / "control.md").read_text()
    assert text.count("\n## ") == 6
    assert str(tmp_path) not in text + (tmp_path / "control.json").read_text()
    sizes = [(tmp_path / f"control_{x}.png").stat().st_size for x in ("kl", "pareto")]
    assert all(4_000 < size < 50_000 for size in sizes)


def test_scorers_rank_the_pool_by_the_value_of_its_answers():
    # Of the shipped scorers, by the rewards that they were trained for: far above chance.
    sizes = guided.TINY._replace(prompts=8, best_of=(8,))
    pool = guided._pool(Path(), sizes, 1)
    for i, name in enumerate(guided.PANELS):
        reward, value = pool[..., world.OBJECTIVES.index(name)], pool[..., 3 + i]
        assert np.corrcoef(reward.ravel(), value.ravel())[0, 1] > 0.3
