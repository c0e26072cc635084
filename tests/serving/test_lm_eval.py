"""The harness's model against the harness's own of transformers (`make test-lm-eval`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers.utils import logging

import mod_fused
from mod_fused import world
from mod_fused.serving.lm_eval import ModFusedLM

REFERENCE, POLICIES = world.checkpoint("reference"), ["helpful", "humorous"]
FOLDERS = [str(world.checkpoint(name)) for name in POLICIES]
PROMPTS = world.prompts(6, 3)
TASKS = {
    "choices": """
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{document}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "x"
generation_kwargs: {until: ["."], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    ensemble = mod_fused.Ensemble.embedded(["helpful"])
    said = mod_fused.generate(
        ensemble, PROMPTS, weights=[0.5], seed=1, max_new_tokens=20, num_return_sequences=3
    ).texts
    lines = [
        {
            "prompt": p,
            "choices": said[3 * i : 3 * i + 3],
            "document": (p + said[3 * i]) * (1 + 4 * i),
        }
        for i, p in enumerate(PROMPTS)
    ]
    (folder / "data.json").write_text("\n".join(map(json.dumps, lines)))
    for name, text in TASKS.items():
        common = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: "
        common += json.dumps({"data_files": {"test": str(folder / "data.json")}})
        (folder / f"{name}.yaml").write_text(common + text)
    logging.disable_progress_bar()
    return folder


def answers(tasks: Path, model: Any, **options: Any) -> dict[str, list[Any]]:
    """The filtered responses to every document, by task."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0, **options,
    )  # fmt: skip
    return {
        name: [sample["filtered_resps"] for sample in sorted(rows, key=lambda s: s["doc_id"])]
        for name, rows in found["samples"].items()
    }


def ours(weights: list[float], **options: Any) -> ModFusedLM:
    return ModFusedLM(str(REFERENCE), FOLDERS, weights, dtype="float32", **options)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_at_a_corner_every_answer_is_the_policy_s(tasks: Path, divergence: str) -> None:
    options = {"max_length": 48, "batch_size": 4}
    policy = lm_eval.api.registry.get_model("hf")(
        pretrained=FOLDERS[1], dtype="float32", device="cpu", **options
    )
    policy.model.generation_config.max_new_tokens = None  # it would win over the task's length
    expected = answers(tasks, policy)
    found = answers(tasks, ours([0.0, 1.0], divergence=divergence, **options))
    for theirs, own in zip(expected["choices"], found["choices"], strict=True):
        torch.testing.assert_close(
            torch.tensor([x for x, _ in own]),
            torch.tensor([x for x, _ in theirs]),
            atol=2e-3,
            rtol=0,
        )
        assert [greedy for _, greedy in own] == [greedy for _, greedy in theirs]
    rolling = [torch.tensor([float(x[0]) for x in y["documents"]]) for y in (found, expected)]
    torch.testing.assert_close(*rolling, atol=5e-3, rtol=0)
    assert found["answers"] == expected["answers"]
    assert len({str(x) for x in found["answers"]}) > 1


def test_a_mixture_is_scored_as_loglikelihood_scores_it(tasks: Path) -> None:
    options: dict[str, Any] = {"divergence": "forward_kl", "sequence_history": True}
    options["plausibility"] = 1e-3
    model = ours([0.5, 0.75], batch_size=4, **options)
    found = answers(tasks, model)["choices"]
    lines = [json.loads(x) for x in (tasks / "data.json").read_text().splitlines()]
    for line, scores in zip(lines, found, strict=True):
        for choice, (total, _) in zip(line["choices"], scores, strict=True):
            context, answer = model._encode_pair(line["prompt"], choice)
            alone = mod_fused.loglikelihood(
                model.ensemble, input_ids=torch.tensor([context]), responses=[answer],
                weights=[0.5, 0.75], **options,
            )  # fmt: skip
            assert total == pytest.approx(float(alone.totals[0]), abs=2e-3)  # or both -inf


def test_draws_of_one_document_differ_and_do_not_depend_on_the_batch(tasks: Path) -> None:
    kwargs = {"until": [""], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(PROMPTS[0], kwargs), idx=0)
        for _ in range(6)
    ]
    said = [ours([0.5, 0.5], batch_size=size).generate_until(requests) for size in (1, 4)]
    assert said[0] == said[1] and len(set(said[0])) == 6


def test_answers_that_are_drawn_are_cut_as_those_of_generate(tasks: Path) -> None:
    kwargs = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(p, kwargs), idx=0)
        for p in PROMPTS
    ]
    said = {
        cut: ours([0.7, 0.7], divergence="jsd", plausibility=cut, batch_size=6).generate_until(
            requests
        )
        for cut in ("auto", None, 0.5)
    }
    models = mod_fused.Ensemble.embedded(POLICIES, dtype="float32")
    options: dict[str, Any] = {"weights": [0.7, 0.7], "divergence": "jsd", "max_new_tokens": 20}
    for cut, texts in said.items():
        # Row b of a call with one seed has SplitMix64(seed + b), as request b has.
        assert (
            texts == mod_fused.generate(models, PROMPTS, seed=0, plausibility=cut, **options).texts
        )
    assert len({str(texts) for texts in said.values()}) == 3


def test_rows_that_fit_alone_fit_in_a_batch(tasks: Path) -> None:
    model = ours([0.5, 0.5], max_length=48)
    rows = [(None, [5] * 44, [7] * 3), (None, [6] * 4, [8] * 40), (None, [9] * 60, [3] * 2)]
    alone = model._loglikelihood_tokens(rows)
    model.batch_size = 3
    torch.testing.assert_close(
        torch.tensor(model._loglikelihood_tokens(rows)), torch.tensor(alone), atol=1e-3, rtol=0
    )


def test_bad_arguments_are_refused(tasks: Path) -> None:
    for weights, options, message in (
        ([0.5], {}, r"weights must have shape \[2\]"),
        ([0.5, 0.5], {"divergence": "nope"}, "nope"),
        ([0.5, 0.5], {"plausibility": 3.0}, "plausibility"),
        (
            [0.5, 0.5],
            {"batch_size": "auto"},
            "batch_size must be a whole number of rows, got 'auto'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ours(weights, **options)
    model = ours([0.5, 0.5], max_length=24)
    with pytest.raises(ValueError, match="max_gen_toks must be below max_length = 24, got 24"):
        answers(tasks, model)
    with pytest.raises(ValueError, match="unknown arguments of a generation: num_beams"):
        answers(tasks, ours([0.5, 0.5]), gen_kwargs="num_beams=4")
