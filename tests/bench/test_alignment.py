"""The alignment study: exact optima, estimators against enumeration, and a tiny run of it all."""

from __future__ import annotations

import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

from bench import report
from bench.alignment import (
    command,
    decoding,
    estimates,
    loop,
    policies,
    rules,
    sizes,
    statistics,
    tables,
    tabular,
)
from mod_fused import Ensemble, generate, recipes, reference, world
from mod_fused.divergence import DIVERGENCES
from mod_fused.training import embedded_policies as train

MAX_TV = 2e-5  # the op's, of the contract


# --- the tabular worlds ---------------------------------------------------------------------------


def test_token_by_token_is_exact_for_reverse_kl_and_additive_rewards_and_not_beyond():
    weights = np.array([0.3, 0.7])

    def found(divergence: str, additive: bool) -> dict[str, Any]:
        tree = reference.random_tree(np.random.default_rng(4), additive=additive)
        assert sum(np.exp(tree.log_ref)) == pytest.approx(1.0)
        return dict(tabular.shortfalls(divergence, tree, weights))

    additive, general = found("reverse_kl", True), found("reverse_kl", False)
    for mix in ("token by token, exact Z", "token by token, Z = 0", "prefix ratios, own mass"):
        assert additive[mix].total_variation <= MAX_TV
        assert abs(additive[mix].lost) <= 1e-4
    assert additive["mean of probabilities"].lost > 0.01
    # Another Z after every prefix: no optimum of the whole response.
    assert general["token by token, exact Z"].total_variation > 0.02
    assert 0.005 < general["token by token, exact Z"].lost < 1.0
    assert found("forward_kl", True)["token by token, exact Z"].lost > 0.01


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5"])
def test_zero_z_and_averages_fall_short_where_exact_z_does_not(divergence):
    rng, lost = np.random.default_rng(5), {}
    for _ in range(10):
        tree = reference.bandit(reference.random_tree(rng, depth=3))
        for mix, result in tabular.shortfalls(divergence, tree, np.array([0.5, 0.5])):
            lost.setdefault(mix, []).append(np.nan if result is None else result.lost)
    assert np.abs(lost["token by token, exact Z"]).max() <= 1e-4
    for mix in ("token by token, Z = 0", "mean of logits", "mean of probabilities"):
        assert np.mean(lost[mix]) > 0.02


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5", "jeffrey"])
def test_own_mass_is_the_policy_at_a_corner_and_loses_least_between(divergence):
    rng, lost = np.random.default_rng(6), {}
    for _ in range(5):
        tree = reference.random_tree(rng, additive=True)
        corner = dict(tabular.shortfalls(divergence, tree, np.array([1.0, 0.0])))
        assert corner["prefix ratios, own mass"].total_variation <= tree.depth * MAX_TV
        for mix, result in tabular.shortfalls(divergence, tree, np.array([0.5, 0.5])):
            lost.setdefault(mix, []).append(np.inf if result is None else result.lost)
    means = {mix: np.mean(values) for mix, values in lost.items()}
    assert 0.0 < means["prefix ratios, own mass"] == min(means.values())


# --- estimators -----------------------------------------------------------------------------------


def test_best_of_n_equals_the_mean_over_all_subsets():
    rewards = np.random.default_rng(7).random((2, 6, 3))
    weights = np.array([0.2, 0.5, 0.3])
    for prompt, got in zip(rewards, statistics.best_of(rewards, weights, 3), strict=True):
        best = [max(s, key=lambda r: r @ weights) for s in map(list, combinations(prompt, 3))]
        assert got == pytest.approx(np.mean(best, axis=0))
    assert statistics.best_of_kl(1) == pytest.approx(0.0, abs=1e-12)


