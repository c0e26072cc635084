"""The study of value guidance: its estimators against closed forms, and a quick run of it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is not installed

from bench.alignment import control, control_report, guided
from bench.alignment.statistics import best_of_kl
from mod_fused import world


def test_lead_at_equal_kl_is_that_over_the_joined_curve():
    # Reward sqrt(KL) at KL 0, 1, 4, in any order; joined, 5/3 at KL 3 up to the prompts' noise.
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(500, 1))
    kl = np.tile([4.0, 0.0, 1.0], (500, 1))
    rewards = np.sqrt(kl) + noise
    own = np.full(500, 2.0) + noise[:, 0]
    found = control.lead_at_equal_kl(rewards, kl, own, np.full(500, 3.0))
    assert found is not None
    assert found["value"] == pytest.approx(1.0 / 3.0, abs=1e-4)
    # The noise is the prompt's, so it cancels in the difference.
    assert found["high"] - found["low"] <= 1e-4
    assert control.lead_at_equal_kl(rewards, kl, own, np.full(500, 4.1)) is None


def test_worth_differences_are_means_over_common_weights():
    kl, rewards = np.array([1.0, 3.0]), np.array([[0.4, 0.9, 0.8], [0.2, 0.9, 0.6]])
    points = [
        guided.Point("both", "MAVIS", (0.5, 0.5), rewards, kl),
        guided.Point("both", "MAVIS", (1.0, 0.0), rewards, kl),
        guided.Point("both", "other", (0.5, 0.5), rewards - 0.1, kl - 1.0),
    ]
    (found,) = control.worth_differences(points)
    assert (found["against"], found["weights"]) == ("other", 1)
    assert found["weighted"]["value"] == pytest.approx(0.1)
    assert found["worth"]["value"] == pytest.approx(0.1 - 1.0 / guided.BETA)
    assert control.estimates(points[1])["weighted"]["value"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("objectives", "error", "said"),
    [
        ((0.1, 0.2, 0.3), 0.01, "monotone:"),
        ((0.1, 0.3, 0.29), 0.01, "monotone within its errors:"),
        ((0.1, 0.3, 0.2), 0.01, "not monotone:"),
    ],
)
def test_trend_tells_a_fall_from_noise(objectives, error, said):
    history = [{"objective": x, "error": error} for x in objectives]
    assert control_report.trend(history).startswith(said)


def test_verdicts_are_those_of_the_interval():
    names = [
        control_report.verdict({"low": low, "high": high})
        for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))
    ]
    assert names == ["above", "below", "not told apart"]


def test_the_value_of_a_prefix_is_the_scorer_s_logit_whatever_the_padding():
    w = guided.World(guided.QUICK)
    scorer = w.shipped["helpful"]
    texts = [p + " Knead" for p in w.prompts[:3]]
    score = guided.value_of_prefix(scorer)
    batch = w.tokenizer(texts, return_tensors="pt", padding=True)
    padded = torch.nn.functional.pad(batch["input_ids"], (0, 2))
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2))
    for text, value in zip(texts, score(padded, mask), strict=True):
        ids = w.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = scorer(input_ids=ids).logits[0]
        assert float(value) == pytest.approx(float(logits[-2, ids[0, -1]]), abs=1e-5)


def test_a_quick_run_writes_every_point_table_and_picture(tmp_path):
    assert control.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "control.json").read_text())
    assert set(result) == {
        "schema", "sizes", "beta", "points", "leads", "mavis", "two", "differences", "seconds",
        "machine", "command",
    }  # fmt: skip
    methods = {p["method"] for p in result["points"] if not p["method"].startswith("under")}
    assert methods == {
        "reference", "CD-FUDGE", "CD-FUDGE, as CD-Q", "CD-Q", "FUDGE", "MOD", "blockwise",
        "best of N, reward", "best of N, scorer",
    }  # fmt: skip
    for p in result["points"]:
        assert all(0.0 <= p[name]["value"] <= 1.0 for name in world.OBJECTIVES)
        assert p["bound"] == p["method"].startswith("b")
        if p["method"] == "best of N, reward":
            assert p["kl"]["value"] == pytest.approx(best_of_kl(p["setting"]), abs=1e-5)
        if p["method"] == "reference":
            assert p["kl"]["value"] == pytest.approx(0.0, abs=1e-4)
    assert {p["method"] for p in result["two"]} == {"MAVIS", "CD", "MOD", "retrained"}
    assert [len(h) for h in result["mavis"].values()] == [2, 2]
    text = (tmp_path / "control.md").read_text()
    assert text.count("\n## ") == 6 and str(tmp_path) not in text + json.dumps(result)
    sizes = [(tmp_path / name).stat().st_size for name in ("control.png", "mavis.png")]
    assert all(5_000 < size < 150_000 for size in sizes)
    (tmp_path / "control.md").unlink()
    assert control.main(["--report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "control.md").read_text() == text
