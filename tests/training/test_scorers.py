"""Training of scorers, and the ones that ship: what they predict and what they do."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny_models as tiny
import torch
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


def test_log_ratios_are_those_of_the_tilted_policy() -> None:
    models = Ensemble([tiny.llama(0)], tiny.tokenizer())
    options: dict[str, Any] = {"weights": [], **controlled_decoding([tiny.llama(5)], [0.3])}
    batch, _ = trainer.roll_out(models, PROMPTS, max_new_tokens=4, **options)
    width = batch.ids.shape[1] - 4
    for row in range(3):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
    with pytest.raises(ValueError, match=message):
        trainer.fit_scorer(tiny.llama(1), rollouts[0], **arguments)
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
    results = json.loads((world.SCORERS / "evaluation.json").read_text())["scorers"]
    assert set(results) == set(world.OBJECTIVES)
    for objective, result in results.items():
        assert result["correlation"] > 0.6
        control = result["control"]
        means = [row[objective]["mean"] for row in control.values()]
        assert means == sorted(means) and means[2] > means[0] + 0.15
        kl = [row["kl"]["mean"] for row in control.values()]
        assert kl[0] == 0 and kl == sorted(kl)
