"""The study on a real language model: its questions and rewards, and all of it on a tiny model."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

pytest.importorskip("peft")
pytest.importorskip("vaderSentiment")

from bench import report
from bench.alignment import command, loop, statistics
from bench.real import cost, decoding, estimates, frozen, jobs, models, prompts, rewards, training
from bench.real.jobs import CORNERS, MIDDLE, REVERSE_KL, Cell, Policy
from mod_fused import Ensemble, generate, reference, world
from mod_fused.decoding.sequences import Sequences, take


def test_no_question_is_in_two_splits():
    every = [set(prompts.questions(*x)) for x in (("train", 300), ("validation", 60))]
    every.append(set(prompts.questions("held out", 600)))
    assert [len(x) for x in every] == [300, 60, 600] and len(set.union(*every)) == 960
    # A part of the questions has all forms alike: each topic in the first two of its six forms.
    part = set(prompts.questions("held out", 200))
    for form in prompts.FORMS:
        assert 32 <= len(part & {form.format(t) for t in prompts.TOPICS["held out"]}) <= 34
    topics = [t for split in prompts.TOPICS.values() for t in split]
    assert len(topics) == len(set(topics))
    with pytest.raises(ValueError, match="has 600 questions, expected 601"):
        prompts.questions("held out", 601)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # VADER's compound is exactly 0; letters 3.5; 4 words.
        ("The door of wood.", (0.5, (6 - 13 / 4) / 3, 1.0)),
        ("I love this wonderful day", (None, (6 - 21 / 5) / 3, 15 / 16)),
        ("It's " * 40, (0.5, 1.0, 0.0)),
        ("Internationalisation " * 5, (0.5, 0.0, 15 / 16)),
        ("Good.", (0.0, 0.0, 0.0)),  # too few words
        ("", (0.0, 0.0, 0.0)),
    ],
)
def test_rewards_are_what_they_say(text, expected):
    (found,) = rewards.scores([""], [text]).tolist()
    for value, wanted in zip(found, expected, strict=True):
        assert value > 0.9 if wanted is None else value == pytest.approx(wanted, abs=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the embedded reference, with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    for file in world.checkpoint("reference").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "User: {{ messages[-1]['content'] }}\nAssistant:"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def study(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, jobs.Sizes]:
    """The work folder of a tiny run, and its sizes."""
    work = tmp_path_factory.mktemp("work")
    sizes = jobs.TINY._replace(model=tiny, max_new_tokens=12, check_every=1)
    loop.run(work, decoding.phases(sizes), sizes, 1)
    return work, sizes


def test_the_command_writes_json_tables_and_the_picture(study, tmp_path):
    work, sizes = study

    class Tiny:
        TINY, phases = sizes, staticmethod(decoding.phases)

    words = ["--tiny", "--work", str(work), "--out", str(tmp_path), "--model", sizes.model]
    options = {"model": {"default": ""}}
    words += ["--workers", "1"]
    assert command.main("bench.real", Tiny, estimates.summary, words, options) == 0
    result = report.load(tmp_path / "real.json")
    text = (tmp_path / "real.md").read_text()
    assert (tmp_path / "real_trade_off.png").exists() and "real_trade_off.png" in text
    methods = {r["method"] for r in result["methods"]}
    assert methods == {"reference", "mod", "soup", "retrained", "guided", "pruned", "sizes",
                       "sizes, corrected", "best of 4"}  # fmt: skip
    kept = [r["policy"] for r in result["trainings"] if r["kept"]]
    assert sorted(kept) == sorted(map(jobs.name_of, jobs.policies(sizes)))


#: Two prompts with responses, the first padded on the left, the second on the right.
PADDED = Sequences(
    torch.tensor([[0, 0, 5, 6, 7, 8, 9, 2], [11, 12, 13, 14, 15, 16, 2, 2]]),
    torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]]),
    torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 0]]),
)


@torch.no_grad()
def test_response_logprobs_are_those_of_each_response_alone(tiny):
    model, _ = models.load_model(tiny)
    ids, attention, response = PADDED
    found = training.response_logprobs(model, PADDED)
    for row, expected in enumerate(found):
        alone = ids[row][attention[row].bool()]
        logprobs = model(alone[None]).logits[0].log_softmax(-1)
        at = response[row][attention[row].bool()].nonzero()[:, 0]
        assert expected == pytest.approx(logprobs[at - 1, alone[at]].sum().item(), abs=1e-4)


def test_answers_to_train_on_have_the_reference_s_probability(study):
    work, sizes = study
    data = training.load_answers(work, 1)
    model, tokenizer = training.base(sizes)
    assert len(data.responses) == len(data.prompts) == 4 * sizes.train_prompts
    with torch.no_grad():
        found = training.response_logprobs(model, data.batch)
    torch.testing.assert_close(found, data.ref_logprobs, rtol=1e-4, atol=1e-3)
    said = tokenizer.decode(data.batch.ids[3][data.batch.response_mask[3].bool()])
    assert data.responses[3] in said
    assert len(set(data.responses[:4])) > 1
    # Neither another training nor the held-out questions have the same noise.
    assert training.load_answers(work, 0).responses != data.responses


@torch.no_grad()
def test_cells_decode_the_models_that_they_name(study):
    work, sizes = study
    (reference, _), ids = training.base(sizes), torch.tensor([[1, 50, 60, 70]])

    def logprobs(model: Any) -> torch.Tensor:
        return model(ids).logits.log_softmax(-1)

    policies = [
        logprobs(models.merged(reference, training.adapter(work, Policy(REVERSE_KL, w))))
        for w in CORNERS[:2]
    ]
    cell = Cell("mod", REVERSE_KL, MIDDLE)
    ensemble, weights = decoding.ensemble_of(work, sizes, cell)
    assert weights == [0.5, 0.5] and len(ensemble.models) == 3
    for model, expected in zip(ensemble.models, [logprobs(reference), *policies], strict=True):
        torch.testing.assert_close(logprobs(model), expected, rtol=1e-4, atol=1e-4)
    assert (policies[0] - policies[1]).abs().max() > 1e-4  # they differ at all
    # Two steps of training are small: the soup's logits are nearly the mean of the two.
    soup, _ = decoding.ensemble_of(work, sizes, cell._replace(method="soup"))
    mean = (policies[0] + policies[1]) / 2
    torch.testing.assert_close(logprobs(soup.models[1]), mean, rtol=1e-3, atol=1e-2)
    sized = cell._replace(method="sizes, corrected", asked="few")
    ensemble, weights = decoding.ensemble_of(work, sizes, sized)
    assert weights == [0.5, 0.5, -0.5]
    layers = [m.config.num_hidden_layers for m in ensemble.models]
    assert layers == [2, 2, 1, 1]


def test_pruning_keeps_the_first_layers_and_the_last_two():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    pruned = training.prune(model, 0.6)
    kept = [model.model.layers[i] for i in (0, 3, 4)]
    for a, b in zip(pruned.model.layers, kept, strict=True):
        assert torch.equal(a.self_attn.q_proj.weight, b.self_attn.q_proj.weight)
    ensemble = Ensemble([None, pruned])
    options = {"weights": [1.0], "max_new_tokens": 5, "seed": 1, "eos_token_id": []}
    ids = torch.tensor([[1, 50, 60]])
    cached, whole = (
        generate(ensemble, input_ids=ids, use_cache=x, **options).tokens for x in (True, False)
    )
    assert torch.equal(cached, whole) and model.config.num_hidden_layers == 5
    with pytest.raises(ValueError, match="Linear has no list model.layers"):
        training.prune(torch.nn.Linear(2, 2), 0.5)


def test_estimates_are_those_of_the_answers(study):
    work, sizes = study
    made = estimates.Study(work, sizes)
    cell = Cell("mod", REVERSE_KL, MIDDLE)
    found = [loop.load(work, "cells", cell._replace(seed=s)) for s in range(sizes.seeds)]
    scored = made.scored(cell)
    kl = np.stack([x["kl"][0] for x in found])
    np.testing.assert_allclose(scored.kl, kl, atol=1e-9)  # as many topics as questions
    np.testing.assert_allclose(scored.terms, kl, atol=1e-9)
    record = estimates._estimates(scored, cell.weights)
    weighted = np.mean([x["rewards"][0] @ np.array(MIDDLE) for x in found])
    assert record["weighted"].value == pytest.approx(weighted, abs=1e-4)
    assert record["objective"].value == pytest.approx(10 * weighted - kl.mean(), abs=1e-3)
    assert record["seeds"] == sizes.seeds and record["topics"] == sizes.many
    # The reference and best-of-N answer the questions of each training.
    raw = loop.load(work, "cells", jobs.REFERENCE)
    np.testing.assert_array_equal(
        made.scored(jobs.REFERENCE).rewards, raw["rewards"][0].reshape(sizes.seeds, sizes.many, 3)
    )
    best = made.best_of(sizes.pool, MIDDLE).rewards.reshape(-1, 3)
    highest = (made.pool @ np.array(MIDDLE)).argmax(1)
    np.testing.assert_allclose(best, made.pool[np.arange(len(best)), highest])
    # Resampled answers are weighted: with equal weights they would be the plain mean.
    few = cell._replace(rule="resampled", asked="fewest")
    raw = loop.load(work, "cells", few)
    assert raw["kl"].shape == (sizes.candidates, sizes.fewest)
    expected = []
    for n in range(sizes.fewest):
        ratios = raw["log_ratios"][:, n]
        chosen = statistics.resampling_weights(
            REVERSE_KL, np.array([0.5, 0.5]), ratios, raw["kl"][:, n]
        )
        expected.append(chosen @ raw["rewards"][:, n])
    np.testing.assert_allclose(made.answers(few)[0], expected, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("cut", [0, 9])
def test_terms_of_answers_have_the_divergence_as_their_mean_under_a_cut_too(divergence, cut):
    rng = np.random.default_rng(6)
    log_ref, log_pi = (reference.log_softmax(rng.normal(size=30)) for _ in range(2))
    log_pi[:cut] = -np.inf
    log_pi = reference.log_softmax(log_pi)
    terms = statistics.divergence_of_answers(divergence, (log_pi - log_ref)[cut:])
    with np.errstate(invalid="ignore"):
        exact = np.exp(log_ref) @ reference.f_of(divergence)(log_pi - log_ref)
    assert np.exp(log_pi[cut:]) @ terms == pytest.approx(exact, rel=1e-10)
    assert np.isfinite(statistics.divergence_of_answers(divergence, np.array([-90.0, 700.0]))).all()
    with pytest.raises(ValueError, match="reverse_kl or jsd, got 'forward_kl'"):
        statistics.divergence_of_answers("forward_kl", terms)


def test_a_scorer_is_held_out_by_topic(study, monkeypatch):
    work, sizes = study
    found = {}

    def fit_scorer(scorer, rollouts, targets, **options):
        found.update(used=rollouts, held=options["held_out"][0], targets=targets)
        return training_result

    training_result = type("Fit", (), {"correlations": [(1, [0.5])], "best": 1})
    monkeypatch.setattr(training, "fit_scorer", fit_scorer)
    monkeypatch.setitem(training.TOPICS, "train", ["one", "another"])
    training.train_scorer(work, sizes._replace(generated=False), "plain")
    data = training.load_answers(work, 0)
    # Of four questions the second and the last are of the second topic; each has four answers.
    second = torch.arange(16) // 4 % 2 == 1
    for name, rows in (("used", ~second), ("held", second)):
        assert torch.equal(found[name].ids, take(data.batch, rows.nonzero()[:, 0]).ids)
    expected = rewards.scores(data.prompts, data.responses)[~second.numpy(), 1]
    np.testing.assert_allclose(found["targets"], expected)


def test_areas_and_leads_at_equal_kl_are_those_of_the_means(study, monkeypatch):
    work, sizes = study

    def made_up(self, cell):
        """Answers with far more reward than the reference's, their KL by method and weights."""
        rng = np.random.default_rng(zlib.crc32(repr(cell).encode()))
        count = getattr(sizes, cell.asked)
        away = 1.5 if cell.method == "soup" else sum(cell.weights) ** 2
        low = 0.1 if cell == jobs.REFERENCE else 0.4
        kl = away + 0.1 * rng.random(count)
        return [low + 0.2 * rng.random((count, 3)), kl, kl, np.zeros((count, 4))]

    monkeypatch.setattr(estimates.Study, "answers", made_up)
    made = estimates.Study(work, sizes)
    areas = {r["method"]: r["area"].value for r in estimates._areas(made)}
    assert areas["MOD less soup"] == pytest.approx(areas["mod"] - areas["soup"], abs=2e-5)
    base = made.scored(jobs.REFERENCE, sizes.few).rewards.mean((0, 1))
    line = [Cell("mod", REVERSE_KL, w) for w in (*CORNERS[:2], MIDDLE)]
    points = [made.scored(c, sizes.few).rewards.mean((0, 1)) - base for c in line]
    assert areas["mod"] == pytest.approx(statistics.hypervolume(np.array(points)[:, :2]), abs=2e-5)
    for record, beyond in zip(estimates._at_kl(made), jobs.BEYOND, strict=True):
        w = record["weights"]
        line = [jobs.REFERENCE, Cell("mod", REVERSE_KL, w), Cell("mod", REVERSE_KL, beyond)]
        line[2] = line[2]._replace(asked="few")
        values = [made.scored(c, sizes.few).values(w) for c in (*line, Cell("soup", REVERSE_KL, w))]
        rewards, kls = ([float(x[name][0].mean()) for x in values] for name in ("weighted", "kl"))
        assert kls[1] < kls[3] < kls[2]
        lead = np.interp(kls[3], kls[:3], rewards[:3]) - rewards[3]
        assert record["lead"].value == pytest.approx(lead, abs=2e-5)
        assert record["soup"].value == pytest.approx(kls[3], abs=2e-5)