def test_reweighting_the_pool_gives_the_exponential_tilt_for_reverse_kl():
    rewards = np.random.default_rng(8).random((3, 40, 3))
    weights = np.array([0.5, 0.5, 0.0])
    got, divergence = statistics.reweighted(rewards, weights, "reverse_kl")
    tilt = np.exp(10.0 * rewards @ weights)
    x = tilt / tilt.mean(1, keepdims=True)
    assert got == pytest.approx((x[..., None] * rewards).mean(1))
    assert divergence == pytest.approx((x * np.log(x)).mean(1))


def test_hypervolume_is_the_area_of_the_union_of_rectangles():
    points = np.random.default_rng(9).random((7, 2))
    grid = (np.arange(1000) + 0.5) / 1000
    below = [(grid[:, None] < x) & (grid[None] < y) for x, y in points]
    assert statistics.hypervolume(points) == pytest.approx(np.any(below, axis=0).mean(), abs=3e-3)
    assert statistics.hypervolume(np.array([[0.5, 0.5], [0.2, 0.2]])) == 0.25


def test_intervals_are_those_of_a_normal_mean_and_paired():
    x = np.random.default_rng(10).normal(3.0, 2.0, size=400)
    found = statistics.interval(lambda m: m, x)
    error = x.std() / 20.0
    assert found.value == pytest.approx(x.mean(), abs=1e-4)
    # 1000 resamples: the quantiles' own error is below 0.12 standard errors in 99% of seeds.
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.25 * error)
    pair = statistics.interval(lambda a, b: a - b, x + 1.0, x)
    assert pair.low == pytest.approx(1.0, abs=1e-4) == pair.high


def test_intervals_over_trainings_hold_the_mean_as_often_as_they_say():
    for n in (2, 3, 5):
        draws = np.random.default_rng(n).normal(1.0, 2.0, size=(4000, n))
        found = [statistics.over_seeds(row) for row in draws.tolist()]
        assert [f.value for f in found] == pytest.approx(draws.mean(1), abs=1e-5)
        held = np.mean([f.low <= 1.0 <= f.high for f in found])
        assert abs(held - 0.95) <= 4.9 * (0.95 * 0.05 / 4000) ** 0.5  # false alarms: 1e-6
    assert statistics.over_seeds([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_choosing_a_policy_at_random_is_a_mixture_of_whole_answers():
    """Four answers, each policy's listed as often as it draws them in eight."""
    ref, w = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.25, 0.75])
    counts = np.array([[5, 1, 1, 1], [0, 2, 2, 4]])
    rewards = np.array([0.1, 0.9, 0.4, 0.7])
    with np.errstate(divide="ignore"):
        log_ratio = np.log(counts / 8 / ref)  # [policies, answers]
    drawn = [np.repeat(np.arange(4), row) for row in counts]
    values = np.stack([np.stack([rewards[y], -y, y], axis=1) for y in drawn])
    ratios = np.stack([log_ratio[:, y].T for y in drawn])
    mixture = w @ counts / 8
    kl = (mixture * np.log(mixture / ref)).sum()
    expected = mixture @ rewards, kl, 10.0 * mixture @ rewards - kl
    assert statistics.at_random(values, ratios, w) == pytest.approx(expected)
    corner = statistics.at_random(values, ratios, np.array([1.0, 0.0]))
    assert corner[1] == pytest.approx((counts[0] / 8 * log_ratio[0]).sum())


def test_routing_asks_the_model_that_was_best_on_the_topic():
    known = np.zeros((2, 3, 3))
    known[:, :, 0] = [[0.9, 0.5, 0.1], [0.2, 0.4, 0.95]]  # of prompts on a, a, b
    known[:, :, 2] = -known[:, :, 0]
    values = np.arange(18.0).reshape(2, 3, 3)
    topics, asked = ["a", "a", "b"], ["b", "a", "c"]  # c: model 1 is best of all
    by_reward = [values[1, 0], values[0, 1], values[1, 2]]
    assert statistics.routed(topics, known, asked, values, 0) == pytest.approx(
        np.mean(by_reward, 0)
    )
    by_j = [values[0, 0], values[1, 1], values[0, 2]]
    assert statistics.routed(topics, known, asked, values, 2) == pytest.approx(np.mean(by_j, 0))
    assert statistics.routed([], known, asked, values, 0) == pytest.approx(values[1].mean(0))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "alpha:0.5"])
