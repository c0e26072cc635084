"""The demo, on the embedded models and on the caller's; the measures and the picture behind it."""

import math
import re
import sys

import numpy as np
import pytest
import torch

from mod_fused import Ensemble, generate, world
from mod_fused.app import demo
from mod_fused.app import trade_off as sweep
from mod_fused.cli import main

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- measures and picture ------------------------------------------------------------------------


def test_simplex_grid_is_the_lattice():
    for policies, points in [(1, 2), (2, 5), (3, 5), (4, 3)]:
        grid = sweep.simplex_grid(policies, points)
        assert len(set(grid)) == len(grid) == math.comb(points - 1 + policies - 1, policies - 1)
        assert all(math.isclose(sum(weights), 1.0) and min(weights) >= 0 for weights in grid)
    with pytest.raises(ValueError, match="2 points"):
        sweep.simplex_grid(3, 1)


def test_mean_and_error_on_known_numbers():
    mean, error = sweep.mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert math.isclose(error, math.sqrt(5 / 3) / 2)
    assert math.isnan(sweep.mean_and_error(np.array([1.0]))[1])


def curve(bulge: float, prompts: int = 50) -> list[sweep.Point]:
    """Rewards from (3, 1) at w = (1, 0) to (1, 2) at (0, 1), `bulge` off the line in the middle."""
    noise = np.random.default_rng(0).normal(size=(2, prompts))
    noise -= noise.mean(1, keepdims=True)
    points = []
    for w in (0.0, 0.5, 1.0):  # not in the order of the curve
        off = bulge * 4 * w * (1 - w)
        mean = np.array([1 + 2 * w + 2 * off / 2, 2 - w + 1 * off / 2])
        rewards = mean[:, None] + noise
        points.append(sweep.Point((w, 0.0, 1 - w), rewards[[0, 0, 1]], rewards, noise[0], 1))
    return points


def test_lead_over_line_is_zero_on_the_line_and_the_bulge_beyond_it():
    for bulge in (0.0, 0.3, -0.2):
        lead, error = sweep.lead_over_line(curve(bulge), 0, 2)
        assert math.isclose(lead, bulge, abs_tol=1e-12)
        assert error < 1e-9  # the noise is the same at all weights, so it cancels
    assert list(sweep.leads(curve(0.3), ["a", "b", "c"])) == ["a - c"]


def test_lead_over_line_is_undefined_without_ends_or_order():
    points = curve(0.3)
    assert math.isnan(sweep.lead_over_line(points[1:], 0, 2)[0])  # the end (0, 1) is missing
    assert math.isnan(sweep.lead_over_line(points, 0, 1)[0])
    swapped = [sweep.Point(p.weights[::-1], p.rewards, p.log_ratios, p.kl, 1) for p in points]
    lead, error = sweep.lead_over_line(swapped, 0, 2)
    assert "not defined" in sweep.signed(lead, error)
    assert sweep.signed(0.1, math.nan) == "+0.100, too few prompts for its error"


