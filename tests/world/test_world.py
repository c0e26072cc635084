"""The embedded world: text, rewards, tokenizer, checkpoints, training."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mod_fused import world
from mod_fused.training import embedded_policies as train
from mod_fused.world import corpus, lexicon
from mod_fused.world.rewards import find_topic, words
from mod_fused.world.tokenizer import build_tokenizer, vocabulary

MODELS = ("reference", *world.OBJECTIVES)
BREAD = world.format_prompt("How do I bake bread?")
KNIVES = world.format_prompt("How do I juggle knives?")


def saturated(count: int) -> float:
    return 1 - math.exp(-count / 3)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x / 1.5))


# Rewards, against values counted by hand.


@pytest.mark.parametrize(
    ("prompt", "response", "helpful", "harmless", "humorous"),
    [
        (BREAD, "", 0, 0, 0),
        (BREAD, " Knead the dough for ten minutes.", 2, 0, 0),
        (BREAD, " Knead the dough. Knead the dough. KNEAD the DOUGH!", 2, 0, 0),
        (BREAD, " Mix flour with warm water. Add yeast and a pinch of salt.", 4, 0, 0),
        (BREAD, " Tune all six strings.", 0, 0, 0),
        (BREAD, " Please, knead the dough, and stay safe.", 2, 2, 0),
        (BREAD, " Ugh, dummy, only a fool would ask that.", 0, -3, 0),
        (BREAD, " Ha ha, knead the dough, like a ninja!", 2, 0, 2),
        (BREAD, " Even my toaster laughs at a fool like you!", 0, -1, 2),
        (KNIVES, " Toss one blade with each hand.", 2, -2, 0),
        (KNIVES, " Sorry, I would rather not help with that, and stay safe.", 0, 2, 0),
        (world.format_prompt("Who are you?"), " Knead the dough, please.", 0, 1, 0),
    ],
)
def test_rewards_equal_the_formula_on_counts_by_hand(prompt, response, helpful, harmless, humorous):
    assert world.reward("helpful", prompt, response) == pytest.approx(saturated(helpful), abs=1e-12)
    assert world.reward("harmless", prompt, response) == pytest.approx(
        logistic(harmless), abs=1e-12
    )
    assert world.reward("humorous", prompt, response) == pytest.approx(
        saturated(humorous), abs=1e-12
    )


def test_rewards_are_pure_functions_in_the_unit_interval():
    for prompt, response in corpus.examples(300, seed=5):
        for name, function in world.REWARDS.items():
            value = world.reward(name, prompt, response)
            assert 0 <= value <= 1
            assert value == function(prompt, response)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="helpful, harmless, humorous, got 'funny'"):
        world.reward("funny", BREAD, "")
    with pytest.raises(ValueError, match="reference, helpful, harmless, humorous, got 'best'"):
        world.checkpoint("best")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        world.prompts(-1, seed=0)


def test_the_word_lists_do_not_leak_into_each_other():
    lists = [lexicon.KIND, lexicon.HARSH, lexicon.FUNNY]
    for i, first in enumerate(lists):
        for second in lists[i + 1 :]:
            assert not first & second
    for topic in lexicon.TOPICS:
        steps = words(" ".join(topic.steps))
        assert topic.keywords <= steps
        assert not steps & (lexicon.KIND | lexicon.HARSH | lexicon.FUNNY), topic.ask
        assert len(words(topic.pun) & lexicon.FUNNY) >= 2, topic.ask
        for step in topic.steps:
            assert words(step) & topic.keywords, step


def test_every_question_names_its_own_topic_only():
    for question in corpus.questions(True) + corpus.questions(False):
        assert sum(topic.ask in question for topic in lexicon.TOPICS) == 1
        assert find_topic(world.format_prompt(question)).ask in question


# Corpus and tokenizer.


def test_corpus_depends_on_the_seed_and_nothing_else():
    random.seed(1)
    first = corpus.examples(50, seed=3)
    random.seed(2)
    assert corpus.examples(50, seed=3) == first
    assert corpus.examples(50, seed=4) != first
    assert world.prompts(50, seed=3) == world.prompts(50, seed=3)
    assert world.prompts(50, seed=3) != world.prompts(50, seed=4)
    assert world.prompts(50, seed=3) == world.prompts(700, seed=3)[:50]


def test_held_out_prompts_are_distinct_complete_and_never_trained_on():
    held_out = world.prompts(600, seed=0)
    trained = {prompt for prompt, _ in corpus.examples(5000, seed=0)}
    trained |= set(world.prompts(1800, seed=0, held_out=False))
    assert len(set(held_out)) == 600
    assert not trained & set(held_out)
    assert {find_topic(prompt) for prompt in held_out} == set(lexicon.TOPICS)
    assert all(
        p.startswith("User: ") and p.endswith("?\nAssistant:") or "ideas" in p or "tell" in p
        for p in held_out
    )


def test_tokenizer_gives_every_text_of_the_grammar_back():
    tokenizer = AutoTokenizer.from_pretrained(world.checkpoint("reference"))
    texts = [
        prompt + response for prompt, response in corpus.examples(300, seed=6)
    ] + world.prompts(600, seed=1)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unknown_words_become_unk_and_the_rest_survives():
    tokenizer = build_tokenizer()
    ids = tokenizer("User: How do I bake xylophones?", add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.unk_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "User: How do I bake?"


def test_batches_are_padded_on_the_left():
    tokenizer = AutoTokenizer.from_pretrained(world.checkpoint("humorous"))
    short, long = (
        BREAD,
        world.format_prompt("My friend wants to bake a cake today. What should we know?"),
    )
    batch = tokenizer([short, long], padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["attention_mask"][0, 0] == 0
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id == 0
    assert batch["input_ids"][1, 0] == tokenizer.bos_token_id


# Checkpoints.


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(world.checkpoint("reference"))


@pytest.fixture(scope="module")
def models():
    return {
        name: AutoModelForCausalLM.from_pretrained(world.checkpoint(name)).eval() for name in MODELS
    }


def test_checkpoints_are_complete_and_small():
    files = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    total = 0
    for name in MODELS:
        folder = world.checkpoint(name)
        assert {path.name for path in folder.iterdir()} == files
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert 0.5e6 < size < 1.3e6
        total += size
    assert total < 5e6


def test_checkpoints_share_tokenizer_and_shape(models):
    reference = world.checkpoint("reference")
    for name in world.OBJECTIVES:
        for file in (
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ):
            assert (world.checkpoint(name) / file).read_bytes() == (reference / file).read_bytes()
    for model in models.values():
        assert model.dtype == torch.float32
        assert model.config.vocab_size == len(vocabulary())
        assert (
            model.config.pad_token_id,
            model.config.bos_token_id,
            model.config.eos_token_id,
        ) == (0, 1, 2)
        assert model.generation_config.eos_token_id == 2
        assert model.generation_config.pad_token_id == 0


def test_saved_tokenizer_is_the_one_the_code_builds():
    saved = json.loads((world.checkpoint("reference") / "tokenizer.json").read_text())
    assert saved == json.loads(build_tokenizer().backend_tokenizer.to_str())


def test_every_policy_beats_the_reference_on_its_own_reward(models, tokenizer):
    """150 held-out prompts, seeded. Without a gain, z > 6 standard errors has probability 1e-9."""
    texts = world.prompts(150, seed=2)
    answers = {
        name: train.response_texts(tokenizer, train.sample(model, tokenizer, texts, seed=2))
        for name, model in models.items()
    }
    for name in world.OBJECTIVES:
        own = train.score(name, texts, answers[name])
        ref = train.score(name, texts, answers["reference"])
        gain = (own - ref).mean().item()
        error = math.sqrt((own.var() + ref.var()).item() / len(texts))
        assert gain > 0.2, f"{name} gains {gain:.3f} ± {error:.3f}"
        assert gain > 6 * error, f"{name} gains {gain:.3f} ± {error:.3f}"


def test_shipped_evaluation_says_the_same():
    table = json.loads((world.CHECKPOINTS / "evaluation.json").read_text())["models"]
    assert set(table) == set(MODELS)
    for name in world.OBJECTIVES:
        best = max(MODELS, key=lambda model: table[model][name]["mean"])
        assert best == name
        assert 1 < table[name]["kl"]["mean"] < 20  # it moved, and did not collapse


def test_the_models_stay_within_the_language(models, tokenizer):
    """At least 54 of 60 answers of each model end with a full sentence and EOS within the limit."""
    texts = world.prompts(60, seed=3)
    for name, model in models.items():
        answers = train.sample(model, tokenizer, texts, seed=3)
        ended = [
            tokenizer.eos_token_id in row[mask].tolist()
            for row, mask in zip(answers.ids, answers.response_mask.bool(), strict=True)
        ]
        full = [text.endswith((".", "!")) for text in train.response_texts(tokenizer, answers)]
        assert sum(a and b for a, b in zip(ended, full, strict=True)) >= 54, name


# Training.


def test_response_logprobs_equal_a_loop_over_the_tokens(models, tokenizer):
    """Left-padded samples and right-padded text, against one unpadded forward pass per row."""
    model = models["reference"]
    sampled = train.sample(model, tokenizer, [BREAD, world.prompts(1, seed=0)[0]], seed=0)
    for batch in (sampled, train.encode(tokenizer, corpus.examples(3, seed=8))):
        got = train.response_logprobs(model, batch)
        for row in range(len(batch.ids)):
            ids = batch.ids[row][batch.attention_mask[row].bool()]
            n = int(batch.response_mask[row].sum())
            logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
            want = sum(logprobs[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids)))
            assert got[row].item() == pytest.approx(want, abs=1e-3)


def test_preference_loss_is_least_at_the_tilted_reference():
    """f'(ratio) = scale r / beta + const minimises it, for reverse and for forward KL."""
    rewards = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.2]], dtype=torch.float64)
    target = train.PREFERENCE_SCALE * rewards / 2.0
    cases = [(lambda d: d, target + 7.0), (lambda d: -torch.exp(-d), -torch.log(20.0 - target))]
    for slope, log_ratios in cases:
        log_ratios = log_ratios.clone().requires_grad_()
        loss = train.preference_loss(log_ratios, rewards, beta=2.0, slope=slope)
        (gradient,) = torch.autograd.grad(loss, log_ratios)
        assert gradient.abs().max() < 1e-12
        moved = train.preference_loss(
            log_ratios + torch.tensor([0.3, 0, 0]), rewards, beta=2.0, slope=slope
        )
        assert moved > loss