def test_answers_are_resampled_as_generate_does(divergence):
    ensemble, w = Ensemble.embedded(["helpful", "humorous"], dtype=torch.float32), [0.75, 0.5]
    own_mass = {"weights": w, "divergence": divergence, "sequence_history": True, "seed": 5}
    own_mass |= {"max_new_tokens": 6, "return_model_logprobs": True}
    prompts = world.prompts(5, 3)
    expected = generate(ensemble, prompts, num_candidates=4, **own_mass).weights
    out = generate(ensemble, prompts, num_return_sequences=4, **own_mass)  # the candidates
    totals = out.model_logprobs.double().sum(1).view(5, 4, 3).numpy()
    kl = out.logprobs.double().sum(1).view(5, 4).numpy() - totals[..., 0]
    ratios = totals[..., 1:] - totals[..., :1]
    for row in range(5):
        got = statistics.resampling_weights(divergence, np.array(w), ratios[row], kl[row])
        assert got == pytest.approx(expected[row].numpy(), abs=1e-4)
    assert expected.max() > 0.3


def test_choosing_among_candidates_costs_at_least_the_divergence_of_the_answer():
    """Three answers, two candidates from a proposal, every pair as often as it is drawn."""
    ref, q = np.array([0.5, 0.3, 0.2]), np.array([0.25, 0.25, 0.5])
    ratio, rewards = np.log([0.5, 1.5, 1.5]), np.array([0.2, 0.9, 0.4])
    pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(round(16 * q[i] * q[j]))]
    y = np.array(pairs).T  # [samples, prompts]
    kl = np.log(q / ref)[y]
    found = {"kl": kl, "log_ratios": ratio[y][..., None], "ended": np.ones_like(kl)}
    found["rewards"] = rewards[y][..., None]
    cell = rules.Cell("reverse_kl", (1.0,), "own mass, resampled", 0)
    got = rules._means(cell, found, 2)
    drawn = np.zeros(3)  # pi_2, by enumeration
    for i, j in product(range(3), repeat=2):
        weights = np.exp([ratio[i], ratio[j]]) * ref[[i, j]] / q[[i, j]]
        drawn[[i]] += q[i] * q[j] * weights[0] / weights.sum()
        drawn[[j]] += q[i] * q[j] * weights[1] / weights.sum()
    assert got[0] == pytest.approx(drawn @ rewards)
    true = (drawn * np.log(drawn / ref)).sum()
    assert true < got[1] < true + 0.1
    assert got[3] == pytest.approx(10.0 * got[0] - got[1])
    assert rules._means(cell, found, 1)[1] == pytest.approx((q * np.log(q / ref)).sum())


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_is_least_at_the_optimum_under_every_divergence(divergence):
    rewards = np.linspace(0.0, 1.0, 8)
    log_ref = np.full(8, -np.log(8.0))
    best = reference.optimum(divergence, log_ref, train.PREFERENCE_SCALE * rewards) - log_ref
    # Reverse KL and JSD are never continued; the others stay where f' is itself.
    assert divergence in ("reverse_kl", "jsd") or best.min() > train.TANGENT_BELOW
    log_ratios = torch.from_numpy(best[None]).requires_grad_()
    loss = train.preference_loss(
        log_ratios, torch.from_numpy(rewards[None]), slope=train.slope_of(divergence)
    )
    (gradient,) = torch.autograd.grad(loss, log_ratios)
    assert gradient.abs().max() < 1e-6


