"""The commands, run in process with tiny settings, and the measures behind them."""

import csv
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from mod_fused import Ensemble, world
from mod_fused.app import doctor, terminal
from mod_fused.app import trade_off as sweep
from mod_fused.cli import main

PNG = b"\x89PNG\r\n\x1a\n"
QUESTION = "How do I bake bread?"


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["generate", "--divergence", "total_variation"], "forward_kl, jsd"),
        (["generate", "--divergence", "alpha:2"], "strictly between 0 and 1"),
        (["generate", "--normalizer", "none"], "exact"),
        (["generate", "--plausibility", "2"], "off or a number in (0, 1]"),
        (["generate", "--plausibility", "none"], "off or a number in (0, 1]"),
        (["generate", "--device", "abacus"], "abacus"),
        (["generate", "--device", "cuda:99"], "CUDA devices"),
        (["generate", "--device", "meta"], "torch cannot use 'meta'"),
        (["generate", "--device", "mps"], "torch cannot use 'mps'"),
        (["generate", "--device", "hpu"], "torch cannot use 'hpu'"),
        (["generate", "--device", "mkldnn"], "torch cannot use 'mkldnn'"),
        (["generate", "--max-new-tokens", "0"], ">= 1"),
        (["generate", "--weights", "1", "2", "--prompt", "x"], "needs 3 numbers"),
        (["generate", "--weights", "1", "2", "x", "--prompt", "x"], "must be numbers"),
        (["generate", "--weights", "1", "nan", "0", "--prompt", "x"], "nan"),
        (["generate", "--weights", "-1,2,0", "--prompt", "x"], "--weights"),
        (["generate", "--prompt", "x", "--top-p", "2"], "top_p"),
        (["generate", "--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", "--prompt", "x", "--temperature", "1e60"], "temperature"),
        (["generate", "--prompt", " "], "empty"),
        (["generate", "--num-candidates", "0", "--prompt", "x"], ">= 1"),
        (["generate", "--num-candidates", "2", "--greedy", "--prompt", "x"], "with --greedy"),
        (
            ["generate", "--num-candidates", "2", "--temperature", "0", "--prompt", "x"],
            "temperature above 0",
        ),
        (
            ["generate", "--num-candidates", "2", "--values", "helpful", "--robust"],
            "with --robust",
        ),
        (["generate", "--resample-below", "0.5", "--prompt", "x"], "goes with --num-candidates"),
        (
            ["generate", "--num-candidates", "2", "--resample-below", "2", "--prompt", "x"],
            "a share of N",
        ),
        (["generate", "--prompt", "x", "--num-beams", "0"], ">= 1"),
        (["generate", "--prompt", "x", "--num-beams", "2", "--top-k", "3"], "top_k"),
        (["generate", "--prompt", "x", "--length-penalty", "2"], "goes with --num-beams"),
        (["generate", "--prompt", "x", "--one-head"], "different values of weight"),
        (["generate", "--prompt", "x", "--one-head", "--divergence", "jsd"], "divergence needs"),
        (["generate", "--prompt", "x", "--one-head", "--json"], "leave out --json"),
        (
            ["generate", "--score", "helpful", "--best-of", "2", "--num-beams", "2"],
            "leave out --best-of",
        ),
        (["generate", "--objectives", "helpful,rude", "--prompt", "x"], "rude"),
        (["generate", "--objectives", "helpful,helpful", "--prompt", "x"], "different ones"),
        (["generate", "--objectives", ",", "--prompt", "x"], "--objectives"),
        (["generate", "--reference", "somewhere", "--prompt", "x"], "--policy"),
        (["generate", "--policy", "./no/such/folder", "--prompt", "x"], "no/such/folder"),
        (["generate", "--policy", "/nope", "--prompt", "x"], "folder /nope does not exist"),
        (["sweep", "--reference", "a/b/c", "--policy", "p"], "folder a/b/c does not exist"),
        (["generate", "--adapters", "a/b/c", "--prompt", "x"], "folder a/b/c does not exist"),
        (["generate", "--adapters", "a", "--prompt", "x"], "--adapters need --reference"),
        (
            ["generate", "--reference", "r", "--adapters", "a", "--policy", "p", "--prompt", "x"],
            "leave out --policy",
        ),
        (
            ["generate", "--adapters", "a", "--reference", "r", "--objectives", "helpful"],
            "leave it out with --policy and --adapters",
        ),
        (["generate", "--policy", "p", "--objectives", "helpful", "--prompt", "x"], "--objectives"),
        (["sweep", "--points", "1"], ">= 2"),
        (["sweep", "--reward", "math:sqrt"], "own models"),
        (["sweep", "--policy", "p", "--reference", "r"], "--prompt-file"),
        (["sweep", "--prompt-file", "no-such-file"], "no-such-file"),
        (["sweep", "--csv", "no/such/folder/x.csv"], "folder that exists"),
        (["sweep", "--picture", "x.foo"], "cannot draw x.foo: expected a name ending in"),
        (["sweep", "--picture", "x"], ".png"),
        (["demo", "--out", "no/such/folder/x.png"], "folder that exists"),
        (["demo", "--out", "x.foo"], "cannot draw x.foo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_give_one_line_and_exit_code_2(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1 and err.startswith("mod-fused: ")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_error_is_one_line_and_the_debug_variable_shows_the_traceback(
    capsys, monkeypatch
):
    monkeypatch.setattr("mod_fused.app.doctor.run", crash)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "mod-fused: no kernel\n"
    monkeypatch.setenv("MOD_FUSED_DEBUG", "1")
    with pytest.raises(RuntimeError, match="no kernel"):
        main(["doctor"])


