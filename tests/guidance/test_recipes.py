"""The published systems, written out; MAVIS's iterations, exactly on a tree and on models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_models as tiny
import torch
from cases import total_variation
from tabular import Tree

import mod_fused
from mod_fused import Ensemble, generate
from mod_fused.guidance import (
    args,
    controlled_decoding,
    fudge,
    mavis,
    pad,
    rad,
    soft_values,
    train_mavis,
    train_scorer,
)
from mod_fused.training import losses, policy_iteration

BETA = 4.0


def restricted(tree: Tree, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's k most likely tokens [n, k], and the mask [n, V] of them."""
    ids = tree.ref.topk(k).indices
    return ids, torch.zeros_like(tree.ref, dtype=torch.bool).scatter(1, ids, True)


def value_of(tree: Tree, policy: torch.Tensor, zeta: float = BETA) -> torch.Tensor:
    """Q [n, V] as the loss gives it: the mean of `kl_returns` over all responses of the policy."""
    weights = tree.mask * tree.logprobs(policy).exp()[:, None]
    log_ratios = (policy - tree.ref)[tree.nodes, tree.tokens]
    returns = losses.kl_returns(tree.response_rewards, log_ratios, tree.mask, zeta)
    counted = torch.where(weights > 0, weights * returns, 0.0)
    place = tree.nodes, tree.tokens
    total = torch.zeros_like(tree.ref).index_put(place, counted, accumulate=True)
    visits = torch.zeros_like(tree.ref).index_put(place, weights, accumulate=True)
    return torch.where(visits > 0, total / visits, 0.0)


@pytest.mark.parametrize("candidates", [None, 3])
def test_iterations_never_lower_the_objective_and_reach_the_optimum(candidates: int | None) -> None:
    """pi_ref exp(beta Q) of the op, evaluated exactly. Each iteration settles one level more."""
    tree = Tree()
    keep = torch.ones_like(tree.ref, dtype=torch.bool)
    options: dict[str, Any] = {}
    if candidates is not None:
        ids, keep = restricted(tree, candidates)
        options["value_ids"] = ids
    policy = torch.where(keep, tree.ref, -torch.inf).log_softmax(-1)
    objectives = [tree.objective(policy, BETA)]
    for _ in range(4):
        q = value_of(tree, policy)
        values = q if candidates is None else q.gather(1, ids)
        policy = mod_fused.log_probs(
            tree.ref.float(), [], [], values=values.float()[None], value_weights=[BETA], **options
        ).double()
        objectives.append(tree.objective(policy, BETA))
    steps = torch.tensor(objectives).diff()
    assert steps.min() > -1e-6
    assert steps[:2].min() > 1e-4 and objectives[-1] > objectives[0] + 0.05
    # The best policy over the kept tokens: 1/beta log E_ref[exp(beta r)] over their responses.
    allowed = torch.where(tree.mask > 0, keep[tree.nodes, tree.tokens], True).all(1)
    tilted = tree.logprobs(tree.ref) + BETA * tree.response_rewards
    tilted = torch.where(allowed, tilted, -torch.inf)
    assert abs(objectives[-1] - float(torch.logsumexp(tilted, 0)) / BETA) < 1e-5
    assert total_variation(tree.logprobs(policy), tilted.log_softmax(0)) < 5e-5


@pytest.mark.parametrize("zeta", [1.5, BETA, 40.0, math.inf])
def test_zeta_is_the_kl_weight_of_the_value_and_beta_that_of_the_tilt(zeta: float) -> None:
    """Iterated on the exact tree: V of a prefix is E[r - KL / zeta] under pi_ref exp(beta V) after
    it. The policy is best for J at zeta = beta alone."""
    tree = Tree()
    policy = tree.ref
    for _ in range(4):
        q = value_of(tree, policy, zeta)
        torch.testing.assert_close(
            q[policy.exp().sum(1) > 0], tree.q(policy, zeta)[policy.exp().sum(1) > 0],
            atol=1e-9, rtol=0,
        )  # fmt: skip
        policy = (tree.ref + BETA * q).log_softmax(-1)

    def level(node: int, q: torch.Tensor) -> torch.Tensor:
        pi = (tree.ref[node] + BETA * q).log_softmax(-1)
        return (pi.exp() * (q - (pi - tree.ref[node]) / zeta)).sum()

    torch.testing.assert_close(value_of(tree, policy, zeta), tree.up(level), atol=1e-9, rtol=0)
    best = (tree.ref + BETA * tree.soft_q(BETA)).log_softmax(-1)
    lost = tree.objective(best, BETA) - tree.objective(policy, BETA)
    assert lost < 1e-12 if zeta == BETA else lost > 1e-4