def test_no_log_ratios_have_less_loss_than_the_least(monkeypatch):
    rewards = torch.rand(5, train.GROUP, generator=torch.Generator().manual_seed(1)).double()
    monkeypatch.setattr(policies, "mixed_rewards", lambda answers, weights: rewards.flatten())
    least = policies.least_loss(None, [1.0, 0.0, 0.0])
    p = torch.sigmoid(10.0 * (rewards[:, :, None] - rewards[:, None]))
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    i, j = torch.triu_indices(train.GROUP, train.GROUP, 1)
    assert least == pytest.approx(entropy[:, i, j].mean().item())


# --- the run --------------------------------------------------------------------------------------


def test_every_job_has_its_own_file_and_what_a_cell_needs_is_trained():
    sizes = policies.Sizes()
    every = [(phase.title, record) for phase in policies.phases(sizes) for record in phase.records]
    files = [loop.file_of(Path(), *one) for one in every]
    assert len(set(files)) == len(files) == 3 + 4 + 75 + 587
    trained = set(policies.policies(sizes))
    assert all(set(policies.needed(cell)) <= trained for cell in policies.cells(sizes))


def run(words: list[str]) -> int:
    return command.main("bench.alignment", policies, estimates.summary, words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The work folder and the results of a tiny run."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    words = ["--tiny", "--workers", "1", "--work", str(work), "--out", str(out)]
    assert run(words) == 0
    return work, out


def test_a_tiny_run_writes_every_cell_table_and_picture(finished):
    work, out = finished
    result = report.load(out / "alignment.json")
    cells = policies.cells(policies.TINY)
    from_pool = result["cells"][len(cells) :]
    assert [c["method"] for c in result["cells"][: len(cells)]] == [c.method for c in cells]
    assert {c["method"] for c in from_pool} == {"best of 4", "best of 16", "optimum"}
    pool = loop.load(work, "pool", 0)
    for record in from_pool:
        assert record["overall"][0] >= pool.mean() or min(record["weights"]) == 0.0
    assert all(r["loss"] > r["least_loss"] > 0.1 for r in result["trainings"])
    for cell, record in zip(cells, result["cells"], strict=False):
        arrays = loop.load(work, "cells", cell)
        assert arrays["rewards"].shape == (cell.samples, policies.TINY.prompts, 3)
        for k, name in enumerate(("helpful", "harmless", "humorous")):
            assert record[name][0] == pytest.approx(arrays["rewards"][..., k].mean(), abs=1e-4)
        assert (record["kl"] is not None) == (not cell.greedy and record["invalid"] == 0)
    # The reference answers alike whatever it is called: weight 0, or greedy twice.
    assert np.abs(loop.load(work, "cells", cells[0])["kl"]).max() <= 1e-3
    text = (out / "alignment.md").read_text()
    assert text.count("\n## ") == 9 and str(work) not in text + (out / "alignment.json").read_text()
    assert {p.name for p in out.glob("*.png")} == {"alignment_pareto.png", "alignment_kl.png"}


def test_an_interrupted_run_goes_on_and_repeats_itself(finished, capsys):
    work, out = finished
    before = report.load(out / "alignment.json")
    policy, cell = policies.policies(policies.TINY)[0], policies.cells(policies.TINY)[2]
    redone = [loop.file_of(work, "trainings", policy), loop.file_of(work, "cells", cell)]
    kept = {p: p.stat().st_mtime_ns for p in work.glob("*.pt") if p not in redone}
    weights = loop.load(work, "trainings", policy)["model"]
    for file in redone:
        file.unlink()
    words = ["--tiny", "--workers", "1", "--work", str(work), "--out", str(out)]
    assert run(words) == 0
    printed = capsys.readouterr().err
    assert "trainings, 1 of" in printed and "cells, 1 of" in printed
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    for name, tensor in loop.load(work, "trainings", policy)["model"].items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=0)
    assert report.load(out / "alignment.json")["cells"] == before["cells"]


