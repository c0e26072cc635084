"""Weights for the worst of several values: grids, closed forms, and `generate` by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from cases import normal

from mod_fused import Ensemble, generate, guidance, reference
from mod_fused.guidance import WorstCaseWeights, robust, worst_case, worst_case_weights

IDS = torch.tensor([[3, 4, 9], [7, 2, 5]])


def problem(seed: int, count: int, rows: int = 6, vocab: int = 50) -> tuple[Any, Any]:
    log_p = (2.0 * normal(seed, rows, vocab).double()).log_softmax(1)
    return log_p, normal(seed + 1, count, rows, vocab).double()


def dual(log_p: np.ndarray, values: np.ndarray, beta: float, weights: np.ndarray) -> np.ndarray:
    """F(w) [N] of one row, log_p [V] and values [J, V], at weights [N, J]."""
    x = log_p + beta * weights @ values
    peak = x.max(1)
    return peak + np.log(np.exp(x - peak[:, None]).sum(1))


def tilted(log_p: np.ndarray, values: np.ndarray, beta: float, weights: np.ndarray) -> np.ndarray:
    """pi_w [V] of one row."""
    x = log_p + beta * weights @ values
    pi = np.exp(x - x.max())
    return pi / pi.sum()


def by_bisection(log_p: np.ndarray, values: np.ndarray, beta: float) -> np.ndarray:
    """The weights [2] of two values: F' along the edge changes its sign at the optimum."""
    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        pi = tilted(log_p, values, beta, np.array([t, 1.0 - t]))
        slope = pi @ (values[0] - values[1])
        low, high = (t, high) if slope < 0 else (low, t)
    return np.array([(low + high) / 2, 1.0 - (low + high) / 2])


def grid(count: int, points: int) -> np.ndarray:
    """A grid on the simplex, [N, J]."""
    axes = np.meshgrid(*[np.linspace(0, 1, points)] * (count - 1), indexing="ij")
    most = np.stack([a.ravel() for a in axes], 1)
    rest = 1.0 - most.sum(1, keepdims=True)
    return np.hstack([most, rest])[rest[:, 0] > -1e-9]


@pytest.mark.parametrize(("count", "points"), [(2, 2001), (3, 101), (4, 21)])
@pytest.mark.parametrize("beta", [0.3, 3.0, 30.0])
def test_no_weights_of_a_grid_are_better(count: int, points: int, beta: float) -> None:
    log_p, values = problem(10 * count, count)
    weights, gap = worst_case_weights(log_p, values, beta)
    assert (weights >= 0).all() and (gap <= 1e-10).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    inside = 0
    for row in range(6):
        of_row = (log_p[row].numpy(), values[:, row].numpy(), beta)
        found = dual(*of_row, weights[row : row + 1].numpy())[0]
        others = dual(*of_row, grid(count, points))
        assert found <= others.min() + 1e-10
        assert others.min() <= found + 20 * beta / points  # the grid comes near it
        inside += int(weights[row].min() > 0)
    assert inside or beta < 1.0  # not all optima are corners
    if count == 2:
        for row in range(6):
            exact = by_bisection(log_p[row].numpy(), values[:, row].numpy(), beta)
            np.testing.assert_allclose(weights[row], exact, atol=1e-4)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_the_worst_expected_value_equals_the_dual(count: int, beta: float) -> None:
    log_p, values = problem(100 + count, count)
    weights, gap = worst_case_weights(log_p, values, beta)
    random = np.random.default_rng(0)
    for row in range(6):
        lp, v = log_p[row].numpy(), values[:, row].numpy()
        pi = tilted(lp, v, beta, weights[row].numpy())

        def objective(pi: np.ndarray, lp: np.ndarray = lp, v: np.ndarray = v) -> float:
            used = pi > 0
            kl = float(pi[used] @ (np.log(pi[used]) - lp[used]))
            return float((v @ pi).min()) - kl / beta

        best = dual(lp, v, beta, weights[row : row + 1].numpy())[0] / beta
        assert abs(objective(pi) - best) <= float(gap[row]) / beta + 1e-9
        for _ in range(20):  # no other distribution does better
            other = pi * np.exp(0.1 * random.normal(size=len(pi)))
            assert objective(other / other.sum()) <= best + 1e-12
        other = tilted(lp, v, beta, random.dirichlet(np.ones(count)))
        assert objective(other) <= best + 1e-12


def test_the_gap_bounds_the_distance_from_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p, values = problem(7, 3, rows=40)
    exact, _ = worst_case_weights(log_p, values, 5.0)
    monkeypatch.setattr(worst_case, "_GAP", 0.05)
    weights, gap = worst_case_weights(log_p, values, 5.0)
    rough = 0
    for row in range(40):
        lp, v = log_p[row].numpy(), values[:, row].numpy()
        pi, best = (tilted(lp, v, 5.0, w[row].numpy()) for w in (weights, exact))
        kl = float(pi @ np.log(pi / best))
        assert kl <= float(gap[row]) + 1e-9
        rough += kl > 1e-6
    assert rough > 5


