"""Training of scorers, and the ones that ship: what they predict and what they do."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny_models as tiny
import torch
from scipy.stats import chi2_contingency
from transformers import AutoModelForCausalLM, AutoTokenizer

from mod_fused import Ensemble, world
from mod_fused.guidance import Guidance, Scorer, controlled_decoding, fudge
from mod_fused.guidance.scorers import prefix_values
from mod_fused.training import losses
from mod_fused.training import scorers as trainer
from mod_fused.training.embedded_policies import MAX_NEW_TOKENS
from mod_fused.training.embedded_scorers import CONTINUATIONS, new_scorer, values_and_outcomes

PROMPTS = tiny.PROMPTS


@pytest.fixture(scope="module")
def rollouts() -> tuple[trainer.Rollouts, list[str]]:
    """Two responses to each of three prompts, of at most six tokens."""
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    return trainer.roll_out(models, PROMPTS * 2, weights=[1.0], max_new_tokens=6, seed=1)


def test_rollouts_are_what_generate_drew_however_rows_are_batched(rollouts: Any) -> None:
    batch, texts = rollouts
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    options: dict[str, Any] = {"weights": [1.0], "max_new_tokens": 6, "seed": 1}
    again, same = trainer.roll_out(models, PROMPTS * 2, batch_size=4, **options)
    assert same == texts and len(set(texts)) == 6
    assert torch.equal(again.ids, batch.ids)
    assert torch.equal(again.response_mask, batch.response_mask)
    assert batch.log_ratios.abs().max() < 1e-6  # the reference itself
    tokenizer = tiny.tokenizer()
    for row, prompt in enumerate(PROMPTS * 2):
        said = batch.ids[row][batch.response_mask[row].bool()]
        assert " " + tokenizer.decode(said, skip_special_tokens=True) == texts[row]
        read = batch.ids[row][(batch.attention_mask[row] - batch.response_mask[row]).bool()]
        assert tokenizer.decode(read) == prompt


def test_a_response_is_its_tokens_up_to_its_end() -> None:
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    batch, _ = trainer.roll_out(models, PROMPTS * 40, weights=[1.0], max_new_tokens=6, seed=1)
    lengths = batch.response_mask.sum(1)
    assert len(lengths.unique()) > 3
    for row, n in enumerate(lengths.tolist()):
        said = batch.ids[row, -6:].tolist()
        assert batch.response_mask[row, -6:].tolist() == [1] * n + [0] * (6 - n)
        assert tiny.EOS not in said[: n - 1] and (n == 6 or said[n - 1] == tiny.EOS)
        assert batch.attention_mask[row, -6:].equal(batch.response_mask[row, -6:])


def test_a_tree_of_rollouts_branches_after_each_block() -> None:
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    options: dict[str, Any] = {"weights": [1.0], "max_new_tokens": 7, "seed": 1}
    single, texts = trainer.roll_out(models, PROMPTS * 20, **options)
    tree, said = trainer.roll_out(models, PROMPTS * 20, branches=3, block_length=3, **options)
    assert tree.ids.shape == (60 * 9, single.ids.shape[1]) and len(said) == 60 * 9
    # The first row of each prompt is what is drawn without branches, prompts and all.
    for ours, theirs in zip(tree, single, strict=True):
        torch.testing.assert_close(ours[::9], theirs, atol=1e-6, rtol=0)
    assert said[::9] == texts
    tokens = tree.ids[:, -7:].view(60, 3, 3, 7)
    lengths = tree.response_mask.sum(1).view(60, 3, 3)
    assert tokens[..., :3].eq(tokens[:, :1, :1, :3]).all()  # one first block for all nine
    assert tokens[..., 3:6].eq(tokens[:, :, :1, 3:6]).all()  # one second block for three
    ended = lengths[:, 0, 0] <= 3
    assert 5 < ended.sum() < 55
    for row in range(60):
        if ended[row] and tokens[row, 0, 0, lengths[row, 0, 0] - 1] == tiny.EOS:
            assert tokens[row].eq(tokens[row, 0, 0]).all()  # repeated
    going_on = tokens[~ended]
    differ = going_on[:, 0, 0, 3:] != going_on[:, 1, 0, 3:]
    assert differ.any(1).float().mean() > 0.8
    assert (going_on[:, 0, 0, 6] != going_on[:, 0, 1, 6]).any()


def test_blocks_do_not_go_with_a_history_that_they_would_lose() -> None:
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    with pytest.raises(ValueError, match="blocks do not go with sequence_history"):
        trainer.roll_out(
            models, PROMPTS, weights=[1.0], max_new_tokens=4, branches=2, block_length=2,
            sequence_history=True,
        )  # fmt: skip


def test_every_branch_of_a_tree_is_drawn_from_the_policy() -> None:
    """The share of each word as the fourth token in the second branch against that of separate
    responses: chi-squared, wrong once in 10,000 seeds. And what the two branches do is independent:
    their tokens agree as often as independent draws do, within 5 standard errors."""
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    options: dict[str, Any] = {"weights": [1.0], "max_new_tokens": 2, "batch_size": 4000}
    tree, _ = trainer.roll_out(
        models, ["it ran"] * 4000, branches=2, block_length=1, seed=1, **options
    )
    other, _ = trainer.roll_out(models, ["it ran"] * 4000, seed=99, **options)
    first, second = tree.ids.view(4000, 2, -1)[:, 0], tree.ids.view(4000, 2, -1)[:, 1]
    table = torch.stack([x[:, -1].bincount(minlength=tiny.V) for x in (second, other.ids)]).numpy()
    table = table[:, table.sum(0) > 10]
    assert table.shape[1] > 5
    assert chi2_contingency(table).pvalue > 1e-4
    logits = tiny.llama(0)(first[:, :-1]).logits[:, -1].detach()
    on = first[:, -2] != tiny.EOS
    agree = (first[:, -1] == second[:, -1])[on].double()
    expected = logits.softmax(-1).square().sum(1)[on].double()
    error = (expected * (1 - expected)).sum().sqrt()
    assert (agree - expected).sum().abs() < 5 * error


@pytest.mark.parametrize("branches", [1, 2])
def test_log_ratios_are_those_of_the_tilted_policy(branches: int) -> None:
    models = Ensemble([tiny.llama(0)], tiny.tokenizer())
    options: dict[str, Any] = {"weights": [], **controlled_decoding([tiny.llama(5)], [0.3])}
    if branches > 1:
        options |= {"branches": branches, "block_length": 3}
    batch, _ = trainer.roll_out(models, PROMPTS, max_new_tokens=4, **options)
    width = batch.ids.shape[1] - 4
    for row in range(3 * branches):
        prompt = batch.ids[row, :width][batch.attention_mask[row, :width].bool()].tolist()
        said = batch.ids[row][batch.response_mask[row].bool()].tolist()
        ref = tiny.teacher_forced(tiny.llama(0), prompt, said).double()
        tilt = 0.3 * tiny.teacher_forced(tiny.llama(5), prompt, said).double()
        ratios = (ref + tilt).log_softmax(-1) - ref.log_softmax(-1)
        got = batch.log_ratios[row][batch.response_mask[row].bool()].double()
        torch.testing.assert_close(got, ratios[range(len(said)), said], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [tiny.gpt2, tiny.gpt2_value, tiny.bloom])
def test_prefix_values_are_those_of_rows_without_padding(rollouts: Any, kind: Any) -> None:
    batch, _ = rollouts
    scorer = kind(3)
    with torch.no_grad():
        got = prefix_values(scorer, batch)
        for row in range(6):
            real = batch.attention_mask[row].bool()
            out = scorer(input_ids=batch.ids[row][real][None]).logits[0]
            if kind is tiny.gpt2_value:
                want = out[1:, 0]
            else:
                want = out[:-1].gather(1, batch.ids[row][real][1:, None])[:, 0]
            last = int(batch.response_mask[row].sum())
            at = real[1:] & batch.response_mask[row, 1:].bool()
            torch.testing.assert_close(got[row][at], want[-last:], atol=1e-4, rtol=0)


def test_each_method_has_its_loss(rollouts: Any) -> None:
    """Against loops over unpadded rows."""
    batch, _ = rollouts
    batch = batch._replace(
        log_ratios=torch.linspace(-1, 1, batch.ids.numel()).view_as(batch.log_ratios)
    )
    scorer, reference = tiny.gpt2(3), tiny.gpt2(4)
    rewards = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.5, 0.0])
    sums = dict.fromkeys(trainer.METHODS, 0.0)
    for row in range(6):
        real = batch.attention_mask[row].bool()
        ids = batch.ids[row][real].tolist()
        n = int(batch.response_mask[row].sum())
        prompt, said = ids[:-n], ids[-n:]
        dense = tiny.teacher_forced(scorer, prompt, said).double()
        v = dense[range(n), said]
        r = rewards[row].double()
        ref = tiny.teacher_forced(reference, prompt, said).double().softmax(-1)
        following = [r]
        for t in reversed(range(1, n)):
            following.append(0.7 * ref[t] @ dense[t] + 0.3 * following[-1])
        ratios = batch.log_ratios[row][real][-n:].double()
        spent = torch.stack([ratios[t + 1 :].sum() for t in range(n)])
        p = torch.sigmoid(v)
        sums["cd_fudge"] += float(0.5 * (v - r).square().sum())
        sums["cd_q"] += float(0.5 * (v - torch.stack(following[::-1])).square().sum())
        sums["mavis"] += float(0.5 * (v - (r - spent / 2.0)).square().sum())
        for name, label in (("fudge", r), ("soft", torch.exp(2.0 * (r - 1.0)))):
            sums[name] -= float((label * p.log() + (1 - label) * (1 - p).log()).sum())
    for method, expected in sums.items():
        beta = 2.0 if method in ("soft", "mavis") else None
        task = trainer.Task(method, reference, beta, td_lambda=0.3, highest=1.0)
        loss = task.loss(scorer, batch, rewards)
        assert loss.item() == pytest.approx(expected / 6, rel=1e-4), method
    assert losses.value_loss(torch.ones(2, 3), torch.zeros(2), torch.ones(2, 3)) == 1.5


def long_word(prompt: str, response: str) -> float:
    """Whether a word has more than four letters."""
    return float(any(len(word) > 4 for word in response.split()))


@pytest.mark.parametrize("method", ["cd_fudge", "cd_q", "fudge"])
def test_a_trained_scorer_raises_its_reward(method: str) -> None:
    """By 6 standard errors at least: without an effect, a chance of 1e-9."""
    reference, tokenizer = tiny.llama(0), tiny.tokenizer()
    scorer = new_scorer(tiny.llama(1))
    fit = trainer.train_scorer(
        scorer,
        reference,
        tokenizer,
        PROMPTS * 150,
        long_word,
        method=method,
        max_new_tokens=6,
        steps=60,
        peak_lr=1e-2,
        batch_size=48,
    )
    assert sum(fit.losses[-5:]) < 0.7 * sum(fit.losses[:5])
    assert not scorer.training
    steered = controlled_decoding([scorer], [8.0])
    if method == "fudge":
        steered = fudge(scorer, candidates=None, strength=2.0)
    rewards = []
    for arguments in (steered, {**steered, "value_weights": [0.0]}):
        models = Ensemble([reference], tokenizer)
        _, texts = trainer.roll_out(
            models, PROMPTS * 150, weights=[], max_new_tokens=6, seed=9, **arguments
        )
        rewards.append(trainer.rewards_of(long_word, PROMPTS * 150, texts))
    gain = float(rewards[0].mean() - rewards[1].mean())
    assert gain > 6 * math.sqrt(sum(float(r.var()) for r in rewards) / len(rewards[0]))


def test_early_stopping_keeps_what_predicts_held_out_rewards_best() -> None:
    """Few roll-outs and a high rate: it soon knows them by heart."""
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    options: dict[str, Any] = {"weights": [1.0], "max_new_tokens": 6}
    drawn = []
    for seed in (1, 2):
        rollouts, texts = trainer.roll_out(models, PROMPTS * 30, seed=seed, **options)
        drawn.append((rollouts, trainer.rewards_of(long_word, PROMPTS * 30, texts)))
    for method, beta in (("cd_fudge", None), ("soft", 2.0)):
        scorer = new_scorer(tiny.llama(1))
        fit = trainer.fit_scorer(
            scorer, *drawn[0], method=method, beta=beta, held_out=drawn[1], check_every=5,
            patience=3, steps=200, peak_lr=1e-2,
        )  # fmt: skip
        steps = [step for step, _ in fit.correlations]
        means = [sum(x) / 4 for _, x in fit.correlations]
        assert steps == list(range(5, len(fit.losses) + 1, 5)) and len(fit.losses) < 200
        assert fit.best == steps[means.index(max(means))] == len(fit.losses) - 15
        assert max(means) > 0.25 and not scorer.training
        # The scorer is that of the best check: its values, by hand.
        (rollouts, rewards), mask = drawn[1], drawn[1][0].response_mask[:, 1:].bool()
        with torch.no_grad():
            values = prefix_values(scorer, rollouts)
        if method == "soft":
            values, rewards = values.sigmoid(), torch.exp(2.0 * (rewards - drawn[0][1].max()))
        last = mask & (mask.cumsum(1) > 0.75 * mask.sum(1, keepdim=True))
        pair = torch.stack([values[last], rewards[:, None].expand_as(values)[last]])
        best = fit.correlations[steps.index(fit.best)][1]
        assert best[3] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-5)


def test_soft_labels_count_from_the_largest_reward(rollouts: Any) -> None:
    rewards = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.5, 0.0])
    options: dict[str, Any] = {"method": "soft", "beta": 2.0, "steps": 2, "batch_size": 6}
    losses_of = [
        trainer.fit_scorer(tiny.llama(3), rollouts[0], rewards + shift, **options).losses
        for shift in (0.0, 4.0)
    ]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-5)
    task = trainer.Task("soft", None, 2.0, highest=1.0)
    assert losses_of[0][0] == pytest.approx(task.loss(tiny.llama(3), rollouts[0], rewards).item())


def test_rewards_that_cannot_be_predicted_leave_no_scorer(rollouts: Any) -> None:
    models = trainer.alone(tiny.llama(0), tiny.tokenizer())
    batch, _ = trainer.roll_out(models, PROMPTS * 100, weights=[1.0], max_new_tokens=6, seed=1)
    noise = torch.rand(300, generator=torch.Generator().manual_seed(0))
    scorer = new_scorer(tiny.llama(1))
    before = {name: x.clone() for name, x in scorer.state_dict().items()}
    options: dict[str, Any] = {"steps": 20, "check_every": 5, "patience": 2}
    with pytest.raises(ValueError, match="has not learned: over . checks"):
        trainer.fit_scorer(scorer, batch, noise, held_out=(batch, 1 - noise), **options)
    assert all(torch.equal(x, before[name]) for name, x in scorer.state_dict().items())
    with pytest.raises(ValueError, match="held-out rewards are all equal"):
        trainer.fit_scorer(scorer, batch, noise, held_out=(batch, torch.ones(300)), **options)
    with pytest.raises(ValueError, match="held-out rewards must be 6 finite numbers"):
        trainer.fit_scorer(scorer, batch, noise, held_out=(rollouts[0], noise), **options)


def test_the_same_seed_gives_the_same_scorer_in_spite_of_dropout(rollouts: Any) -> None:
    weights = []
    for state in (1, 2):
        torch.manual_seed(state)
        scorer = tiny.llama_value(1, classifier_dropout=0.5)
        trainer.fit_scorer(scorer, rollouts[0], torch.arange(6.0), steps=3, batch_size=4, seed=5)
        weights.append(scorer.score.weight.detach())
        expected = torch.random.get_rng_state()
        torch.manual_seed(state)
        assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"method": "soft"}, "got None for soft"),
        ({"method": "soft", "beta": -1.0}, "beta must be positive and finite, got -1"),
        ({"method": "mavis", "beta": 0.0}, "beta must be positive, got 0"),
        ({"td_lambda": 1.5}, r"td_lambda must be in \[0, 1\], got 1.5"),
        ({"method": "ppo"}, "cd_fudge, cd_q, fudge, soft, mavis, got 'ppo'"),
        ({"method": "cd_q"}, "cd_q needs a reference and a dense scorer"),
        ({"method": "mavis"}, "beta is for soft and mavis, which need it; got None for mavis"),
        ({"beta": 1.0}, "got 1.0 for cd_fudge"),
        ({"rewards": torch.zeros(5)}, "6 finite numbers"),
        ({"rewards": torch.full((6,), math.nan)}, "6 finite numbers"),
    ],
)
def test_bad_arguments_are_refused(rollouts: Any, options: dict[str, Any], message: str) -> None:
    arguments = {"rewards": torch.zeros(6), **options}
    scorer = tiny.llama(1)
    with pytest.raises(ValueError, match=message):
        trainer.fit_scorer(scorer, rollouts[0], **arguments)
    assert not scorer.training
    scalar = tiny.llama_value(1)
    with pytest.raises(ValueError, match="dense scorer"):
        trainer.fit_scorer(
            scalar, rollouts[0], torch.zeros(6), method="cd_q", reference=tiny.llama(0)
        )


def test_an_invalid_response_is_no_rollout() -> None:
    models = Ensemble([tiny.llama(0)], tiny.tokenizer())
    broken = {"value_fn": lambda step, ids: torch.full((1, len(ids), tiny.V), torch.nan)}
    with pytest.raises(ValueError, match="response 0 has an invalid step"):
        trainer.roll_out(models, PROMPTS, weights=[], max_new_tokens=2, **broken)


# The scorers that ship.


def load(folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(world.checkpoint("reference"))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: load(world.checkpoint(name)) for name in ("reference", *world.OBJECTIVES)}


def test_shipped_scorers_are_complete_small_and_share_the_tokenizer() -> None:
    reference = world.checkpoint("reference")
    for objective in world.OBJECTIVES:
        folder = world.scorer(objective)
        assert {p.name for p in folder.iterdir()} == {p.name for p in reference.iterdir()}
        assert sum(p.stat().st_size for p in folder.iterdir()) < 1.3e6
        tokens = (folder / "tokenizer.json").read_bytes()
        assert tokens == (reference / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="helpful, harmless, humorous, got 'reference'"):
        world.scorer("reference")
    guide = Guidance.embedded(["humorous", "helpful"])
    assert guide.num_values == 2 and all(isinstance(s, Scorer) for s in guide.scorers)
    assert Guidance.embedded().num_values == 3


def test_values_predict_the_reward_of_what_follows(models: Any, tokenizer: Any) -> None:
    """Half answers to 30 held-out prompts. Independent values and outcomes correlate by more than
    0.6 with probability 5e-4 at 30 pairs (t = 3.97 with 28 degrees of freedom)."""
    prompts = world.prompts(30, seed=11)
    answers, _ = trainer.roll_out(
        trainer.alone(models["reference"], tokenizer),
        prompts,
        weights=[1.0],
        max_new_tokens=MAX_NEW_TOKENS,
        seed=5,
    )
    for objective, reward in world.REWARDS.items():
        scorer = load(world.scorer(objective))
        values, outcomes = values_and_outcomes(
            scorer, models["reference"], tokenizer, prompts, reward, seed=5
        )
        assert len(values) == len(outcomes) == 30
        # The value of the half itself, read alone.
        n = int(answers.response_mask[0].sum())
        half = answers.ids[0][answers.attention_mask[0].bool()][: n // 2 - n]
        with torch.no_grad():
            alone = scorer(input_ids=half[None, :-1]).logits[0, -1, half[-1]]
        assert abs(values[0] - alone) < 1e-4
        assert torch.corrcoef(torch.stack([values, outcomes]))[0, 1] > 0.6, objective
        # Not its order alone: on average they agree, but for the noise of the continuations.
        error = float((values - outcomes).std()) / math.sqrt(30)
        assert abs(float((values - outcomes).mean())) < 5 * error + 0.05, objective
    assert CONTINUATIONS == 16


def rewards_under(
    reference: Any, tokenizer: Any, objective: str, strength: float, prompts: list[str]
) -> torch.Tensor:
    _, texts = trainer.roll_out(
        Ensemble([reference], tokenizer),
        prompts,
        weights=[],
        value_fn=Guidance.embedded([objective]),
        value_weights=[strength],
        max_new_tokens=MAX_NEW_TOKENS,
        seed=3,
    )
    return trainer.rewards_of(world.REWARDS[objective], prompts, texts)


@pytest.mark.parametrize("index", range(3))
def test_control_raises_its_reward_on_the_reference_and_on_another_model(
    models: Any, tokenizer: Any, index: int
) -> None:
    """150 held-out prompts. Without a gain, 5 standard errors have probability 3e-7. The other
    model is a policy tuned for another objective, which the scorer has never seen."""
    objective, other = world.OBJECTIVES[index], world.OBJECTIVES[(index + 1) % 3]
    prompts = world.prompts(150, seed=12)
    for model in (models["reference"], models[other]):
        none, some = (rewards_under(model, tokenizer, objective, s, prompts) for s in (0.0, 10.0))
        gain = float((some - none).mean())
        error = math.sqrt(float(some.var() + none.var()) / len(prompts))
        assert gain > 5 * error, f"{objective} gains {gain:.3f} ± {error:.3f}"


def test_shipped_evaluation_says_what_control_does() -> None:
    evaluation = json.loads((world.SCORERS / "evaluation.json").read_text())
    results, settings = evaluation["scorers"], evaluation["settings"]
    assert set(results) == set(world.OBJECTIVES)
    for objective, result in results.items():
        assert result["correlation"] > 0.6
        assert 0 < result["steps"] <= settings["most_steps"]
        quarters = result["correlation_by_quarter"]
        assert 0.4 < quarters[0] and quarters == sorted(quarters)
        control = result["control"]
        means = [row[objective]["mean"] for row in control.values()]
        assert means == sorted(means) and means[2] > means[0] + 0.15
        kl = [row["kl"]["mean"] for row in control.values()]
        assert kl[0] == 0 and kl == sorted(kl)
