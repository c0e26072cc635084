"""The cases beside `cpu`: each runs end to end on a tiny grid and refuses what is wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

import mod_fused
from bench import case as bench_case
from bench import grid, measure, report, run
from bench import problem as problems
from bench.cases import CASES, decoder, filters, scaling
from bench.cases.host import HOST
from bench.contestants import loops, models
from bench.logits import RECORDED, SETTINGS
from bench.problem import FILTERS, Problem, logits
from mod_fused import reference, world
from mod_fused.decoding import steps as decoding


def run_json(tmp_path: Path, *words: str) -> tuple[int, dict]:
    file = tmp_path / "result.json"
    status = run.main([*words, "--json", str(file)])
    return status, report.load(file)


@pytest.mark.parametrize(
    "words",
    [
        ("scaling", "--divergences", "jsd"),
        ("filters", "--divergences", "reverse_kl"),
        ("distributions", "--divergences", "forward_kl"),
        ("host",),
    ],
)
def test_case_runs_on_every_problem_of_its_quick_grid(tmp_path, words):
    status, result = run_json(tmp_path, *words, "--quick", "--budget", "0.001")
    assert status == 0
    case = CASES[words[0]]
    grids = [g for g in case.quick for _ in g.problems()]
    assert 0 < len(result["rows"]) <= len(grids)
    first = result["contestants"][0]
    for row in result["rows"]:
        assert row["refused"] == "" and first in row["timings"]
        assert set(row["timings"]) | set(row["skipped"]) == set(result["contestants"])
        assert row["ratios"].keys() == row["timings"].keys() - {first}
    fields = {"scaling": "values", "filters": "filters", "distributions": "setting"}
    if field := fields.get(words[0]):
        wanted = {p.shown()[field] for g in case.quick for p in g.problems()}
        assert {row[field] for row in result["rows"]} == wanted


def test_the_host_path_of_a_gpu_is_timed_without_one(tmp_path):
    pytest.importorskip("triton")
    status, result = run_json(tmp_path, "triton_host", "--quick")
    assert status == 0 and len(result["rows"]) == 4
    for row in result["rows"]:
        assert row["timings"].keys() == {"sample", "into out", "plan", "plan, new position"}


def test_peers_that_are_not_installed_are_said_to_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = ["filters", "--quick", "--budget", "0.001", "--divergences", "reverse_kl"]
    _, result = run_json(tmp_path, *words, "--filters", "top_k=50", "--out", str(tmp_path))
    for row in result["rows"]:
        assert row["skipped"] == {"transformers": "transformers not installed"}
    assert "- transformers: transformers not installed" in (tmp_path / "filters.md").read_text()


@pytest.mark.parametrize(
    "words", [("--filters", "top_k=50"), ("--policies", "3"), ("--settings", "flat")]
)
def test_peers_do_not_take_problems_that_they_would_ignore_a_part_of(tmp_path, words):
    quick = ["cpu", "--quick", "--budget", "0.001", "--divergences", "jsd", "--dtypes", "float32"]
    shape = ["--shapes", "1x512", "--contestants", "eager", "math", "--backends", "torch"]
    status, result = run_json(tmp_path, *quick, *shape, *words)
    (row,) = result["rows"]
    left_out = {"top_k=50": {"eager", "math"}, "3": {"math"}, "flat": set()}[words[1]]
    assert status == 0 and set(row["skipped"]) == left_out
    assert set(row["timings"]) == {"torch", "eager", "math"} - left_out


def test_backend_that_ignores_a_filter_is_refused(tmp_path, monkeypatch):
    right = mod_fused.sample

    def wrong(*args, top_p=None, **kwargs):
        return right(*args, **kwargs)

    monkeypatch.setattr(mod_fused, "sample", wrong)
    words = ["filters", "--quick", "--budget", "0.001", "--divergences", "reverse_kl"]
    status, result = run_json(tmp_path, *words, "--filters", "top_p=0.9", "min_p=0.05")
    assert status == 1
    refused = {row["filters"] for row in result["rows"] if "not the oracle's" in row["refused"]}
    assert refused == {"top_p=0.9"}


@pytest.mark.parametrize("name", list(FILTERS))
@pytest.mark.parametrize("reference_is_there", [True, False])
def test_logits_processors_draw_from_the_filtered_mixture(name, reference_is_there):
    # 20000 draws in a batch of one row, over 5 to 60 tokens: one false alarm in 1e6 a case.
    torch.manual_seed(0)
    draws, vocab = 20000, 60
    weights = problems.weights_of(2) if reference_is_there else (1.0,)
    one = Problem("reverse_kl", "float32", 1, vocab, 1, weights, 0, reference_is_there, name)
    rows = [2.0 * x for x in torch.randn(len(weights) + reference_is_there, 1, vocab)]
    many = one._replace(batch=draws)
    tokens = filters._transformers(many, [x.expand(draws, vocab) for x in rows])()
    arguments, options = problems.mixture(one, rows)
    log_p = reference.log_probs(*arguments, **options)[0]
    after = problems.filters(one, torch.device("cpu"))
    if "mask" in after:
        after["mask"] = after["mask"][0]
    p = np.exp(reference.filtered_log_probs(log_p, **after))
    counts = np.bincount(tokens.numpy(), minlength=vocab)
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0]
    keep = expected > 5
    chi_squared = ((counts[p > 0] - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = max(int(keep.sum()), 1)
    assert chi_squared < degrees + 4.75 * np.sqrt(2 * degrees) + 15  # normal and exponential tail


def test_recorded_logits_are_those_of_the_embedded_models():
    rows = logits(Problem("jsd", "float32", 20, 904, 1, setting=RECORDED), 20)
    ensemble = mod_fused.Ensemble.embedded(world.OBJECTIVES[:2])
    ids, _ = ensemble.encode(world.prompts(20, seed=0)[0])
    for got, model in zip(rows, ensemble.models, strict=True):
        with torch.no_grad():
            first = model(ids[0]).logits[0, -1]
        torch.testing.assert_close(got[0], first, rtol=0.0, atol=1e-4)
    assert all(len(row.unique(dim=0)) == 20 for row in rows)  # a row for each token
    with pytest.raises(ValueError, match="V = 904, got 905"):
        logits(Problem("jsd", "float32", 1, 905, 1, setting=RECORDED), 1)


def test_recorded_logits_are_left_out_where_transformers_is_missing(tmp_path, monkeypatch):
    problems._rows.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = ["distributions", "--quick", "--budget", "0.001", "--divergences", "reverse_kl"]
    settings = ["--settings", RECORDED, "model", "--backends", "torch", "--out", str(tmp_path)]
    status, result = run_json(tmp_path, *words, "--shapes", "2x904", *settings)
    assert status == 0 and [row["setting"] for row in result["rows"]] == ["model"]
    text = (tmp_path / "distributions.md").read_text()
    assert f"{RECORDED}: transformers not installed" in text


def test_settings_are_what_they_are_called():
    top, entropy, distance = {}, {}, {}
    for name in SETTINGS:
        ref, policy, _ = logits(Problem("jsd", "float32", 1, 8192, 1, setting=name), 1)
        p = torch.softmax(ref[0].double(), 0)
        top[name], entropy[name] = float(p.max()), float(-(p * p.log()).sum())
        distance[name] = float((policy - SETTINGS[name].sharpening * ref).abs().mean())
    assert top["peaked"] > 0.9999
    assert entropy["flat"] > np.log(8192) - 0.1 > entropy["heavy"] > entropy["model"]
    assert distance["far"] == pytest.approx(3.0, rel=0.05)  # the mean of |Laplace| is its scale
    with pytest.raises(ValueError, match="setting must be one of"):
        logits(Problem("jsd", "float32", 1, 8, 1, setting="nonsense"), 1)


def test_scaling_sweeps_hold_all_other_sizes_still():
    every = [p.shown() | {"timings": {"cpu": {}}} for g in scaling.SCALING.grids
             for p in g.problems()]  # fmt: skip
    for name, (field, one) in scaling.SWEEPS.items():
        rows = scaling.sweep(every, name)
        sizes = {p.shown()[field] for p in one.problems()}
        assert {r[field] for r in rows} >= sizes
        for other in {"batch", "vocab", "threads", "policies", "values"} - {field}:
            assert len({r[other] for r in rows}) == 1


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_op_of_the_host_case_does_what_its_parts_add_up_to(divergence):
    one = Problem(divergence, "bfloat16", 1, 64, 1)
    rows = logits(one, 1)
    tokens, logprobs, *_ = HOST.contestants["op"].build(one, rows)()
    out = mod_fused.sample(rows[0], rows[1:], list(one.weights), divergence=divergence, seed=1)
    assert torch.equal(tokens, out.tokens) and torch.equal(logprobs, out.logprobs)


DECODER = ["decoder", "--quick", "--models", "tiny", "--dtypes", "float32"]


def test_decoder_case_times_every_loop(tmp_path):
    status, result = run_json(tmp_path, *DECODER, "--out", str(tmp_path))
    assert status == 0
    reverse_kl, jsd = result["rows"]
    assert set(reverse_kl["timings"]) == set(result["contestants"])
    assert set(jsd["timings"]) == set(result["contestants"]) - {"release"}
    for row in result["rows"]:
        assert row["refused"] == "" and row["skipped"] == {}
        for name, timing in row["timings"].items():
            assert row["tokens_per_s"][name] == pytest.approx(2e6 / timing[0], rel=1e-4)
            assert 0 < row["draw_share"][name] < 1
    text = (tmp_path / "decoder.md").read_text()
    assert "| divergence | B | V |" in text and "| jsd | 2 | 1024 |" in text


def test_decoder_case_refuses_a_loop_that_draws_something_else(tmp_path, monkeypatch):
    right = decoding.sample

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return out._replace(tokens=(out.tokens + 1) % args[0].shape[1])

    monkeypatch.setattr(decoding, "sample", wrong)
    status, result = run_json(tmp_path, *DECODER, "--divergences", "jsd")
    assert status == 1 and result["rows"][0]["timings"] == {}
    assert result["rows"][0]["refused"].startswith("generate: step 0: the log-probability")
    assert decoding.sample is wrong  # put back after the run


def test_peer_that_draws_something_else_is_left_out(tmp_path, monkeypatch):
    right = loops.contestants

    def wrong(divergence):
        def greedy(logits, weights, step):
            return logits[0].argmax(-1), torch.zeros(len(logits[0]))

        plain = {"eager": lambda task, around: loops.plain(task, around, greedy)}
        return right(divergence) | plain

    monkeypatch.setattr(loops, "contestants", wrong)
    status, result = run_json(tmp_path, *DECODER, "--divergences", "jsd")
    assert status == 0 and "log-probability" in result["rows"][0]["skipped"]["eager"]
    assert "eager" not in result["rows"][0]["timings"]


def test_clock_counts_from_the_first_token_on(monkeypatch):
    now = iter([0.0, 5.0, 7.0, 8.0, 10.0, 11.5, 20.0])
    monkeypatch.setattr(decoder.time, "perf_counter", lambda: next(now))
    clock = decoder.Clock(lambda: None, watch=True)
    draw = clock(lambda x: x + 1)
    assert [draw(1), draw(2), draw(3)] == [2, 3, 4]
    assert clock.draws == [1.0, 1.5]  # the first draw took 5 and is not counted
    assert clock.seconds() == 20.0 - 5.0
    assert clock.given == [(1,), (2,), (3,)]


def test_random_models_have_the_size_they_are_named_for():
    ensemble = models.ensemble("tiny", torch.float32, "cpu", 2)
    layers, width, _, _, mlp, vocab = models.RANDOM["tiny"]
    per_layer = 4 * width**2 + 3 * width * mlp + 2 * width
    assert models.parameters(ensemble) == vocab * width + layers * per_layer + width
    weights = [m.get_input_embeddings().weight for m in ensemble.models]
    ref, first, second = (w - w.mean() for w in weights)
    near, apart = (
        torch.nn.functional.cosine_similarity(
            torch.stack([first, second]).flatten(1), ref.flatten()[None]
        ),
        (first - second).norm() / ref.norm(),
    )
    assert (near > 0.99).all() and 0.1 < apart < 0.2  # a tenth of the way, in two directions


def test_ratio_of_medians_has_the_percentiles_of_the_rounds():
    of = [[2.0, 4.0], [3.0, 3.0], [8.0, 10.0], [6.0, 6.0], [1.0, 1.0], [50.0, 50.0]]
    to = [[1.0, 1.0], [1.0, 1.0], [3.0, 3.0], [1.0, 1.0], [1.0, 1.0], [5.0, 5.0]]
    got = measure.ratio(of, to)  # of the rounds: 3, 3, 3, 6, 1, 10
    assert got == {"ratio": 5.0, "p20": 3.0, "p80": 6.0}


def test_grids_that_overlap_are_timed_once():
    one = bench_case.Grid(("float32",), ((1, 64),), (1,), ("jsd",))
    case = bench_case.Case("", ("torch",), {}, (one, one._replace(policies=(2, 3))), ())
    args = run.parser().parse_args(["cpu", "--threads", "2"])
    got = grid._problems(case, args)
    assert [(len(p.weights), p.threads) for p in got] == [(2, 2), (3, 2)]