def test_version_and_help_exit_with_0(capsys):
    for argv in (["--version"], ["--help"], ["sweep", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0


# ---- generate ------------------------------------------------------------------------------------


def generated(capsys, *argv: str) -> list[dict]:
    assert main(["generate", "--json", "--max-new-tokens", "12", *argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_greedy_generate_at_a_corner_is_the_policys_own_generate(capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.checkpoint("humorous"))
    policy = AutoModelForCausalLM.from_pretrained(world.checkpoint("humorous")).eval()
    inputs = tokenizer(world.format_prompt(QUESTION), return_tensors="pt")
    with torch.no_grad():
        tokens = policy.generate(**inputs, do_sample=False, max_new_tokens=12)
    own = tokens[0, inputs["input_ids"].shape[1] :].tolist()

    corner = ["--greedy", "--weights", "0", "0", "1", "--prompt", QUESTION]
    (record,) = generated(capsys, *corner)
    assert record["tokens"] == own
    assert record["prompt"] == world.format_prompt(QUESTION)
    assert set(record["rewards"]) == set(world.OBJECTIVES)
    for objective, reward in record["rewards"].items():
        assert reward == world.reward(objective, record["prompt"], record["text"])
    # At a corner pi* is the policy: its column of log-probabilities is log pi*.
    third_policy = [row[3] for row in record["model_logprobs"]]
    np.testing.assert_allclose(record["logprobs"], third_policy, atol=1e-4)

    # The same text, streamed, and from the same models named as own ones.
    assert main(["generate", "--max-new-tokens", "12", *corner]) == 0
    assert capsys.readouterr().out.rstrip("\n") == record["text"]
    folders = ["--reference", str(world.checkpoint("reference"))]
    for name in world.OBJECTIVES:
        folders += ["--policy", str(world.checkpoint(name))]
    own_prompt = [*corner[:-1], world.format_prompt(QUESTION)]
    (again,) = generated(capsys, *folders, *own_prompt)
    assert again["tokens"] == record["tokens"]
    assert "rewards" not in again


def test_beams_at_a_corner_find_what_the_policys_own_beam_search_does(capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.checkpoint("humorous"))
    policy = AutoModelForCausalLM.from_pretrained(world.checkpoint("humorous")).eval()
    inputs = tokenizer(world.format_prompt(QUESTION), return_tensors="pt")
    own = policy.generate(
        **inputs,
        do_sample=False,
        num_beams=3,
        length_penalty=0.5,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = ["--num-beams", "3", "--length-penalty", "0.5"]
    corner = [*beams, "--weights", "0", "0", "1", "--prompt", QUESTION]
    (record,) = generated(capsys, *corner)
    assert record["tokens"] == own.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert record["score"] == pytest.approx(own.sequences_scores.item(), abs=1e-4)
    assert main(["generate", "--max-new-tokens", "12", *corner]) == 0
    assert capsys.readouterr().out.rstrip("\n") == record["text"]


def test_models_that_share_a_head_answer_alike_with_one(capsys):
    folder = str(world.checkpoint("helpful"))
    argv = ["generate", "--reference", folder, "--policy", folder, "--policy", folder]
    argv += ["--weights=0.75,-0.5", "--prompt", QUESTION, "--seed", "1", "--max-new-tokens", "8"]
    assert main(argv) == 0
    expected = capsys.readouterr().out
    assert main([*argv, "--one-head"]) == 0
    assert capsys.readouterr().out == expected


def test_generate_reads_prompts_from_standard_input(capsys, monkeypatch):
    questions = [QUESTION, "How do I sleep well?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(questions) + "\n"))
    records = generated(capsys, "--seed", "3", "--divergence", "jsd")
    assert [r["prompt"] for r in records] == [world.format_prompt(q) for q in questions]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["generate"]) == 2
    assert "standard input" in capsys.readouterr().err


def test_generate_passes_its_options_on(capsys):
    plain = ["--prompt", QUESTION, "--seed", "5"]
    (drawn,) = generated(capsys, *plain)
    (same,) = generated(capsys, *plain)
    assert same == drawn
    (greedy,) = generated(capsys, *plain, "--greedy")
    for one_token in (["--top-k", "1"], ["--min-p", "1"], ["--temperature", "0"]):
        assert generated(capsys, *plain, *one_token)[0]["tokens"] == greedy["tokens"]
    assert generated(capsys, *plain, "--top-k", str(2**64))[0]["tokens"] == drawn["tokens"]
    assert generated(capsys, *plain, "--top-p", "1e-6")[0]["tokens"] == greedy["tokens"]
    repeated = generated(capsys, *plain, "--greedy", "--repetition-penalty", "0.01")[0]
    assert len(set(repeated["tokens"])) < len(set(greedy["tokens"]))
    others = [generated(capsys, "--prompt", QUESTION, "--seed", str(s))[0] for s in range(6, 10)]
    assert any(other["tokens"] != drawn["tokens"] for other in others)


def test_generate_chooses_among_candidates_and_says_how_they_weigh(capsys):
    plain = ["--prompt", QUESTION, "--seed", "5"]
    (one,) = generated(capsys, *plain, "--num-candidates", "1")
    assert one["weights"] == [1.0] and one["effective_sample_size"] == 1.0
    (drawn,) = generated(capsys, *plain)
    assert "weights" not in drawn and drawn["tokens"] == one["tokens"]
    (chosen,) = generated(capsys, *plain, "--num-candidates", "5")
    assert len(chosen["weights"]) == 5 and sum(chosen["weights"]) == pytest.approx(1.0)
    assert 1.0 < chosen["effective_sample_size"] < 5.0
    guided = ["--values", "helpful", "--strength", "10", "--objectives", "humorous"]
    several = [*plain, "--num-candidates", "5", *guided]
    (tilted,) = generated(capsys, *several)
    (resampled,) = generated(capsys, *several, "--resample-below", "1")
    assert tilted["weights"] != resampled["weights"] != chosen["weights"]
    assert tilted["resamplings"] == 0 < resampled["resamplings"]
    # Blocks that have been chosen are streamed.
    best = ["--best-of", "3", "--block-length", "4", "--values", "helpful", *plain]
    (whole,) = generated(capsys, *best)
    assert main(["generate", "--max-new-tokens", "12", *best]) == 0
    assert capsys.readouterr().out.rstrip("\n") == whole["text"]
    assert main(["generate", "--max-new-tokens", "12", *plain, "--num-candidates", "5"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == chosen["text"]


def test_negative_weights_may_be_written_with_commas(capsys):
    plain = ["--prompt", QUESTION, "--greedy"]
    assert generated(capsys, *plain, "--weights=-1,2,0") == generated(
        capsys, *plain, "--weights", "-1", "2", "0"
    )


# ---- sweep ---------------------------------------------------------------------------------------


def read_csv(path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_sweep_writes_a_table_of_the_simplex_and_a_picture(capsys, tmp_path):
    argv = ["sweep", "--points", "3", "--prompts", "6", "--max-new-tokens", "10"]
    argv += ["--csv", str(tmp_path / "s.csv"), "--picture", str(tmp_path / "s.png")]
    assert main([*argv, "--divergence", "reverse_kl"]) == 0
    rows = read_csv(tmp_path / "s.csv")
    assert len(rows) == 6
    for row in rows:
        assert math.isclose(sum(row[f"weight_{name}"] for name in world.OBJECTIVES), 1.0)
        assert all(0.0 <= row[f"reward_{name}"] <= 1.0 for name in world.OBJECTIVES)
        assert row["kl_se"] > 0 and row["prompts"] == 6 and row["samples"] == 1
        for name in world.OBJECTIVES:
            if row[f"weight_{name}"] == 1.0:  # a corner: pi* is the policy
                assert math.isclose(row["kl"], row[f"log_ratio_{name}"], abs_tol=1e-3)
    assert (tmp_path / "s.png").read_bytes().startswith(PNG)
    out = capsys.readouterr().out
    assert "KL(pi*||ref)" in out and out.count("beyond the straight line") == 3


def test_sweep_of_own_models_with_and_without_rewards(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.py").write_text("def length(prompt, response):\n    return len(response)\n")
    (tmp_path / "prompts.txt").write_text("\n".join([QUESTION, "How do I sleep?"]))
    argv = ["sweep", "--points", "2", "--max-new-tokens", "6", "--prompt-file", "prompts.txt"]
    argv += ["--reference", str(world.checkpoint("reference"))]
    argv += ["--policy", str(world.checkpoint("helpful"))]

    assert main(argv) == 0
    (row,) = read_csv("mod_fused_sweep.csv")
    assert row["weight_policy_1"] == 1.0 and "reward_policy_1" not in row
    assert "no picture: a trade-off needs at least two policies" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    assert main([*argv, "--reward", "scores:length", "--samples", "2"]) == 0
    (row,) = read_csv("mod_fused_sweep.csv")
    assert row["reward_policy_1"] > 1.0 and row["samples"] == 2
    capsys.readouterr()
    for wrong in ("scores:width", "no_such_module:length", "scores"):
        assert main([*argv, "--reward", wrong]) == 2
        assert wrong in capsys.readouterr().err


def test_evaluate_draws_the_same_at_equal_weights_and_for_any_batch_size(capsys):

    ensemble = Ensemble.embedded(["helpful", "humorous"])
    rewards = [world.REWARDS["helpful"], world.REWARDS["humorous"]]
    grid = [(0.5, 0.5), (1.0, 0.0), (0.5, 0.5)]
    prompts = world.prompts(4, seed=1)
    whole, pieces = (
        sweep.evaluate(
            ensemble, prompts, grid, rewards, samples=2, batch_size=size, max_new_tokens=8
        )
        for size in (100, 3)
    )
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a.rewards, b.rewards)
        np.testing.assert_allclose(a.kl, b.kl, atol=1e-3)
        assert a.rewards.shape == (2, 4) and a.kl.shape == (4,)
    np.testing.assert_array_equal(whole[0].rewards, whole[2].rewards)
    np.testing.assert_allclose(whole[0].kl, whole[2].kl, atol=1e-3)
    assert np.abs(whole[0].kl - whole[1].kl).max() > 0.1


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor_passes_on_a_working_machine(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in ("python", torch.__version__, "backend", *doctor.DIVERGENCES):
        assert expected in out
    assert "FAILED" not in out and "checks passed" in out


def off_by_a_little(*args, **kwargs):
    out = doctor_log_probs(*args, **kwargs)
    return torch.log_softmax(out * (1 + 1e-4), -1)


def next_token(*args, **kwargs):
    out = doctor_sample(*args, **kwargs)
    return out._replace(tokens=out.tokens + 1)


def crash(*args, **kwargs):
    raise RuntimeError("no kernel\nfor this device")


doctor_log_probs, doctor_sample = doctor.log_probs, doctor.sample


@pytest.mark.parametrize(
    ("name", "broken", "failures"),
    [("log_probs", off_by_a_little, 5), ("sample", next_token, 5), ("log_probs", crash, 5)],
)
def test_doctor_fails_when_a_backend_is_broken(name, broken, failures, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "working", lambda: [("torch", "cpu")])
    monkeypatch.setattr(doctor, name, broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"{failures} of " in out and out.count("FAILED") == failures + 1
    if broken is crash:
        assert "RuntimeError: no kernel for this device" in out


def test_doctor_fails_when_no_backend_works(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "backends", lambda: {n: "broken" for n in ("torch", "cpu", "triton")}
    )
    assert main(["doctor"]) == 1
    assert "no backend works" in capsys.readouterr().out


# ---- terminal ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_output_is_plain_without_rich_and_rich_on_a_terminal(monkeypatch):
    def show() -> tuple[str, str]:
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        terminal.write("[bold] :bread:", style="bold")
        terminal.table(["name", "value"], [["[dim]", ":bread:"]])
        assert list(terminal.track(iter(range(3)), "counting", 3)) == [0, 1, 2]
        return out.getvalue(), err.getvalue()

    out, err = show()
    assert "[bold] :bread:" in out and "counting" in err
    assert "[dim]" in out and out.count(":bread:") == 2
    monkeypatch.setitem(sys.modules, "rich.console", None)
    out, err = show()
    assert out == "[bold] :bread:\nname   value\n[dim]  :bread:\n"
    assert err.splitlines()[-1] == "counting: 3/3"


def test_text_stream_holds_back_unfinished_characters(capsys):
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    stream = terminal.TextStream(Bytes())
    stream.put(torch.zeros(1, 3))  # the prompt
    shown = []
    for byte in "né!é".encode()[:-1]:
        stream.put(torch.tensor([byte]))
        shown.append(capsys.readouterr().out)
    stream.end()
    assert [*shown, capsys.readouterr().out] == ["n", "", "é", "!", "", "\ufffd"]