def test_a_folder_of_another_run_is_refused(finished):
    work, _ = finished
    with pytest.raises(ValueError, match="holds results of other sizes"):
        loop.run(work, [], policies.TINY._replace(policy_steps=3), 1)
    with pytest.raises(SystemExit, match="at least 1, got 0"):
        run(["--workers", "0", "--out", str(work)])


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ("kl 2", "0.13"), ("kl (+1%)", "+12.5 (-1.0 to +20.0)"), ("weights", "0.33, 0.5"),
        ("n", "3"), ("length 1", "7.2"), ("why 2", "none"), ("nothing (3)", ""),
    ],
)  # fmt: skip
def test_a_column_says_which_field_is_shown_and_how(column, shown):
    record = {"kl": [0.1251, -0.01, 0.2], "weights": [1 / 3, 0.5], "n": 3, "length": 7.24}
    assert tables.figure(record | {"why": "none", "nothing": None}, column) == shown


# --- sizes and rules ------------------------------------------------------------------------------


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MAX_NEW_TOKENS", 8)


def test_policies_of_different_sizes_mix_and_do_not_merge(tmp_path, short_answers):
    words = ["--tiny", "--workers", "1", "--work", str(tmp_path), "--out", str(tmp_path)]
    assert command.main("bench.alignment.sizes", sizes, sizes.summary, words) == 0
    result = report.load(tmp_path / "sizes.json")
    assert [m["layers"] for m in result["models"]] == [1, 2, 4]
    assert [m["vocabulary"] for m in result["models"]] == [904, 960, 904]
    by = {(tuple(r["weights"]), r["method"]): r for r in result["methods"]}
    for w in sizes.TINY.weights:
        cells = [loop.load(tmp_path, "cells", sizes.Cell(w, s)) for s in (0, 1)]
        reward = np.mean([x["rewards"] @ np.array(w) for x in cells])
        kl = np.mean([x["kl"] for x in cells])
        mod, ref = (by[tuple(report.rounded(w)), method] for method in ("MOD", "reference"))
        assert mod["weighted"][0] == pytest.approx(reward, abs=1e-4)
        assert mod["objective"][0] == pytest.approx(10.0 * reward - kl, abs=1e-3)
        assert ref["kl"] == [pytest.approx(0.0, abs=1e-3)]
        lead = mod["weighted"][0] - ref["weighted"][0]
        assert ref["weighted lead"][0] == pytest.approx(lead, abs=1e-4)
    # At a corner MOD is the policy, whatever the sizes of the others.
    corner = loop.load(tmp_path, "cells", sizes.Cell(policies.CORNERS[0], 0))
    assert corner["kl"] == pytest.approx(corner["log_ratios"][..., 0], abs=1e-3)
    assert by[policies.CORNERS[0], "a policy at random"]["weighted lead"] == [0.0, 0.0, 0.0]
    models = [sizes.build(name) for name in world.OBJECTIVES]
    with pytest.raises(ValueError, match="names and shapes of the reference's parameters"):
        recipes.soup([decoding.reference()[0], *models], policies.CENTRE)
    assert (tmp_path / "sizes.md").read_text().count("\n## ") == 3


def test_a_tiny_run_of_the_rules_measures_each_rule(tmp_path, short_answers):
    words = ["--tiny", "--workers", "1", "--work", str(tmp_path), "--out", str(tmp_path)]
    assert command.main("bench.alignment.rules", rules, rules.summary, words) == 0
    found = report.load(tmp_path / "rules.json")["rules"]
    resampled = [f"own mass, resampled, one of {n}" for n in rules.ONE_OF]
    names = [r["rule"] for r in found if r["tuned"] == "jsd"]
    assert names == [*list(rules.RULES)[:-1], *resampled]
    names = [r["rule"] for r in found if r["tuned"] == "reverse_kl"]
    assert names == ["token by token", *resampled]
    assert all(r["objective"] is not None for r in found)
    where = {c.weights for c in rules.cells(rules.Sizes()) if c.rule == "own mass, resampled"}
    assert where == {policies.CENTRE}