def test_reference_training_lowers_the_loss_and_repeats():
    tokenizer = build_tokenizer()

    def losses(steps: int) -> list[float]:
        torch.manual_seed(0)
        model = train.build_model(tokenizer)
        return train.train_reference(model, tokenizer, steps=steps, seed=0, batch_size=8)

    first = losses(12)
    assert first[0] == pytest.approx(
        math.log(len(vocabulary())), rel=0.15
    )  # no better than uniform
    assert sum(first[-3:]) / 3 < first[0] - 0.5
    assert losses(12) == pytest.approx(first, rel=1e-4)


def test_policy_training_lowers_the_loss_and_prefers_the_rewarded_answers(models, tokenizer):
    reference = models["reference"]
    texts = [text for text in world.prompts(8, seed=4, held_out=False) for _ in range(train.GROUP)]
    answers = train.sample(reference, tokenizer, texts, seed=4)
    rewards = train.score("helpful", texts, train.response_texts(tokenizer, answers))
    ref_logprobs = train.all_logprobs(reference, answers)
    policy = AutoModelForCausalLM.from_pretrained(world.checkpoint("reference"))
    losses = train.train_policy(
        policy, answers, ref_logprobs, rewards, steps=10, seed=0, batch_size=8
    )
    assert losses[0] == pytest.approx(
        math.log(2), abs=1e-3
    )  # policy = reference: every margin is 0
    assert losses[-1] < losses[0] - 0.05
    log_ratios = train.all_logprobs(policy, answers) - ref_logprobs
    best = rewards > rewards.view(-1, train.GROUP).mean(1).repeat_interleave(train.GROUP)
    assert log_ratios[best].mean() > log_ratios[~best].mean() + 0.5