def test_each_training_answers_its_own_questions():
    sizes, cell = jobs.Sizes(), Cell("mod", REVERSE_KL, MIDDLE)
    own = [decoding.asked(sizes, cell._replace(seed=s)) for s in range(sizes.seeds)]
    assert (
        sum(own, []) == prompts.questions("held out", 600) == decoding.asked(sizes, jobs.REFERENCE)
    )
    few = decoding.asked(sizes, cell._replace(seed=2, asked="few"))
    assert few == own[2][:100]


@torch.no_grad()
def test_the_layers_below_and_above_are_the_whole_model(tiny):
    model, _ = models.load_model(tiny)
    whole = training.response_logprobs(model, PADDED)
    for first in (0, 1):
        below = frozen.run_below(model, first, PADDED, 1)
        found = training.response_logprobs(frozen.above(model, first), below)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-4)
    assert len(model.model.layers) == 2 and not isinstance(model.model.norm, torch.nn.Identity)


def test_questions_of_a_topic_count_together():
    x = np.arange(400.0)
    np.testing.assert_array_equal(estimates.by_topic(x, 200), np.arange(100.0) + 50.0)
    np.testing.assert_array_equal(estimates.by_topic(x, 3), x[:3])
    asked = prompts.questions("held out", 200)
    assert prompts.TOPICS["held out"][7] in asked[7] and prompts.TOPICS["held out"][7] in asked[107]