def test_closed_forms() -> None:
    log_p, values = problem(3, 1)
    one = worst_case_weights(log_p, values, 4.0)
    assert (one.weights == 1).all() and (one.gap == 0).all()
    worse = worst_case_weights(log_p, torch.cat([values + 0.5, values, values + 2.0]), 4.0)
    expected = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(6, 3)
    torch.testing.assert_close(worse.weights, expected, atol=1e-9, rtol=0)
    twice = worst_case_weights(log_p, torch.cat([values, values]), 4.0)
    assert (twice.gap <= 1e-10).all()
    flat = torch.zeros(1, 7, dtype=torch.float64)
    slope = torch.linspace(-1, 1, 7, dtype=torch.float64)[None, None]
    mirrored = worst_case_weights(flat, torch.cat([slope, -slope]), 9.0)
    torch.testing.assert_close(mirrored.weights, torch.full_like(mirrored.weights, 0.5))
    # Two tokens, V = (1, 0) and (0, 2): w balances the two expectations, pi_1 = 2 pi_2.
    p = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    two = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    weights, _ = worst_case_weights(p.log(), two, 10.0)
    share = (np.log(2) - np.log(0.3 / 0.7) + 20.0) / 30.0  # w_1, from log pi_1 / pi_2 = log 2
    torch.testing.assert_close(float(weights[0, 0]), share)


@pytest.mark.parametrize("beta", [100.0, 1000.0])
def test_the_largest_strengths_are_solved_too(beta: float) -> None:
    log_p = (5.0 * normal(1, 60, 40).double()).log_softmax(1)
    values = normal(2, 4, 60, 40).double() + 1000.0
    span = values.amax((0, 2)) - values.amin((0, 2))
    _, gap = worst_case_weights(log_p, values, beta)
    assert (gap <= (1e-13 * beta * span).clamp(min=1e-10)).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    log_p, values = problem(5, 3)
    together = worst_case_weights(log_p, values, 20.0).weights
    for row in range(6):
        alone = worst_case_weights(log_p[row : row + 1], values[:, row : row + 1], 20.0).weights
        torch.testing.assert_close(alone[0], together[row], atol=1e-9, rtol=0)


def expected_steps(
    out: Any, models: list[Any], scorers: list[Any], beta: float, weights: list[float], row: int
) -> tuple[np.ndarray, np.ndarray]:
    """log pi* [T] of a response, and the weights [T, 2], by full passes in float64."""
    prompt, response = IDS[row].tolist(), out.tokens[row].tolist()
    logits = [tiny.teacher_forced(m, prompt, response).double().numpy() for m in models]
    scores = [tiny.teacher_forced(s, prompt, response).double().numpy() for s in scorers]
    drawn, chosen = [], []
    for step, token in enumerate(response):
        if len(models) > 1:
            log_p = reference.log_probs_row(
                logits[0][step], [x[step] for x in logits[1:]], weights=weights
            )
        else:
            log_p = reference.log_softmax(logits[0][step])
        values = np.stack([s[step] for s in scores])
        w = by_bisection(log_p, values, beta)
        drawn.append(np.log(tilted(log_p, values, beta, w)[token]))
        chosen.append(w)
    return np.array(drawn), np.array(chosen)


@pytest.mark.parametrize("weights", [[], [0.6, 0.7]], ids=["reference", "mixture"])
def test_generate_draws_from_the_robust_distribution_of_each_step(weights: list[float]) -> None:
    models = [tiny.llama(0, eos=None), tiny.gpt2(1, eos=None), tiny.llama(2, eos=None)]
    models = models[: 1 + len(weights)]
    scorers, beta = [tiny.gpt2(3, eos=None), tiny.llama(4, eos=None)], 0.8
    seen: list[Any] = []
    out = generate(
        Ensemble(models),
        input_ids=IDS,
        weights=weights,
        max_new_tokens=6,
        seed=1,
        **robust(scorers, beta, observer=lambda *found: seen.append(found)),
    )
    assert len(seen) == 6 and all((gap <= 1e-10).all() for _, gap in seen)
    for row in range(2):
        drawn, chosen = expected_steps(out, models, scorers, beta, weights, row)
        np.testing.assert_allclose(out.logprobs[row], drawn, atol=1e-4)
        np.testing.assert_allclose(np.stack([w[row] for w, _ in seen]), chosen, atol=1e-4)
    assert len({tuple(w[0].tolist()) for w, _ in seen}) > 4  # they differ from step to step


