"""The study of value guidance: its estimators against closed forms, and a quick run of it all."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

from bench import report
from bench.alignment import command, control, guided, loop
from bench.alignment.guided import Point
from bench.alignment.statistics import best_of_kl, lead_at_kl, same_reward_n
from mod_fused import world


def found(point: Point, reward: float, kl: float, length: float = 16.0) -> control.Found:
    scores = guided._columns(np.full((4, 3), reward), np.full(4, length))
    return control.Found(point, scores, np.full(4, kl))


def test_lead_at_equal_kl_is_that_over_the_joined_curve():
    # Reward sqrt(KL) at KL 0, 1, 4, in any order; joined, 5/3 at KL 3 up to the prompts' noise.
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(500, 1))
    kl = np.tile([4.0, 0.0, 1.0], (500, 1))
    rewards = np.sqrt(kl) + noise
    own = np.full(500, 2.0) + noise[:, 0]
    lead = lead_at_kl(np.subtract, own, np.full(500, 3.0), rewards, kl)
    assert lead is not None
    assert lead.value == pytest.approx(1.0 / 3.0, abs=1e-4)
    # The noise is the prompt's, so it cancels in the difference.
    assert lead.high - lead.low <= 1e-4
    assert lead_at_kl(np.subtract, own, np.full(500, 4.1), rewards, kl) is None


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_kl_of_best_of_n_is_estimated_between_the_exact_one_and_the_bound(n):
    # Twelve answers of different scores: best-of-n takes each with a probability in closed form.
    rng = np.random.default_rng(n)
    for concentration in (0.1, 1.0, 10.0):
        p = rng.dirichlet(np.full(12, concentration)) + 1e-9
        p /= p.sum()
        below = np.cumsum(p)
        chosen = below**n - (below - p) ** n
        exact = float((chosen * np.log(chosen / p)).sum())
        estimate = float((chosen * best_of_kl(n, p)).sum())
        assert exact <= estimate + 1e-9 <= best_of_kl(n) + 1e-6
        assert estimate - exact <= 0.25 * best_of_kl(n)
    assert best_of_kl(n) == pytest.approx(np.log(n) - (n - 1) / n)
    assert best_of_kl(n, 1.0) == pytest.approx(0.0, abs=1e-9) == best_of_kl(1, 0.3)


def test_the_n_of_the_same_reward_is_read_off_the_curve():
    curve = np.tile([0.2, 0.4, 0.6], (50, 1))  # of N = 1, 4, 16
    assert same_reward_n(np.full(50, 0.5), curve, (1, 4, 16)) == pytest.approx([8.0] * 3)
    assert same_reward_n(np.full(50, 0.1), curve, (1, 4, 16)) == pytest.approx([1.0] * 3)
    assert same_reward_n(np.full(50, 0.7), curve, (1, 4, 16)) is None


def test_best_of_n_takes_the_best_by_the_column_that_is_named():
    rng = np.random.default_rng(3)
    drawn = rng.random((5, 4, 7))  # three rewards, log T, T, two values
    columns = {"by reward, humorous": 2, "by scorer, helpful": 6, "by reward, length": 3}
    for name, column in columns.items():
        by, objective = name.split(", ")
        pairs = list(itertools.combinations(range(4), 2))
        best = [drawn[:, p][np.arange(5), drawn[:, p, column].argmax(1)] for p in map(list, pairs)]
        mean = np.mean(best, axis=0)
        (got,) = control.best_of_n(drawn, by, objective, [2])
        assert got.scores == pytest.approx(mean[:, :5])
        assert got.kl == pytest.approx(best_of_kl(2))
        assert got.own == pytest.approx(mean[:, 0 if objective == "helpful" else column])


def test_blocks_are_compared_with_the_n_of_the_same_reward():
    drawn = np.random.default_rng(4).random((5, 4, 7)) + 0.1
    best = {
        (by, "humorous"): control.best_of_n(drawn, by, "humorous", (1, 2, 4))
        for by in ("by reward", "by scorer")
    }
    blocks = Point("blocks", ("humorous",), "blockwise", (1.0,), blocks=(2, 8))
    reference = found(Point("one", ("humorous",), "reference"), 0.1, 0.0)
    # One draw's reward, in the mean, is that of N = 1: half of K = 2.
    own = control.Found(blocks, drawn[..., :5].mean(1), np.zeros(5))
    one = [reference._replace(scores=np.zeros((5, 5)), kl=np.zeros(5))]
    record = control.compared(own, one, best)
    assert record["by reward"] == pytest.approx([0.5, 0.5, 0.5], abs=1e-4)
    assert (record["k"], record["block_length"], record["setting"]) == (2, 8, "K 2, L 8")


def test_a_point_is_compared_with_cd_fudge_of_its_own_objective_at_its_kl():
    one = [
        found(Point("one", (name,), method), reward, kl)
        for name, method, reward, kl in [
            ("helpful", "reference", 0.2, 0.0), ("helpful", "CD-FUDGE", 0.6, 2.0),
            ("humorous", "CD-FUDGE", 0.9, 1.0), ("helpful", "MOD", 0.5, 1.0),
        ]
    ]  # fmt: skip
    assert ["lead" in control.compared(p, one, {}) for p in one[:2]] == [False, False]
    assert control.compared(one[3], one, {})["lead"].value == pytest.approx(0.1)
    # The reward of length is log(T / 64), T = 16.
    length = control.estimates(found(Point("length", ("length",), "CD"), 0.5, 1.0))
    assert length["reward"].value == pytest.approx(np.log(0.25), abs=1e-5)
    assert length["worth"].value == pytest.approx(np.log(0.25) - 0.1, abs=1e-5)


def test_transfer_is_the_gain_over_the_base_less_the_gain_at_home():
    def point(method: str, reward: float, base: str = "reference") -> control.Found:
        strengths = () if method in ("reference", "base") else (5.0,)
        return found(Point("transfer", ("helpful",), method, strengths, base=base), reward, 1.0)

    home = [point("reference", 0.2), point("CD-FUDGE", 0.5), point("CD-Q", 0.9)]
    moved = [point("base", 0.3, "humorous"), point("CD", 0.4, "humorous")]
    base, steered = control.transferred(moved, home)
    assert "gain" not in base and base["base"] == "humorous"
    assert steered["gain"].value == pytest.approx(0.1)
    assert steered["more"].value == pytest.approx(0.1 - 0.3)


def test_two_objectives_have_intervals_over_trainings_and_paired_differences():
    half = (0.5, 0.5)
    points = []
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        at: dict[str, Any] = {"seed": seed}
        points.append(found(Point("two", guided.PAIR, "MOD", (), half, **at), 0.5 + shift, 1.0))
        tilt = (5.0, 5.0)
        points.append(found(Point("two", guided.PAIR, "CD", tilt, **at), 0.4 + shift, 2.0))
    rows, over = control.two_objectives(points)
    assert [(r["method"], r["weights"]) for r in rows] == [("MOD", half), ("CD", half)]
    mod, cd = over
    assert mod["worth"].value == pytest.approx(0.6 - 1.0 / guided.BETA)
    # Student's t for two degrees of freedom, standard error 0.1 / sqrt(3).
    assert mod["worth"].high - mod["worth"].value == pytest.approx(4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert list(cd["less MOD"]) == pytest.approx([-0.2] * 3, abs=1e-5)


def test_every_job_has_its_own_file_and_what_a_point_needs_is_trained():
    sizes = guided.Sizes()
    phases = {phase.title: phase.records for phase in guided.phases(sizes)}
    files = [loop.file_of(Path(), title, r) for title, records in phases.items() for r in records]
    assert len(set(files)) == len(files)
    assert len(phases["scorers"]) == 4 * 2 + 1 + 2 * 2 * 2 + 3 * 2
    assert len(phases["trainings"]) == 3 * 5
    methods = {p.method for p in phases["points"] if p.table == "two"}
    mixes = {control.mix(p) for p in phases["points"] if p.table == "two"}
    assert len(methods) == 8 and mixes == set(sizes.weights)


def test_blocks_of_one_draw_are_the_decoder_and_a_scorer_on_a_base_starts_from_it():
    prompts = world.prompts(3, 1)
    ref = guided.reference()[0]
    score = guided.guidance.prefix_score([ref])
    one = guided._blockwise([None, ref], [1.0], prompts, score, 1, 8)
    plain = guided.decode([None, ref], [1.0], prompts)
    assert np.array_equal(one["scores"][:, :3], plain["rewards"][0].astype(float))
    assert np.abs(one["kl"]).max() <= 1e-4
    four = guided._blockwise([None, ref], [1.0], prompts, score, 4, 64)
    # Whole answers are rare: each costs the bound.
    assert four["kl"] == pytest.approx(np.full(3, best_of_kl(4)), rel=0.05)


def test_a_quick_run_writes_every_point_table_and_picture(tmp_path):
    words = ["--quick", "--workers", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert command.main("bench.alignment.control", guided, control.summary, words) == 0
    result = report.load(tmp_path / "control.json")
    assert set(result) == {
        "sizes", "beta", "one", "blocks", "policy", "length", "transfer", "two", "over",
        "scorers", "mavis", "policies", "seconds_of_jobs", "machine", "command",
    }  # fmt: skip
    assert {p["method"] for p in result["one"]} == {
        "reference", "CD-FUDGE", "CD-Q", "soft values", "FUDGE", "MOD",
        "best of N by reward", "best of N by scorer",
    }  # fmt: skip
    for p in result["one"]:
        assert all(0.0 <= p[name][0] <= 1.0 for name in world.OBJECTIVES)
        if p["method"] == "reference":
            assert p["kl"][0] == pytest.approx(0.0, abs=1e-4)
    for p in result["transfer"]:
        assert p["method"] != "base" or p["kl"][0] == pytest.approx(0.0, abs=1e-4)
    assert all(r["loss"] > r["least_loss"] > 0.1 for r in result["policies"])
    # At a corner MOD, the soup and the retrained policy are one policy.
    corner = {r["method"]: r["helpful"] for r in result["two"] if r["weights"] == [1.0, 0.0]}
    assert corner["MOD"] == corner["soup"] == corner["retrained"]
    text = (tmp_path / "control.md").read_text()
    assert text.count("\n## ") == 13
    assert str(tmp_path) not in text + (tmp_path / "control.json").read_text()
    sizes = [
        (tmp_path / f"control_{x}.png").stat().st_size for x in ("humorous", "helpful", "pareto")
    ]
    assert all(4_000 < size < 60_000 for size in sizes)