def test_a_reward_of_nothing_has_no_ratio():
    assert np.isnan(estimates._ratio(np.array([1.0]), np.array([0.0]))).all()
    assert estimates._ratio(np.array([3.0]), np.array([2.0])).tolist() == [0.5]


def test_answers_of_return_sequences_are_those_of_generate(study):
    work, sizes = study
    model, tokenizer = training.base(sizes)
    ensemble = Ensemble([None, model], tokenizer)
    asked = prompts.conversations(prompts.questions("validation", 3))
    found = decoding.answers(
        ensemble, [1.0], asked, rewards.scores, batch=2, max_new_tokens=5, num_return_sequences=2
    )
    assert found["texts"].shape == (2, 3) and found["rewards"].shape == (2, 3, 3)
    seeds = [s for _, part in decoding_batches(asked) for s in part]
    out = generate(
        ensemble, asked, weights=[1.0], max_new_tokens=5, num_return_sequences=2, seed=seeds
    )
    assert [list(x) for x in found["texts"].T] == np.reshape(out.texts, (3, 2)).tolist()


def decoding_batches(asked: list[Any]) -> Any:
    from bench.alignment.decoding import batches

    return batches(asked, 2)


def test_the_cost_is_measured_with_the_trained_adapters(study, tmp_path):
    work, sizes = study
    words = ["--work", str(work), "--out", str(tmp_path), "--model", sizes.model, "--rounds", "1"]
    assert cost.main([*words, "--batches", "1"]) == 0
    rows = report.load(tmp_path / "real_cost.json")["rows"]
    assert len(rows) == 10 and rows[0]["step / one model"] == 1.0
    with pytest.raises(SystemExit, match="no adapter .* run python -m bench.real first"):
        cost.main([*words, "--work", str(tmp_path)])