def test_candidates_are_weighed_among_themselves() -> None:
    model, scorers, beta = tiny.llama(0, eos=None), [tiny.llama_value(3), tiny.gpt2_value(4)], 2.0
    seen: list[Any] = []
    out = generate(
        Ensemble([model]),
        input_ids=IDS,
        weights=[],
        max_new_tokens=1,
        seed=1,
        **robust(scorers, beta, candidates=5, observer=lambda *found: seen.append(found)),
    )
    for row in range(2):
        prompt = IDS[row].tolist()
        logits = tiny.teacher_forced(model, prompt, [0])[0]
        top = logits.topk(5).indices
        values = []
        for scorer in scorers:
            read = torch.tensor([[*prompt, int(token)] for token in top])
            with torch.no_grad():
                values.append(scorer(input_ids=read, use_cache=False).logits[:, -1, 0])
        lp = logits[top].double().log_softmax(0).numpy()
        v = torch.stack(values).double().numpy()
        w = by_bisection(lp, v, beta)
        np.testing.assert_allclose(seen[0][0][row], w, atol=1e-4)
        place = top.tolist().index(int(out.tokens[row, 0]))
        np.testing.assert_allclose(
            out.logprobs[row, 0], np.log(tilted(lp, v, beta, w)[place]), atol=1e-4
        )


def test_it_serves_beams_several_responses_and_blocks() -> None:
    models = Ensemble([tiny.llama(0, eos=None)], tiny.tokenizer(eos_token=None))
    guide = robust([tiny.gpt2(3, eos=None), tiny.llama(4, eos=None)], 0.8)
    options: dict[str, Any] = {"input_ids": IDS, "weights": [], "max_new_tokens": 4, **guide}
    greedy = generate(models, do_sample=False, **options)
    beams = generate(models, num_beams=3, **options)
    assert (beams.sequences_scores * 4 >= greedy.logprobs.sum(1) - 1e-4).all()
    several = generate(models, num_return_sequences=2, seed=[5, 6], **options)
    alone = generate(models, seed=[5, 6], **options)
    assert torch.equal(several.tokens[::2], alone.tokens)
    best = guidance.best_of_n(models, score_fn=tiny.taste, n=2, seed=[5, 6], **options)
    assert best.valid.all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["values", "logits"])
def test_an_excluded_token_stays_excluded_and_a_broken_row_is_invalid(
    broken: float, where: str
) -> None:
    # The second value is the worst, whatever is drawn: the first excludes a token at weight 0.
    table = torch.tensor([[[-torch.inf, 3.0, 4.0]], [[0.0, 1.0, 1.5]]])

    def values(step: int, sequences: torch.Tensor) -> torch.Tensor:
        given = table.expand(2, len(sequences), 3).clone()
        if where == "values":
            given[1, 1, 2] = broken
        return given

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        given = torch.tensor([5.0, 0.0, 0.0]).repeat(len(tokens), 1)
        if where == "logits":
            given[1, 2] = broken
        return given

    out = generate(
        Ensemble([logits]),
        input_ids=torch.tensor([[1], [2]]),
        weights=[],
        max_new_tokens=30,
        seed=3,
        value_fn=values,
        value_weights=WorstCaseWeights(2.0),
    )
    assert out.valid.tolist() == [True, False]
    tokens = out.tokens[0].tolist()
    assert set(tokens) == {1, 2}
    expected = torch.tensor([0.0, 1.0]).log_softmax(0)[torch.tensor(tokens) - 1]
    torch.testing.assert_close(out.logprobs[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5", "jeffrey"])
def test_other_divergences_are_refused(divergence: str) -> None:
    models = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    guide = robust([tiny.bigram(2), tiny.bigram(3)], 1.0)
    with pytest.raises(ValueError, match="reverse_kl, got"):
        generate(models, input_ids=IDS, weights=[0.5], divergence=divergence, **guide)


def test_what_does_not_fit_is_refused() -> None:
    log_p, values = problem(0, 2)
    for strength in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive number"):
            worst_case_weights(log_p, values, strength)
        with pytest.raises(ValueError, match="positive number"):
            robust([tiny.bigram(2)], strength)
    with pytest.raises(TypeError, match="strength must be a number"):
        WorstCaseWeights("much")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="observer"):
        WorstCaseWeights(1.0, observer=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="J from 1 to 8"):
        worst_case_weights(log_p, torch.cat([values] * 5), 1.0)
    with pytest.raises(ValueError, match="log_p must have shape"):
        worst_case_weights(log_p[:, 1:], values, 1.0)
    with pytest.raises(TypeError, match="log_p must be"):
        worst_case_weights(log_p.long(), values, 1.0)
    models = Ensemble([tiny.bigram(0)])
    with pytest.raises(ValueError, match="at most 8 values"):
        generate(models, input_ids=IDS, weights=[], **robust([tiny.bigram(2)] * 9, 1.0))
    with pytest.raises(ValueError, match="without value_fn"):
        generate(models, input_ids=IDS, weights=[], value_weights=WorstCaseWeights(1.0))
