"""Value guidance on the command line, in process with tiny settings, and the scores behind it."""

import csv
import json
import math

import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble, generate, guidance, world
from mod_fused.cli import main

PNG = b"\x89PNG\r\n\x1a\n"
PROMPT = world.format_prompt("How do I bake bread?")


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def generated(capsys, *argv: str) -> list[dict]:
    assert main(["generate", "--json", "--max-new-tokens", "12", "--prompt", PROMPT, *argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "--strength", "2"], "--strength goes with --values"),
        (["generate", "--candidates", "2"], "--candidates goes with --values"),
        (["generate", "--values", "rude"], "got rude"),
        (["generate", "--values", "helpful", "--strength", "1,2"], "needs 1 or 1 numbers"),
        (["generate", "--values", "helpful", "--strength", "x"], "numbers with commas"),
        (["generate", "--values", "helpful", "--strength", "nan"], "finite"),
        (["generate", "--values", "helpful", "--weights", "1"], "needs 0 numbers"),
        (["generate", "--robust"], "--robust goes with --values"),
        (["generate", "--robust", "--values", "helpful", "--strength", "-1"], "positive"),
        (["generate", "--robust", "--values", "helpful", "--strength", "1,2"], "one --strength"),
        (["generate", "--robust", "--values", "helpful", "--divergence", "jsd"], "reverse_kl"),
        (["generate", "--robust", "--values", "helpful", "--best-of", "2"], "leave out --best-of"),
        (["generate", "--block-length", "2"], "go with --best-of"),
        (["generate", "--score", "helpful"], "go with --best-of"),
        (["generate", "--best-of", "2"], "--values (scorers) or --score"),
        (["generate", "--best-of", "0", "--score", "helpful"], ">= 1"),
        (["generate", "--best-of", "2", "--score", "rude"], "got rude"),
        (["generate", "--best-of", "2", "--score", "helpful", "--block-length", "2"], "complete"),
        (["generate", "--best-of", "2", "--values", "helpful", "--candidates", "2"], "drawing"),
        (["sweep", "--strength", "2"], "--strength goes with --values"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_give_one_line_and_exit_code_2(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, *(["--prompt", PROMPT] if argv[0] == "generate" else [])]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_values_tilt_the_reference_or_a_mixture_as_generate_does(capsys):
    for names, weights in ([], []), (["humorous"], [1.0]):
        out = generate(
            Ensemble.embedded(names),
            [PROMPT],
            weights=weights,
            value_fn=guidance.Guidance.embedded(["helpful", "harmless"]),
            value_weights=[4.0, -2.0],
            max_new_tokens=12,
            seed=3,
        )
        argv = ["--values", "helpful,harmless", "--strength=4,-2", "--seed", "3"]
        argv += ["--objectives", ",".join(names)] if names else []
        (record,) = generated(capsys, *argv)
        assert record["tokens"] == out.tokens[0, : out.lengths[0]].tolist()
        assert set(record["rewards"]) == set(names or world.OBJECTIVES)


def test_dense_and_scalar_scorers_are_told_apart_by_their_folders(capsys, tmp_path):
    for name, model in (("ref", tiny.llama(0)), ("d", tiny.llama(1)), ("s", tiny.llama_value(1))):
        model.save_pretrained(tmp_path / name)
    tiny.tokenizer().save_pretrained(tmp_path / "ref")
    argv = ["generate", "--json", "--reference", str(tmp_path / "ref"), "--prompt", tiny.PROMPTS[0]]
    argv += ["--max-new-tokens", "4", "--strength", "3", "--values"]
    capsys.readouterr()
    assert main([*argv, str(tmp_path / "s")]) == 2
    assert "candidates=K" in capsys.readouterr().err
    for name, model in (("d", tiny.llama(1)), ("s", tiny.llama_value(1))):
        assert main([*argv, str(tmp_path / name), "--candidates", "5"]) == 0
        record = json.loads(capsys.readouterr().out)
        out = generate(
            Ensemble([tiny.llama(0)], [tiny.tokenizer()]),
            [tiny.PROMPTS[0]],
            weights=[],
            value_fn=guidance.Guidance([model], candidates=5),
            value_weights=[3.0],
            max_new_tokens=4,
            seed=0,
        )
        assert record["tokens"] == out.tokens[0, : out.lengths[0]].tolist()


def test_robust_weighs_the_values_for_the_worst(capsys):
    argv = ["--values", "helpful,humorous", "--strength", "8", "--seed", "2"]
    (record,) = generated(capsys, *argv, "--robust")
    scorers = guidance.Guidance.embedded(["helpful", "humorous"]).scorers
    out = generate(
        Ensemble.embedded([]),
        [world.format_prompt(PROMPT)],
        weights=[],
        max_new_tokens=12,
        seed=2,
        **guidance.robust(scorers, 8.0),
    )
    assert record["tokens"] == out.tokens[0, : out.lengths[0]].tolist()
    (equal,) = generated(capsys, *argv)
    assert record["logprobs"] != equal["logprobs"]


def test_best_of_keeps_the_response_of_the_best_reward(capsys):
    (best,) = generated(capsys, "--best-of", "6", "--score", "helpful,humorous", "--seed", "2")
    drawn = generate(
        Ensemble.embedded([]),
        [PROMPT],
        weights=[],
        value_fn=lambda step, ids: torch.zeros(1, 6, len(Ensemble.embedded([]).tokenizer)),
        num_return_sequences=6,
        max_new_tokens=12,
        seed=2,
    )
    assert drawn.texts is not None
    totals = [
        sum(world.reward(name, PROMPT, text) for name in ("helpful", "humorous"))
        for text in drawn.texts
    ]
    assert len(set(totals)) > 1
    assert math.isclose(best["score"], max(totals), rel_tol=1e-6)
    assert best["text"] == drawn.texts[totals.index(max(totals))]


@pytest.mark.parametrize("scalar", [False, True])
def test_prefix_score_is_the_value_of_the_last_token_under_any_padding(scalar):
    model = tiny.llama_value(1) if scalar else tiny.llama(1)
    rows = [[4, 5, 6], [3, 7, 2, 8, 6]]
    expected = []
    for ids in rows:  # alone and unpadded
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        expected.append(float(logits[-1, 0] if scalar else logits[-2, ids[-1]]))
    padded = torch.tensor([[0, 0, *rows[0], 0], [0, *rows[1]]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    got = guidance.prefix_score([model, model], [2.0, -0.5])(padded, mask)
    torch.testing.assert_close(got, 1.5 * torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_blockwise_chooses_by_the_scorers(capsys):
    score = guidance.prefix_score(
        guidance.Guidance.embedded(["helpful", "humorous"]).scorers, [2, -1]
    )
    options = {"score_fn": score, "max_new_tokens": 12, "seed": 1}
    argv = ["--best-of", "4", "--values", "helpful,humorous", "--strength", "2,-1", "--seed", "1"]
    for block, extra in ((3, ["--block-length", "3"]), (12, [])):
        out = guidance.blockwise_best_of_k(
            Ensemble.embedded([]), [PROMPT], k=4, block_length=block, **options
        )
        (record,) = generated(capsys, *argv, *extra)
        assert record["tokens"] == out.tokens[0, : out.lengths[0]].tolist()
        assert math.isclose(record["score"], float(out.scores[0]), rel_tol=1e-4)


def test_sweep_over_strengths_writes_table_and_picture(capsys, tmp_path):
    argv = ["sweep", "--values", "helpful", "--objectives", "humorous,harmless", "--points", "2"]
    argv += ["--strength", "0,8", "--prompts", "12", "--max-new-tokens", "12"]
    argv += ["--csv", str(tmp_path / "s.csv"), "--picture", str(tmp_path / "s.png")]
    assert main(argv) == 0
    with open(tmp_path / "s.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [(r["strength"], r["weight_humorous"]) for r in rows] == [(0, 1), (0, 0), (8, 1), (8, 0)]
    assert rows[2]["reward_helpful"] > rows[0]["reward_helpful"] and rows[0]["kl_se"] > 0
    assert (tmp_path / "s.png").read_bytes().startswith(PNG)
    assert "KL(pi*||ref)" in capsys.readouterr().out
