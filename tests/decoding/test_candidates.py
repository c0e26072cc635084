"""Sequential Monte Carlo and values: draws from the optimum over whole responses."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_models as tiny
import torch
import whole_answers as tree
from cases import DIVERGENCES
from scipy import stats
from whole_answers import TABLES, TREE, brute_force, proposal

from mod_fused import Ensemble, GenerateOutput, generate
from mod_fused.decoding import steps
from mod_fused.decoding.totals import Totals
from mod_fused.guidance import Guidance, pad, prefix_score

W = np.array(tree.W)


class Particle(NamedTuple):
    """A candidate in the enumeration."""

    answer: tuple[int, ...]
    node: int  # -1: ended
    log_models: tuple[float, ...]
    log_q: float  # corrected by its resamplings
    tilt: float


def weights_of(divergence: str, w: np.ndarray, pair: tuple[Particle, ...]) -> np.ndarray:
    logs = np.array([x.log_models for x in pair])
    log_q, tilt = (np.array([getattr(x, name) for x in pair]) for name in ("log_q", "tilt"))
    return brute_force(divergence, w, logs, log_q, tilt)[0]


def continuations(x: Particle, log_q: np.ndarray, v: np.ndarray) -> list[Particle]:
    """What a candidate may be after one more token."""
    if x.node < 0:
        return [x]
    found = []
    for z in np.flatnonzero(log_q[x.node] > -np.inf):
        log_models = [float(a + t[x.node, z]) for a, t in zip(x.log_models, TABLES, strict=False)]
        tilt = float(v @ tree.SCORES[:, x.node, z].numpy())
        drawn = x.log_q + float(log_q[x.node, z])
        node = int(TREE.child[x.node, z])
        found.append(Particle((*x.answer, int(z)), node, tuple(log_models), drawn, tilt))
    return found


def resampled(pair: tuple[Particle, ...], weights: np.ndarray) -> list[tuple[Any, float]]:
    """The pairs that systematic resampling makes of one, and their probabilities."""
    a, b = (
        x._replace(log_q=x.log_q + math.log(2.0 * w)) for x, w in zip(pair, weights, strict=True)
    )
    heavier = a if weights[0] >= 0.5 else b
    twice = 2.0 * weights.max() - 1.0
    return [((heavier, heavier), twice), ((a, b), 1.0 - twice)]


def enumerated(
    divergence: str, w: np.ndarray, threshold: float, log_q: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, float]:
    """The probability [answers] with which an answer is returned of two candidates, and how often
    they are resampled in the mean."""
    index = {
        tuple(y[: int(n)].tolist()): i
        for i, (y, n) in enumerate(zip(TREE.tokens, TREE.mask.sum(1), strict=True))
    }
    start = Particle((), 0, (0.0,) * (len(w) + 1), 0.0, 0.0)
    pairs, times = {(start, start): 1.0}, 0.0
    for step in range(3):
        after: dict[Any, float] = {}
        for pair, mass in pairs.items():
            for new in itertools.product(*(continuations(x, log_q, v) for x in pair)):
                q = mass * math.exp(
                    sum(float(log_q[x.node, y.answer[-1]]) for x, y in zip(pair, new, strict=True)
                        if x.node >= 0)
                )  # fmt: skip
                weights = weights_of(divergence, w, new)
                size = 1.0 / (weights**2).sum()
                # Else rounding decides; of equal weights resampling changes nothing.
                assert threshold == 1.0 or abs(size - 2.0 * threshold) > 1e-5
                going = step < 2 and any(x.node >= 0 for x in new)
                outcomes = [(new, 1.0)]
                if going and size < 2.0 * threshold - 1e-5:
                    outcomes, times = resampled(new, weights), times + q
                for made, p in outcomes:
                    after[made] = after.get(made, 0.0) + q * p
        pairs = after
    expected = np.zeros(len(index))
    for pair, mass in pairs.items():
        weights = weights_of(divergence, w, pair)
        np.add.at(expected, [index[x.answer] for x in pair], mass * weights)
    return expected, times


def run(prompts: int, values: str = "none", **options: Any) -> GenerateOutput:
    if values != "none":
        options = {"value_fn": tree.VALUES[values], "value_weights": tree.V, **options}
    return generate(tree.tree_models(), **tree.tree_options(prompts, **options))


@pytest.mark.parametrize("threshold", [0.0, 0.93, 1.0])
@pytest.mark.parametrize("values", ["none", "all", "pairs"])
@pytest.mark.parametrize(
    ("divergence", "filters"),
    [
        ("reverse_kl", {"temperature": 1.6}),
        ("jsd", {"temperature": 1.8}),
        ("forward_kl", {"temperature": 2.0, "min_p": 0.1}),
    ],
)
def test_the_answer_drawn_from_two_candidates_has_the_distribution_of_all_pairs(
    divergence: str, filters: dict[str, Any], values: str, threshold: float
) -> None:
    # The false-alarm rate is 1e-6 a case.
    log_q = proposal(divergence, values, **filters)
    v = np.array(tree.V if values != "none" else [0.0, 0.0])
    expected, times = enumerated(divergence, W, threshold, log_q, v)
    assert expected.sum() == pytest.approx(1.0, abs=1e-9)
    assert (times > 0.2) == (threshold > 0.0)
    options = {"divergence": divergence, "num_candidates": 2, "resample_below": threshold}
    out = run(8000, values, seed=11, **options, **filters)
    resamplings = out.resamplings.double()
    assert abs(resamplings.mean() - times) <= 5.0 * resamplings.std() / math.sqrt(8000)
    counts = tree.answers_drawn(out)
    at = expected > 0
    assert not counts[~at].any()
    assert stats.chisquare(counts[at], 8000 * expected[at]).pvalue > 1e-6


def target(divergence: str, **filters: Any) -> np.ndarray:
    """The optimum [answers] over whole answers with values, among those that can be drawn."""
    reached = tree.of_answers(proposal(divergence, "all", **filters)) > -np.inf
    logs, tilt = tree.log_answers()[reached], tree.tilts()[reached]
    # All answers are given once, as if drawn with equal probability from as many.
    even = np.full(len(logs), -math.log(len(logs)))
    p = np.zeros(len(reached))
    p[reached] = brute_force(divergence, W, logs, even, tilt)[0]
    return p


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_many_resampled_candidates_come_near_the_optimum_over_whole_answers(
    divergence: str,
) -> None:
    options = {"num_return_sequences": 20, "resample_below": 0.9, "temperature": 2.0, "seed": 2}
    far = []
    for count in (1, 200):
        out = run(80, "all", divergence=divergence, num_candidates=count, **options)
        counts = tree.answers_drawn(out) / 1600
        far.append(0.5 * np.abs(counts - target(divergence, temperature=2.0)).sum())
    assert out.resamplings.double().mean() > 0.5
    # Of 1600 draws from the optimum itself far would be about 0.03.
    assert far[0] > 0.1 and far[1] < 0.06


@pytest.mark.parametrize("values", ["none", "all", "pairs"])
def test_the_normaliser_of_reverse_kl_has_the_right_mean_however_often_resampled(
    values: str,
) -> None:
    # The mean of 6000 estimates is within 5 of its errors: the false-alarm rate is 6e-7.
    filters = {"temperature": 1.5}
    reached = tree.of_answers(proposal("reverse_kl", values, **filters)) > -np.inf
    log_mass = tree.log_answers() @ np.array([1.0 - W.sum(), *W])
    mass = np.exp(log_mass + (tree.tilts() if values != "none" else 0.0))[reached].sum()
    out = run(6000, values, num_candidates=3, resample_below=1.0, seed=4, **filters)
    assert out.resamplings.max() == 2
    means = out.log_normalizer.exp().numpy()
    assert abs(means.mean() - mass) < 5 * means.std() / math.sqrt(6000)
    assert means.std() / math.sqrt(6000) < 0.01 * mass


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_without_policies_values_alone_make_the_target(divergence: str) -> None:
    # The false-alarm rate is 1e-6 a case.
    log_q = proposal(divergence, "all", weights=[], temperature=1.5)
    expected, times = enumerated(divergence, np.array([]), 0.93, log_q, np.array(tree.V))
    assert times > 0.2
    reference = Ensemble([tree.tree_models().models[0]])
    options = tree.tree_options(8000, value_fn=tree.scores, value_weights=tree.V, seed=8)
    options |= {"weights": [], "num_candidates": 2, "resample_below": 0.93, "temperature": 1.5}
    out = generate(reference, **options, divergence=divergence)
    assert stats.chisquare(tree.answers_drawn(out), 8000 * expected).pvalue > 1e-6


# --- real models ----------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "weights": [0.6, 0.7],
    "max_new_tokens": 8,
    "temperature": 1.6,
    "eos_token_id": [2, 5, 9, 11, 13],
    "num_candidates": 5,
    "num_return_sequences": 5,
    "seed": [5, 6, 7],
}


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_threshold_that_is_never_reached_changes_nothing(
    divergence: str,
) -> None:
    models = tiny.three_models()
    plain = generate(models, tiny.PROMPTS, divergence=divergence, **RUN)
    for threshold in (0, 0.0, 0.2):  # the effective sample size of 5 is 1 at least
        out = generate(models, tiny.PROMPTS, divergence=divergence, resample_below=threshold, **RUN)
        for name in ("tokens", "lengths", "logprobs", "seeds", "weights", "log_normalizer"):
            assert torch.equal(getattr(out, name), getattr(plain, name))
        assert torch.equal(out.resamplings, torch.zeros(3, dtype=torch.int64))
    out = generate(models, tiny.PROMPTS, divergence=divergence, resample_below=1, **RUN)
    assert out.resamplings.gt(1).all() and not torch.equal(out.tokens, plain.tokens)


@pytest.mark.parametrize("guided", [False, True])
def test_a_row_depends_on_its_own_prompt_and_seed_alone(guided: bool) -> None:
    models = tiny.three_models()
    options = {**RUN, "resample_below": 0.9}
    if guided:
        guide = Guidance([tiny.llama_value(3), tiny.gpt2(4, eos=None)], candidates=6)
        options |= {"value_fn": guide, "value_weights": [[0.9, 0.2], [-0.5, 0.3], [0.0, 0.6]]}
    out = generate(models, tiny.PROMPTS, **options)
    recomputed = generate(models, tiny.PROMPTS, use_cache=False, **options)
    assert torch.equal(recomputed.tokens, out.tokens)
    # Some prompt ends before the others do, and is then left as it is.
    ends = out.lengths.view(3, 5).amax(1)
    assert ends.min() < ends.max() and out.resamplings.gt(0).all()
    for row, prompt in enumerate(tiny.PROMPTS):
        own = {**options, "seed": [RUN["seed"][row]]}
        if guided:
            own["value_weights"] = options["value_weights"][row]
        alone = generate(models, prompt, **own)
        places = slice(5 * row, 5 * row + 5)
        width = alone.tokens.shape[1]
        assert torch.equal(alone.tokens, out.tokens[places, :width])
        assert torch.equal(alone.seeds, out.seeds[places])
        assert alone.resamplings[0] == out.resamplings[row]
        torch.testing.assert_close(alone.weights[0], out.weights[row], atol=1e-4, rtol=0)


def test_the_value_of_a_response_is_what_its_scorers_say_of_it() -> None:
    scorers = [tiny.gpt2(4, eos=None), tiny.llama_value(3)]
    v = [0.7, -0.4]
    options: dict[str, Any] = {
        "weights": [0.6, 0.7],
        "value_fn": Guidance(scorers, candidates=9),
        "value_weights": v,
        "max_new_tokens": 6,
        "eos_token_id": [2, 5, 9],
        "seed": [5, 6, 7],
    }
    models = tiny.three_models()
    pool = generate(
        models, tiny.PROMPTS, num_return_sequences=4, return_model_logprobs=True, **options
    )
    scores = prefix_score(scorers, v)(pool.sequences, pool.attention_mask)
    logs = pool.model_logprobs.double().sum(1) @ torch.tensor([-0.3, 0.6, 0.7]).double()
    log_w = (logs + scores - pool.logprobs.double().sum(1)).view(3, 4)
    out = generate(models, tiny.PROMPTS, num_candidates=4, **options)
    assert len(set(pool.lengths.tolist())) > 1
    torch.testing.assert_close(out.weights, log_w.softmax(1), atol=1e-4, rtol=1e-4)
    mean = log_w.logsumexp(1) - math.log(4)
    torch.testing.assert_close(out.log_normalizer, mean, atol=1e-4, rtol=1e-4)


def test_invalid_candidates_are_dropped_and_count_in_the_normaliser() -> None:
    # Behind a 2 nothing is allowed: such answers cannot be drawn. The false-alarm rate is 6e-7.
    def mask_fn(step: int, sequences: torch.Tensor) -> torch.Tensor:
        return (sequences[:, -1:] != 2).expand(-1, 3).contiguous()

    out = run(4000, num_candidates=4, num_return_sequences=3, resample_below=1.0, mask_fn=mask_fn,
              seed=6)  # fmt: skip
    none = out.weights.isnan().any(1)
    assert none.any() and torch.equal(out.valid, ~none.repeat_interleave(3))
    assert not out.tokens[out.valid, :2].eq(2).any()
    reached = ~(TREE.tokens[:, :2] == 2).any(1).numpy()
    mass = np.exp(tree.log_answers() @ np.array([1.0 - W.sum(), *W]))[reached].sum()
    means = out.log_normalizer.exp().nan_to_num(0.0).numpy()
    assert abs(means.mean() - mass) < 5 * means.std() / math.sqrt(4000)


def test_resampling_replaces_invalid_candidates() -> None:
    def mask_fn(step: int, sequences: torch.Tensor) -> torch.Tensor:
        allowed = torch.ones(len(sequences), 3, dtype=torch.bool)
        allowed[::4] = step != 1  # candidate 0 of each prompt is invalid at its second token
        return allowed

    options = {"num_candidates": 4, "mask_fn": mask_fn, "eos_token_id": [], "seed": 6}
    assert run(50, **options).weights[:, 0].eq(0).all()
    out = run(50, resample_below=0.8, **options)
    assert out.resamplings.gt(0).all() and out.weights.gt(0).all()


# --- a resample_fn of the caller's own ------------------------------------------------------------


class Recorder:
    """Reverses the rows once, and keeps what it was given."""

    def __init__(self) -> None:
        self.totals: list[Totals] = []
        self.lengths: list[torch.Tensor] = []

    def resample(
        self,
        step: int,
        sequences: torch.Tensor,
        lengths: torch.Tensor,
        reasons: torch.Tensor,
        totals: Totals,
    ) -> torch.Tensor | None:
        self.totals.append(totals)
        self.lengths.append(lengths)
        return torch.arange(len(lengths) - 1, -1, -1) if step == 2 else None


@pytest.mark.parametrize("values", ["none", "all", "pairs"])
def test_a_resampler_gets_the_sums_of_the_rows_that_it_chose(values: str) -> None:
    recorder, filters = Recorder(), {"temperature": 1.4}
    options: dict[str, Any] = {"resample_fn": recorder, "return_model_logprobs": True, "seed": 3}
    out = run(300, values, max_new_tokens=4, **options, **filters)
    assert len(recorder.totals) == 4 and set(out.lengths.tolist()) == {1, 2, 3, 4}
    last = recorder.totals[-1]
    for x in last[:2]:
        assert x.dtype == torch.float64
    torch.testing.assert_close(last.models, out.model_logprobs.double().sum(1))
    # In the tree, where ended rows stay, by the oracle: after three tokens, before the reversal.
    whole = recorder.totals[2]
    log_q = tree.of_answers(proposal("reverse_kl", values, **filters))
    tokens = out.tokens.flip(0)[:, :3]
    same = (tokens[:, None] == TREE.tokens[None]).all(2).byte().argmax(1).numpy()
    np.testing.assert_allclose(whole.proposal.numpy(), log_q[same], atol=1e-5)
    if values == "none":
        assert whole.values is None
    else:
        tilt = whole.values @ torch.tensor(tree.V).double()
        np.testing.assert_allclose(tilt.numpy(), tree.tilts()[same], atol=1e-6)
        assert last.values.shape == (300, 2)


def test_a_plain_function_does_not_pay_for_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    sample = steps.sample

    def watched(*args: Any, **options: Any) -> Any:
        asked.append((options["return_model_logprobs"], options["return_proposal_logprobs"]))
        return sample(*args, **options)

    monkeypatch.setattr(steps, "sample", watched)
    run(2, resample_fn=lambda step, sequences, lengths, reasons: None, seed=1)
    assert set(asked) == {(False, False)}
    run(2, resample_fn=Recorder(), seed=1)
    assert asked[-1] == (True, True)


def test_what_is_no_resample_fn_is_refused_before_a_model_runs() -> None:
    def never(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a model ran")

    options = tree.tree_options(2)
    with pytest.raises(TypeError, match=r"resample_fn must be a function \(step.*got int"):
        generate(Ensemble([never] * 3), resample_fn=3, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="resample_below must be a number, got bool"):
        generate(Ensemble([never] * 3), num_candidates=2, resample_below=True, **options)
    with pytest.raises(ValueError, match="num_candidates cannot be combined with resample_fn"):
        generate(Ensemble([never] * 3), num_candidates=2, resample_fn=Recorder(), **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5", "jeffrey", "reverse_kl"])
def test_equal_responses_weigh_the_same(divergence: str) -> None:
    """Scorers' last bits differ from row to row, and near the pole of (f')^-1 they would show."""
    guide = Guidance([tiny.llama_value(3), tiny.gpt2(4, eos=None)], candidates=6)
    for prompt in tiny.PROMPTS:
        out = generate(
            tiny.three_models(), prompt, weights=[0.5, 0.4], divergence=divergence, value_fn=guide,
            top_k=1, num_candidates=5, seed=1, max_new_tokens=8,
        )  # fmt: skip
        torch.testing.assert_close(
            out.weights, torch.full_like(out.weights, 0.2), atol=1e-9, rtol=0
        )


def test_values_of_single_tokens_are_refused() -> None:
    models = [tiny.llama(1, eos=None), tiny.llama(2, eos=None)]
    rewards = pad(models[:1], models[1], [1.0], beta=1.0)
    with pytest.raises(ValueError, match="needs values of prefixes, got values of single tokens"):
        generate(tiny.three_models(), "it", weights=[0.5, 0.4], num_candidates=2, **rewards)