def short_words(prompt: str, response: str) -> float:
    """The share of words of at most three letters."""
    words = response.split()
    return sum(len(word) <= 3 for word in words) / max(1, len(words))


@pytest.mark.parametrize("scalar", [False, True])
def test_training_raises_the_objective_of_real_models(scalar: bool) -> None:
    """The gain is 6 standard errors at least: without one, a chance of 1e-9."""
    iterations = 1 if scalar else 2
    scorer = tiny.llama_value(1) if scalar else tiny.llama(1)
    with torch.no_grad():
        (scorer.score.weight if scalar else scorer.model.norm.weight).mul_(0.05)
    history = train_mavis(
        scorer,
        tiny.llama(0),
        tiny.tokenizer(),
        tiny.PROMPTS * 150,
        short_words,
        beta=8.0,
        iterations=iterations,
        candidates=8 if scalar else None,
        max_new_tokens=6,
        steps=60,
        peak_lr=1e-2,
        batch_size=48,
    )
    points = history.iterations
    assert len(points) == iterations + 1 and history.best == iterations
    assert history.stopped == "iterations"
    first, last = points[0], points[-1]
    assert last.objective - first.objective > 6 * math.hypot(first.error, last.error)
    assert last.reward > first.reward and last.kl > first.kl
    for point in points:
        assert math.isclose(point.objective, point.reward - point.kl / 8.0, abs_tol=1e-4)
    assert (abs(first.kl) < 1e-5) != scalar  # the first policy is the reference, or its top 8


def scored(seed: int) -> Any:
    """A dense scorer to train, and what `train_mavis` needs."""
    scorer = tiny.llama(seed)
    with torch.no_grad():
        scorer.model.norm.weight.mul_(0.05)
    return scorer, tiny.llama(0), tiny.tokenizer(), tiny.PROMPTS * 20, short_words