def test_the_picture_names_every_mark_and_clips_no_text(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    points = curve(0.3)
    unmixed = sweep.Point((0.0, 0.0, 0.0), np.zeros((3, 50)), np.zeros((3, 50)), np.zeros(50), 1)
    others = {"soup": curve(0.1), "best of 4": curve(0.0)}
    sweep.draw(tmp_path / "x.png", [unmixed, *points], ["a", "b", "c"], "title", others)
    (figure,) = shown
    (axes,) = figure.axes  # of the only pair whose edge was measured
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["reference"].get_xydata().tolist() == [[0.0, 0.0]]
    for name, bulge in {"soup": 0.1, "best of 4": 0.0}.items():
        middle = lines[name].get_xydata()[1]  # (2, 1.5) on the line, bulge on its side
        np.testing.assert_allclose(middle, [2.0 + bulge, 1.5 + bulge / 2])
    (legend,) = figure.legends
    figure.draw_without_rendering()
    named = [text.get_text() for text in legend.get_texts()]
    marks = [x for x in axes.get_legend_handles_labels()[1] if not x.startswith("_")]
    assert sorted(named) == sorted(marks) and len(marks) == 5
    assert {text.get_text() for text in axes.texts} == {
        "only a",
        "only c",
        "0.5 / 0.5",
        "reference",
    }
    page = figure.bbox.padded(1)
    for text in [*axes.texts, *legend.get_texts(), axes.xaxis.label, axes.yaxis.label]:
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1


# ---- the embedded models -------------------------------------------------------------------------


def test_demo_streams_answers_tabulates_rewards_and_draws(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mod_fused.app.demo.MAX_NEW_TOKENS", 8)
    picture = tmp_path / "curve.png"
    assert main(["demo", "--quick", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert world.prompts(1, seed=0)[0] in out
    for weights in ("the reference alone", "1 helpful", "1 humorous", "0.5 helpful + 0.5 humorous"):
        assert f"[{weights}]" in out
    assert out.count("rewards: helpful") == 4
    rows = [line.split("  ") for line in out.splitlines() if line.startswith(("0, ", "1, "))]
    reference = next(row for row in rows if row[0] == "0, 0, 0")
    assert reference[-1].startswith("0.000")  # KL of the reference from itself
    assert out.count(" - ") >= 3 and str(picture) in out
    assert "tuned with reverse KL" in out
    assert picture.read_bytes().startswith(PNG)


def test_the_alternatives_are_the_soup_and_the_best_answer_by_the_weighted_reward(monkeypatch):
    pool = np.random.default_rng(3).random((3, 50, 4))
    asked = []

    def rewards(model, tokenizer, prompts, seed, copies=1):
        asked.append(model)
        return pool[..., :copies]

    monkeypatch.setattr(demo, "_rewards", rewards)
    ensemble = Ensemble.embedded(list(world.OBJECTIVES))
    found = demo.alternatives(ensemble, curve(0.3), 50, 0)
    soup, best = found.values()
    assert [p.weights for p in soup] == [p.weights for p in best] == [p.weights for p in curve(0.3)]
    np.testing.assert_array_equal(soup[0].rewards, curve(0.3)[0].rewards)  # a policy
    np.testing.assert_array_equal(soup[1].rewards, pool[..., 0])
    np.testing.assert_array_equal(best[2].rewards[0], pool[0].max(1))  # of all the weight
    merged, reference = asked
    assert reference is ensemble.models[0]
    models = (merged, ensemble.models[1], ensemble.models[3])
    embeddings = [m.get_input_embeddings().weight for m in models]
    torch.testing.assert_close(embeddings[0], 0.5 * embeddings[1] + 0.5 * embeddings[2])


def test_demo_without_matplotlib_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mod_fused.app.demo.MAX_NEW_TOKENS", 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", "--quick", "--out", str(tmp_path / "curve.png")]) == 0
    assert "No picture: a picture needs matplotlib" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# ---- models of the caller's ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """The folders of a reference and two policies, with chat templates."""
    from transformers import AutoTokenizer

    folders = []
    for name in ("reference", "helpful", "humorous"):
        folder = tmp_path_factory.mktemp("chats") / name
        folder.mkdir()
        for file in world.checkpoint(name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "User: {{ messages[-1]['content'] }}\nAssistant:"
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def test_demo_of_own_models_streams_their_answers_at_several_weights(chats, capsys):
    chat, helpful, humorous = chats
    words = ["demo", "--model", chat, "--policy", helpful, "--policy", humorous]
    words += ["--max-new-tokens", "9", "--seed", "4", "--prompt", "How do I keep bees?"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    ensemble = Ensemble.from_pretrained(chat, [helpful, humorous])
    prompt = [{"role": "user", "content": "How do I keep bees?"}]
    names = ("the reference alone", "1 helpful", "1 humorous", "0.5 helpful + 0.5 humorous")
    pieces = re.split(r"\n\[(.*?)\]\n?", shown)
    assert tuple(pieces[1::2]) == names
    for weights, said in zip(([0, 0], [1, 0], [0, 1], [0.5, 0.5]), pieces[2::2], strict=True):
        out = generate(
            ensemble, prompt, weights=weights, max_new_tokens=9, seed=4, return_model_logprobs=True
        )
        answer, nats = said.rsplit("log pi*/pi_ref: ", 1)
        assert answer.strip() == out.texts[0].strip()
        away = float((out.logprobs - out.model_logprobs[..., 0]).sum())
        assert float(nats.split()[0]) == pytest.approx(away, abs=0.051)


def test_demo_without_a_chat_template_asks_in_plain_text(chats, capsys):
    reference, helpful = chats[0], str(world.checkpoint("helpful"))
    words = ["demo", "--model", reference, "--policy", helpful, "--quick", "--max-new-tokens", "2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("log pi*/pi_ref") == 2 and demo.QUESTIONS[0] in shown
    assert demo.QUESTIONS[1] not in shown
    assert main([*words, "--system", "Be brief."]) == 2
    assert "--system needs a chat template in every" in capsys.readouterr().err


def test_demo_stops_at_a_step_without_a_distribution(chats, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    broken = AutoModelForCausalLM.from_pretrained(chats[1])
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(chats[1]).save_pretrained(tmp_path)
    words = ["demo", "--model", chats[0], "--policy", str(tmp_path), "--quick"]
    assert main([*words, "--max-new-tokens", "2"]) == 2
    shown = capsys.readouterr()
    assert shown.out.count("log pi*/pi_ref") == 1  # of the reference alone
    assert "no valid distribution at weights [1.0]" in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "r"], "--model needs at least one of --policy and --adapters"),
        (["--policy", "p"], "go with --model"),
        (["--prompt", "x"], "go with --model"),
        (["--dtype", "float32"], "go with --model"),
        (["--max-new-tokens", "5"], "go with --model"),
        (["--model", "r", "--policy", "p", "--out", "x.png"], "--out is the picture of"),
        (["--model", "r", "--policy", "p", "--adapters", "a"], "leave out --policy"),
        (["--model", "no/such/folder"], "does not exist"),
    ],
)
def test_demo_refuses_options_that_do_not_fit(words, said, capsys):
    assert main(["demo", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
