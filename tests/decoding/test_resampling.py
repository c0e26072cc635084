"""Whole responses weighed to the optimum over whole responses, and drawn by their weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import tiny_models as tiny
import torch
from cases import DIVERGENCES, normal
from scipy import stats
from tiny_models import seeds_of
from whole_answers import (
    W,
    answers_drawn,
    brute_force,
    log_answers,
    of_answers,
    proposal,
    tree_models,
    tree_options,
)

from mod_fused import Ensemble, generate
from mod_fused.decoding import resampling
from mod_fused.decoding.resampling import choose, spread
from mod_fused.decoding.totals import Totals
from mod_fused.divergence import get_divergence
from mod_fused.guidance import WorstCaseWeights

BOUNDED = ("forward_kl", "alpha:0.5", "alpha:0.3")


# --- the formula ----------------------------------------------------------------------------------


def candidates(seed: int, batch: int, count: int, models: int, apart: float) -> torch.Tensor:
    """Log-probabilities of whole responses, float64 [B, N, models + 1]; the last are log q."""
    rng = np.random.default_rng([5, seed])
    level = rng.normal(size=(batch, count, 1)) * 10.0 - 150.0
    logs = level + rng.normal(size=(batch, count, models + 1)) * apart
    return torch.from_numpy(logs)


def weigh(
    options: dict[str, Any],
    logs: torch.Tensor,
    valid: torch.Tensor,
    count: int,
    has_reference: bool,
    values: torch.Tensor | None = None,
) -> resampling.Weighed:
    """`resampling.weigh` of log-probabilities [B N, models + 1], the last of which are log q."""
    totals = Totals(logs[:, :-1], logs[:, -1], values)
    return resampling.weigh(options, totals, valid, count, has_reference)


@pytest.mark.parametrize("w", [[0.3, 0.7], [0.9, 0.6], [1.4, -0.2], [0.2, 0.1]])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, "alpha:0.01"])
def test_weights_and_normaliser_are_those_of_a_root_finder(divergence: str, w: list[float]) -> None:
    batch, count = 4, 6
    logs = candidates(1, batch, count, 3, 1.0)
    options = {"divergence": divergence, "weights": w}
    valid = torch.ones(batch * count, dtype=torch.bool)
    got = weigh(options, logs.flatten(0, 1), valid, count, True)
    for b, row in enumerate(logs.numpy()):
        weights, normalizer = brute_force(divergence, np.array(w), row[:, :-1], row[:, -1])
        np.testing.assert_allclose(got.weights[b], weights, rtol=0, atol=1e-8)
        assert got.log_normalizer[b] == pytest.approx(normalizer, abs=1e-6)
        assert got.effective_sample_size[b] == pytest.approx(1 / (weights**2).sum(), rel=1e-6)


@pytest.mark.parametrize("apart", [1.0, 8.0])
@pytest.mark.parametrize("w", [[0.3, 0.7], [1.4, -0.2], []])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_tilt_the_weights_as_in_the_formula(
    divergence: str, w: list[float], apart: float
) -> None:
    batch, count = 4, 6
    logs = candidates(7, batch, count, len(w) + 1, 1.0)
    values = normal(3, batch * count, 3).double() * apart
    values[:, 2] = torch.nan  # of weight 0: not looked at
    v = torch.tensor([[0.7, -0.4, 0.0], [0.2, 1.0, 0.0]] * 2).double().repeat_interleave(count, 0)
    options = {"divergence": divergence, "weights": w, "value_weights": v}
    valid = torch.ones(batch * count, dtype=torch.bool)
    got = weigh(options, logs.flatten(0, 1), valid, count, True, values)
    tilt = (v * values)[:, :2].sum(1).view(batch, count).numpy()
    for b, row in enumerate(logs.numpy()):
        weights, normalizer = brute_force(divergence, np.array(w), row[:, :-1], row[:, -1], tilt[b])
        np.testing.assert_allclose(got.weights[b], weights, rtol=0, atol=1e-8)
        assert got.log_normalizer[b] == pytest.approx(normalizer, abs=1e-6)


@pytest.mark.parametrize("far", [-900.0, 0.0, 900.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_constant_in_the_values_moves_the_normaliser_alone(divergence: str, far: float) -> None:
    logs, valid = candidates(8, 3, 8, 3, 2.0), torch.ones(24, dtype=torch.bool)
    logs[..., 1:] += far
    values = normal(4, 24, 1).double()
    options = {"divergence": divergence, "weights": [0.3, 0.4], "value_weights": [2.0]}
    one, other = (
        weigh(options, logs.flatten(0, 1), valid, 8, True, values + c) for c in (0.0, 50.0)
    )
    torch.testing.assert_close(one.weights, other.weights, atol=1e-8, rtol=1e-8)
    if far == 0.0:  # else Z may be beyond float64's digits
        moved = other.log_normalizer - one.log_normalizer
        torch.testing.assert_close(moved, torch.full_like(moved, 100.0))


def test_values_of_no_weights_count_once() -> None:
    logs, valid = candidates(9, 2, 5, 1, 1.0), torch.ones(10, dtype=torch.bool)
    values = normal(5, 10, 2).double()
    each = [
        weigh(
            {"divergence": "jsd", "weights": [], "value_weights": v},
            logs.flatten(0, 1), valid, 5, True, values,
        )
        for v in (None, [1.0, 1.0])
    ]  # fmt: skip
    assert torch.equal(each[0].weights, each[1].weights) and each[0].weights[0].std() > 0.01


def test_without_a_reference_the_policies_alone_count() -> None:
    logs, valid = candidates(2, 2, 5, 2, 1.0), torch.ones(10, dtype=torch.bool)
    options = {"divergence": "reverse_kl", "weights": torch.tensor([[0.4, 0.8]] * 10)}
    got = weigh(options, logs.flatten(0, 1), valid, 5, False)
    expected = (logs[..., :2] @ torch.tensor([0.4, 0.8]).double() - logs[..., 2]).softmax(1)
    torch.testing.assert_close(got.weights, expected)


@pytest.mark.parametrize("far", [-2000.0, -300.0, 0.0, 300.0, 2000.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_candidates_of_a_corner_weigh_the_same_however_far_the_reference(
    divergence: str, far: float
) -> None:
    logs = candidates(3, 3, 8, 3, 5.0)
    logs[..., 0] += far
    logs[..., 2] = torch.nan  # a policy of weight 0 is not looked at
    logs[..., 3] = logs[..., 1]  # drawn from the first policy
    valid = torch.ones(24, dtype=torch.bool)
    got = weigh(
        {"divergence": divergence, "weights": [1.0, 0.0]}, logs.flatten(0, 1), valid, 8, True
    )
    torch.testing.assert_close(got.weights, torch.full_like(got.weights, 1 / 8), atol=1e-8, rtol=0)
    torch.testing.assert_close(got.effective_sample_size, torch.full((3,), 8.0).double())


@pytest.mark.parametrize("far", [-900.0, 900.0])
@pytest.mark.parametrize("divergence", BOUNDED)
def test_a_common_factor_of_the_policies_and_the_proposal_changes_nothing(
    divergence: str, far: float
) -> None:
    logs, valid = candidates(4, 3, 8, 3, 2.0), torch.ones(24, dtype=torch.bool)
    options = {"divergence": divergence, "weights": [0.3, 0.4]}
    near = weigh(options, logs.flatten(0, 1), valid, 8, True).weights
    logs[..., 1:] += far
    torch.testing.assert_close(weigh(options, logs.flatten(0, 1), valid, 8, True).weights, near)


@pytest.mark.parametrize(
    ("apart", "far", "tilt"),
    [(150.0, 0.0, 0.0), (150.0, 0.0, 3.0), (1.0, -300.0, 3.0), (1.0, 60.0, 3.0)],
)
@pytest.mark.parametrize("divergence", ["jsd", "jeffrey"])
def test_weights_of_responses_hundreds_of_nats_apart_are_those_of_400_digits(
    divergence: str, apart: float, far: float, tilt: float
) -> None:
    def deficit(d: Any) -> Any:  # sup f' - f', or -f'
        return mp.log1p(mp.exp(-d)) if divergence == "jsd" else mp.expm1(-d) - d

    def ratio(q: Any) -> Any:
        if divergence == "jsd":
            return 1 / mp.expm1(q)
        # v = 1/x solves v + log v = 1 + q; beyond 5000 a fixed point is exact to 1e-8.
        return 1 / mp.lambertw(mp.exp(1 + q)).real if q < 5000 else 1 / (1 + q - mp.log(q))

    logs, w = candidates(1, 1, 5, 3, apart), [0.3, 0.7]
    logs[..., 1:] += far
    values = normal(6, 5, 1).double()
    with mp.workdps(400):
        rows = [[mp.mpf(x) for x in row] for row in logs[0].tolist()]
        deficits = [
            sum(c * deficit(x - row[0]) for c, x in zip(w, row[1:-1], strict=True))
            - tilt * mp.mpf(v)
            for row, v in zip(rows, values[:, 0].tolist(), strict=True)
        ]
        excess = [q - min(deficits) for q in deficits]
        base = [mp.exp(row[0] - row[-1]) / 5 for row in rows]
        # Between the distance at which one candidate alone weighs 1 and that at which all do.
        lower = deficit(-mp.log(base[excess.index(0)]))
        upper = deficit(-mp.log(sum(base)))
        for _ in range(1500):
            middle = (lower + upper) / 2
            total = sum(a * ratio(middle + x) for a, x in zip(base, excess, strict=True))
            lower, upper = (middle, upper) if total > 1 else (lower, middle)
        expected = [float(a * ratio(upper + x)) for a, x in zip(base, excess, strict=True)]
    valid = torch.ones(5, dtype=torch.bool)
    options = {"divergence": divergence, "weights": w, "value_weights": [tilt]}
    got = weigh(options, logs[0], valid, 5, True, values)
    assert sum(expected) == pytest.approx(1.0, abs=1e-8)
    np.testing.assert_allclose(got.weights[0], expected, atol=1e-7)


@pytest.mark.parametrize("spread", [5.0, 100.0])
@pytest.mark.parametrize(
    ("divergence", "far", "limit"),
    [
        ("jsd", 900.0, "forward_kl"),  # f' of policies far more likely than the reference
        ("jsd", -900.0, "reverse_kl"),
        ("jeffrey", 900.0, "reverse_kl"),
        ("jeffrey", -900.0, "forward_kl"),
    ],
)
def test_far_from_the_reference_a_divergence_is_its_limit(
    divergence: str, far: float, limit: str, spread: float
) -> None:
    logs, valid = candidates(6, 8, 5, 3, spread), torch.ones(40, dtype=torch.bool)
    logs[..., 1:] += far
    found = [
        weigh({"divergence": name, "weights": [0.3, 0.7]}, logs.flatten(0, 1), valid, 5, True)
        for name in (divergence, limit)
    ]
    torch.testing.assert_close(found[0].weights, found[1].weights, atol=1e-8, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_invalid_candidates_weigh_nothing_and_count(divergence: str) -> None:
    logs = candidates(5, 2, 6, 2, 1.0)
    valid = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    options = {"divergence": divergence, "weights": [0.5]}
    got = weigh(options, logs.flatten(0, 1), valid.flatten(), 6, True)
    assert not got.weights[0][~valid[0]].any()
    assert all(x[1].isnan().all() for x in got)
    kept = logs[0, valid[0]].numpy()
    log_q = kept[:, -1] + math.log(6 / 4)  # the mean is over all six
    weights, normalizer = brute_force(divergence, np.array([0.5]), kept[:, :-1], log_q)
    np.testing.assert_allclose(got.weights[0][valid[0]], weights, atol=1e-8)
    assert got.log_normalizer[0] == pytest.approx(normalizer, abs=1e-6)


def test_each_draw_follows_the_weights_and_draws_are_independent() -> None:
    # The false-alarm rate is 1e-6.
    weights = torch.tensor([0.5, 0.3, 0.0, 0.2], dtype=torch.float64)
    rows = choose(weights.expand(6000, -1), torch.arange(6000), 3, 2).view(6000, 2)
    rows = rows - 4 * torch.arange(6000)[:, None]
    pairs = np.bincount((4 * rows[:, 0] + rows[:, 1]).numpy(), minlength=16)
    p = torch.outer(weights, weights).flatten().numpy()
    assert not pairs[p == 0].any()
    assert stats.chisquare(pairs[p > 0], 6000 * p[p > 0]).pvalue > 1e-6
    alone = choose(weights[None], torch.tensor([17]), 3, 5)
    assert torch.equal(alone[:2], rows[17])  # neither other rows nor the number of draws
    assert not torch.equal(alone, choose(weights[None], torch.tensor([17]), 4, 5))


def test_resampled_candidates_come_as_often_as_they_weigh_rounded_down_or_up() -> None:
    # The false-alarm rate of the means is 1e-6 a candidate.
    weights = torch.tensor([0.5, 0.33, 0.0, 0.17], dtype=torch.float64)
    rows = spread(weights.expand(20000, -1), torch.arange(20000), 3).view(20000, 4)
    rows = rows - 4 * torch.arange(20000)[:, None]
    counts = torch.stack([(rows == n).sum(1) for n in range(4)], 1)
    assert counts[:, 0].eq(2).all() and counts[:, 2].eq(0).all()
    assert set(counts[:, 1].tolist()) == {1, 2} and set(counts[:, 3].tolist()) == {0, 1}
    for n in (1, 3):
        up = int((counts[:, n] == counts[:, n].max()).sum())
        assert stats.binomtest(up, 20000, float(4 * weights[n] % 1)).pvalue > 1e-6
    alone = spread(weights[None], torch.tensor([17]), torch.tensor([3]))
    assert torch.equal(alone, rows[17])  # whatever the other rows
    elsewhere = spread(weights.expand(20000, -1), torch.arange(20000), 4).view(20000, 4)
    assert not torch.equal(elsewhere - 4 * torch.arange(20000)[:, None], rows)


def test_equal_weights_are_resampled_to_themselves_and_nan_to_some_row() -> None:
    weights = torch.full((100, 7), 1 / 7).double()
    rows = spread(weights, torch.arange(100), 0)
    assert torch.equal(rows, torch.arange(700))
    rows = spread(torch.full((1, 7), torch.nan).double(), torch.arange(1), 0)
    assert rows.ge(0).all() and rows.lt(7).all()


# --- the decoder ----------------------------------------------------------------------------------


def optimum(divergence: str, reachable: np.ndarray) -> np.ndarray:
    """The optimum [answers] over whole answers, among those that can be reached."""
    logs = log_answers()[reachable]
    # All answers are given once, as if drawn with equal probability from as many.
    weights, _ = brute_force(
        divergence, np.array(W), logs, np.full(len(logs), -math.log(len(logs)))
    )
    p = np.zeros(len(reachable))
    p[reachable] = weights
    return p


@pytest.mark.parametrize(
    ("divergence", "filters"),
    [
        ("reverse_kl", {"temperature": 1.6}),
        ("reverse_kl", {"temperature": 0.8, "top_k": 2}),
        ("jsd", {"temperature": 1.3}),
        ("forward_kl", {"min_p": 0.2}),
    ],
)
def test_the_answer_drawn_from_two_candidates_has_the_distribution_of_all_pairs(
    divergence: str, filters: dict[str, Any]
) -> None:
    # The false-alarm rate is 1e-6 a case.
    log_q, logs = of_answers(proposal(divergence, **filters)), log_answers()
    expected = np.zeros(len(log_q))
    reached = np.flatnonzero(log_q > -np.inf)
    for pair in itertools.product(reached, repeat=2):
        two = list(pair)
        weights, _ = brute_force(divergence, np.array(W), logs[two], log_q[two])
        np.add.at(expected, two, weights * np.exp(log_q[two].sum()))
    out = generate(
        tree_models(),
        **tree_options(6000, divergence=divergence, seed=1, num_candidates=2, **filters),
    )
    counts = answers_drawn(out)
    assert not counts[expected == 0].any() and out.weights.shape == (6000, 2)
    at = expected > 0
    assert stats.chisquare(counts[at], 6000 * expected[at] / expected.sum()).pvalue > 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_more_candidates_come_nearer_to_the_optimum_over_whole_answers(divergence: str) -> None:
    filters = {"temperature": 2.0}
    target = optimum(divergence, of_answers(proposal(divergence, **filters)) > -np.inf)
    far = []
    for count in (1, 2, 10):
        options = {"divergence": divergence, "seed": 2, "num_candidates": count, **filters}
        out = generate(tree_models(), **tree_options(2000, **options))
        far.append(0.5 * np.abs(answers_drawn(out) / 2000 - target).sum())
    # Of 2000 draws from the optimum itself far would be about 0.03.
    assert far[0] > 0.1 and far[0] > far[1] > far[2] and far[2] < 0.07


def test_the_normaliser_of_reverse_kl_is_that_of_all_answers() -> None:
    # sum_y prod pi^w over the tree; the mean of 400 x 50 weights is within 5 of its errors.
    mass = np.exp(log_answers() @ np.array([1.0 - sum(W), *W])).sum()
    options = {"seed": 3, "num_candidates": 50, "temperature": 1.2}
    out = generate(tree_models(), **tree_options(400, **options))
    means = out.log_normalizer.exp().numpy()
    assert abs(means.mean() - mass) < 5 * means.std() / 20


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_at_a_corner_all_candidates_weigh_the_same(divergence: str) -> None:
    options: dict[str, Any] = {"weights": [1.0, 0.0], "divergence": divergence, "seed": 5}
    out = generate(tiny.three_models(), tiny.PROMPTS, num_candidates=6, max_new_tokens=8, **options)
    torch.testing.assert_close(out.weights, torch.full((3, 6), 1 / 6).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.effective_sample_size, torch.full((3,), 6.0).double())


def test_what_is_returned_are_candidates_whatever_the_batch_and_the_number() -> None:
    models, seeds = tiny.three_models(), [5, 6, 7]
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "temperature": 1.3,
        "return_model_logprobs": True,
    }
    weights = [[0.6, 0.7], [0.2, 0.3], [1.0, 0.5]]
    pool = generate(
        models, tiny.PROMPTS, weights=weights, seed=seeds, num_return_sequences=4, **options
    )
    many = {"num_candidates": 4, "num_return_sequences": 6}
    out = generate(models, tiny.PROMPTS, weights=weights, seed=seeds, **many, **options)
    assert out.tokens.shape[0] == 18 == len(out.texts) and len(set(out.seeds.tolist())) > 3
    for row, prompt in enumerate(tiny.PROMPTS):
        one = {"weights": weights[row], "seed": [seeds[row]], "num_candidates": 4, **options}
        alone = generate(models, prompt, **one)
        own = slice(6 * row, 6 * row + 6)
        n = int(alone.lengths[0])
        assert torch.equal(alone.tokens[0, :n], out.tokens[6 * row, :n])
        torch.testing.assert_close(alone.weights[0], out.weights[row], atol=1e-4, rtol=0)
        each = seeds_of(seeds[row], 4)
        for k, seed in zip(range(own.start, own.stop), out.seeds[own].tolist(), strict=True):
            place = 4 * row + each.index(seed)
            length = int(pool.lengths[place])
            assert int(out.lengths[k]) == length and out.texts[k] == pool.texts[place]
            for name in ("tokens", "logprobs", "model_logprobs"):
                mine, theirs = getattr(out, name)[k, :length], getattr(pool, name)[place, :length]
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_invalid_candidates_are_not_returned_unless_all_are() -> None:
    def mask_fn(step: int, sequences: torch.Tensor) -> torch.Tensor:
        allowed = torch.ones(len(sequences), 3, dtype=torch.bool)
        allowed[[0, 2, 4, 5]] = step == 0  # candidates 0 and 2 of prompt 0, both of prompt 1's half
        allowed[6:8] = step == 0
        return allowed

    options = {"mask_fn": mask_fn, "num_candidates": 4, "num_return_sequences": 9, "seed": 6}
    out = generate(tree_models(), **tree_options(2, **options, eos_token_id=[]))
    assert out.valid[:9].all() and not out.weights[0, [0, 2]].any()
    assert not out.valid[9:].any() and out.weights[1].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": False}, "temperature above 0"),
        ({"temperature": [1.0, 0.0]}, "temperature above 0"),
        ({"temperature": torch.tensor(0.0)}, "temperature above 0"),
        ({"streamer": print}, "num_candidates cannot be combined with streamer"),
        (
            {"value_fn": lambda step, x: x, "value_weights": WorstCaseWeights(1.0)},
            r"weights chosen at each step \(WorstCaseWeights\)",
        ),
        ({"resample_below": -0.1}, r"resample_below must be a share of N in \[0, 1\] or None"),
        ({"resample_below": 1.5}, "resample_below must be a share of N"),
        ({"resample_below": float("nan")}, "resample_below must be a share of N"),
        ({"resample_below": 0.5, "num_candidates": None}, "given without num_candidates"),
        ({"resample_fn": lambda *x: None}, "num_candidates cannot be combined with resample_fn"),
        (
            {"prefix_logprobs": torch.zeros(2, 3), "sequence_history": True},
            "num_candidates cannot be combined with prefix_logprobs",
        ),
        ({"num_beams": 2}, "num_candidates cannot be combined with num_beams = 2"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_weighed_is_refused_before_a_model_runs(
    options: dict[str, Any], message: str
) -> None:
    def never(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a model ran")

    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        generate(Ensemble([never] * 3), **{**tree_options(2), "num_candidates": 2, **options})
    assert torch.rand(()) == expected


def test_a_registered_divergence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mod_fused import divergence as module

    class Own(module.Divergence):
        name, bounded = "own", True
        deficit, log_ratio = module.ForwardKL.deficit, module.ForwardKL.log_ratio
        log_slope = module.ForwardKL.log_slope

    for table in ("_CANONICAL", "_NUMBERED", "_NUMBERS"):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    own = module.register_divergence(Own())
    with pytest.raises(ValueError, match="built-in divergences only, got own"):
        generate(tree_models(), **tree_options(2, divergence=own, num_candidates=2))
    assert get_divergence("own") is own