def test_trees_and_strengths_reach_the_drawing_and_the_fit(monkeypatch: Any) -> None:
    drawn, fitted = [], []
    fit = policy_iteration.fit_scorer

    def roll_out(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        drawn.append((options["value_weights"], len(args[1]), found[0]))
        return found

    def fit_scorer(*args: Any, **options: Any) -> Any:
        fitted.append((args[1], args[2], options))
        return fit(*args, **options)

    real = policy_iteration.roll_out
    monkeypatch.setattr(policy_iteration, "roll_out", roll_out)
    monkeypatch.setattr(policy_iteration, "fit_scorer", fit_scorer)
    history = train_mavis(
        *scored(1), beta=8.0, zeta=3.0, iterations=1, branches=3, block_length=2,
        held_out_prompts=tiny.PROMPTS * 30, max_new_tokens=6, steps=40, peak_lr=1e-2,
    )  # fmt: skip
    assert [(weights, count) for weights, count, _ in drawn] == [
        ([0.0], 60), ([0.0], 90), ([8.0], 60),
    ]  # fmt: skip
    ((rollouts, rewards, options),) = fitted
    assert options["beta"] == 3.0 and options["method"] == "mavis"
    assert len(rewards) == 60 * 9 and rollouts is drawn[0][2] and rewards.std() > 0
    assert len(options["held_out"][1]) == 90 * 9 and options["held_out"][0] is drawn[1][2]
    # J is that of beta, and its error that of the prompts: a tree's leaves are no more than one.
    last, leaves = history.iterations[1], drawn[2][2]
    kl = leaves.log_ratios.sum(1).view(60, 9).mean(1)
    assert math.isclose(last.kl, float(kl.mean()), rel_tol=1e-5)
    assert math.isclose(last.objective, last.reward - last.kl / 8.0, abs_tol=1e-5)
    texts = [tiny.tokenizer().decode(row[mask.bool()], skip_special_tokens=True)
             for row, mask in zip(leaves.ids, leaves.response_mask, strict=True)]  # fmt: skip
    worth = torch.tensor([short_words("", text) for text in texts]).view(60, 9).mean(1) - kl / 8.0
    assert math.isclose(last.error, float(worth.std()) / math.sqrt(60), rel_tol=1e-4)


def test_iterations_end_where_the_objective_no_longer_rises(monkeypatch: Any) -> None:
    """The scorer is then that of the best policy, not the last."""
    fits = []

    def fit_scorer(scorer: Any, *args: Any, **options: Any) -> None:
        """The first fit likes what is rewarded, the second the opposite."""
        fits.append(options)
        liked = [float(len(word) <= 3) for word in tiny.VOCAB]
        scorer.fill_(torch.tensor(liked) * (0.125 if len(fits) == 1 else -1.0))

    class Liking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(torch.zeros(tiny.V))

        def fill_(self, values: torch.Tensor) -> None:
            self.values.data.copy_(values)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.values.expand(len(tokens), -1)

    monkeypatch.setattr(policy_iteration, "fit_scorer", fit_scorer)
    scorer = Liking()
    _, *rest = scored(1)
    history = train_mavis(scorer, *rest, beta=8.0, iterations=5, max_new_tokens=6)
    assert history.stopped == "no rise" and history.best == 1
    assert len(history.iterations) == 3 and len(fits) == 2
    worth = [point.objective for point in history.iterations]
    assert worth[1] > worth[0] > worth[2]
    assert scorer.values.max() == 0.125  # the first fit's


def test_bad_arguments_are_refused() -> None:
    options: dict[str, Any] = {"beta": 1.0, "iterations": 1}
    for changed, message in (
        ({"beta": 0.0}, "beta must be positive and finite, got 0.0"),
        ({"beta": math.inf}, "beta must be positive and finite, got inf"),
        ({"zeta": 0.0}, "zeta must be positive, got 0.0"),
        ({"zeta": math.nan}, "zeta must be positive, got nan"),
        ({"branches": 0}, "branches and block_length must be at least 1, got 0"),
        ({"branches": 2, "block_length": 0}, "must be at least 1, got 2 and 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_mavis(
                tiny.llama(1),
                tiny.llama(0),
                tiny.tokenizer(),
                ["it"],
                short_words,
                **options | changed,
            )
    for weights in ([0.5, 0.6], [-0.5, 1.5], [[0.5, 0.5], [1.0, 1.0]], 1.0):
        with pytest.raises(ValueError, match="sums of 1"):
            mavis([tiny.bigram(0), tiny.bigram(1)], weights, beta=1.0, candidates=None)
    with pytest.raises(ValueError, match="beta must be positive, got -1"):
        mavis([tiny.bigram(0)], [1.0], beta=-1.0, candidates=None)


# The systems, each written out.

IDS = torch.tensor([[5], [9], [2]])
REF = tiny.bigram(0)
SCORES = [tiny.bigram(1), tiny.bigram(2)]


def draw(arguments: dict[str, Any]) -> Any:
    return generate(
        Ensemble([REF]), input_ids=IDS, weights=[], max_new_tokens=1, seed=0, eos_token_id=[],
        **arguments,
    )  # fmt: skip


def assert_drawn_from(out: Any, scores: torch.Tensor, k: int | None) -> None:
    ref = REF(IDS).double()
    tilted = ref + scores
    if k is not None:
        kept = torch.zeros_like(ref, dtype=torch.bool).scatter(1, ref.topk(k).indices, True)
        tilted = torch.where(kept, tilted, -torch.inf)
    expected = tilted.log_softmax(-1).gather(1, out.tokens)
    torch.testing.assert_close(out.logprobs.double(), expected, atol=1e-4, rtol=0)


def test_controlled_decoding_is_the_reference_tilted_by_all_scorers() -> None:
    strengths = [[0.5, 1.0], [-1.0, 0.0], [0.0, 3.0]]
    v = torch.tensor(strengths).double()
    scores = sum(v[:, j, None] * SCORES[j](IDS).double() for j in range(2))
    assert_drawn_from(draw(controlled_decoding(SCORES, strengths)), scores, None)
    out = draw(controlled_decoding(SCORES, strengths, candidates=4))
    assert_drawn_from(out, scores, 4)


def test_fudge_multiplies_by_the_probability_of_the_attribute() -> None:
    for strength in (1.0, 2.5):
        scores = strength * torch.log(torch.sigmoid(SCORES[0](IDS).double()))
        out = draw(fudge(SCORES[0], candidates=6, strength=strength))
        assert_drawn_from(out, scores, 6)
    # Far from the boundary the sigmoid is 0 in float32, its logarithm is not.
    out = draw(fudge(lambda tokens: torch.full((3, tiny.V), -200.0), candidates=6))
    assert_drawn_from(out, torch.zeros(3, tiny.V).double(), 6)


def test_soft_values_are_logsigmoids_of_each_scorer() -> None:
    logits = [scorer(IDS).double() for scorer in SCORES]
    values = [-torch.log1p(torch.exp(-x)) for x in logits]
    assert_drawn_from(draw(soft_values(SCORES[:1])), values[0], None)
    assert_drawn_from(draw(soft_values(SCORES, candidates=5)), values[0] + values[1], 5)
    strengths = [[0.5, 1.0], [2.0, 0.0], [0.0, 3.0]]
    v = torch.tensor(strengths).double()
    both = v[:, :1] * values[0] + v[:, 1:] * values[1]
    assert_drawn_from(draw(soft_values(SCORES, strengths)), both, None)


def test_soft_values_make_whole_responses_exact() -> None:
    """log pi* of every response that is drawn is that of ref(y) exp(beta r(y)) / Z."""
    tree, beta, highest = Tree(), 3.0, 1.25
    soft = beta * (tree.soft_q(beta) - highest)
    logits = soft - torch.log1p(-soft.exp())
    out = generate(
        Ensemble([tree.step(tree.ref)]),
        input_ids=torch.zeros(200, 1, dtype=torch.int64),
        weights=[], max_new_tokens=4, eos_token_id=0, pad_token_id=0, seed=4,
        **soft_values([tree.step(logits)]),
    )  # fmt: skip
    exact = (tree.logprobs(tree.ref) + beta * tree.response_rewards).log_softmax(0)
    row = (out.tokens[:, None] == tree.tokens).all(-1).long().argmax(1)
    assert torch.equal(tree.tokens[row], out.tokens) and len(row.unique()) > 20
    torch.testing.assert_close(out.logprobs.sum(1).double(), exact[row], atol=1e-4, rtol=0)


def test_soft_values_of_a_trained_scorer_beat_its_reference_at_j() -> None:
    """By 6 standard errors at least: without an effect, a chance of 1e-9."""
    scorer, reference, tokenizer, prompts, reward = scored(1)
    train_scorer(
        scorer, reference, tokenizer, prompts * 10, reward, method="soft", beta=8.0,
        max_new_tokens=6, steps=60, peak_lr=1e-2, batch_size=48,
    )  # fmt: skip
    rollouts, texts = policy_iteration.roll_out(
        Ensemble([reference], tokenizer), prompts * 10, weights=[], max_new_tokens=6, seed=9,
        **soft_values([scorer]),
    )  # fmt: skip
    plain, said = policy_iteration.roll_out(
        Ensemble([reference], tokenizer), prompts * 10, weights=[], max_new_tokens=6, seed=9,
        **soft_values([scorer], [0.0]),
    )  # fmt: skip
    ours = torch.tensor([reward("", text) for text in texts]) - rollouts.log_ratios.sum(1) / 8.0
    theirs = torch.tensor([reward("", text) for text in said])
    assert plain.log_ratios.abs().max() < 1e-5
    error = math.sqrt(float(ours.var() + theirs.var()) / len(ours))
    assert float(ours.mean() - theirs.mean()) > 6 * error


def test_args_and_rad_add_a_reward_to_the_top_tokens() -> None:
    rewards = SCORES[0](IDS).double()
    assert_drawn_from(draw(args(SCORES[0], weight=1.5)), 1.5 * rewards, 10)
    assert_drawn_from(draw(rad(SCORES[0], beta=8.0)), 8.0 * rewards.clamp(0.0, 1.0), 20)
    top = REF(IDS).topk(10).indices
    best = (REF(IDS) + 1.5 * rewards).gather(1, top).argmax(1, keepdim=True)
    greedy = draw(args(SCORES[0], weight=1.5) | {"do_sample": False})
    assert torch.equal(greedy.tokens, top.gather(1, best))


def test_pad_adds_the_log_ratios_of_reward_models_to_the_top_tokens() -> None:
    models = [lambda ids, k=k: tiny.bigram(k)(ids) + 3.0 * k for k in (1, 2)]
    log_ratios = [(SCORES[k](IDS).log_softmax(-1) - REF(IDS).log_softmax(-1)) for k in range(2)]
    scores = 2.0 * (0.75 * log_ratios[0] - 0.5 * log_ratios[1]).double()
    out = draw(pad(models, REF, [0.75, -0.5], beta=2.0, candidates=4))
    assert_drawn_from(out, scores, 4)
    assert_drawn_from(draw(pad(models, REF, [0.75, -0.5], beta=2.0)), scores, 10)
    assert_drawn_from(draw(pad(models, REF, [0.75, -0.5], beta=2.0, candidates=None)), scores, None)
    with pytest.raises(ValueError, match=r"one number per reward model \(2\), got 1"):
        pad(models, REF, [1.0], beta=1.0)


def test_mavis_weighs_the_values_of_the_objectives_row_by_row() -> None:
    weights = [[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]
    w = torch.tensor(weights).double()
    scores = 1.5 * sum(w[:, j, None] * SCORES[j](IDS).double() for j in range(2))
    assert_drawn_from(draw(mavis(SCORES, weights, beta=1.5, candidates=5)), scores, 5)
