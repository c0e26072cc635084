"""The benchmark runner: it runs, refuses wrong results, and its contestants compute what they
claim."""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

import mod_fused
from bench import case, check, grid, measure, memory, report, run
from bench.cases import CASES
from bench.contestants import compiled, eager, floors
from bench.problem import POLICIES, WEIGHTS, Problem, logits
from mod_fused import reference
from mod_fused.divergence import DIVERGENCES, get_divergence

TINY = ["cpu", "--quick", "--budget", "0.001", "--dtypes", "float32", "--shapes", "2x512"]


def run_json(tmp_path: Path, *words: str) -> tuple[int, dict]:
    """Exit status and results of a run on tiny shapes, by the torch backend (always there)."""
    file = tmp_path / "result.json"
    status = run.main([*TINY, "--backends", "torch", "--json", str(file), *words])
    return status, report.load(file)


def inputs(divergence: str, dtype: str = "float32", batch: int = 2, vocab: int = 1280):
    problem = Problem(divergence, dtype, batch, vocab, 1)
    return problem, logits(problem, batch)


def test_runner_writes_every_divergence_with_machine_and_command(tmp_path, capsys):
    status, result = run_json(tmp_path, "--contestants", "eager", "--out", str(tmp_path / "out"))
    assert status == 0
    assert result["schema"] == run.SCHEMA and result["case"] == "cpu"
    assert set(result["machine"]) == {
        "cpu", "cores", "caches", "instruction set", "python", "torch", "compiler", "commit",
    }  # fmt: skip
    assert result["command"].startswith("python -m bench.run cpu --quick")
    assert str(tmp_path) not in result["command"]
    assert [row["divergence"] for row in result["rows"]] == list(DIVERGENCES)
    for row in result["rows"]:
        assert (row["batch"], row["vocab"], row["dtype"], row["threads"]) == (2, 512, "float32", 1)
        assert row["refused"] == "" and row["skipped"] == {}
        assert 0 <= row["tv"]["torch"] <= check.TOLERANCE
        for median, low, high, calls in (row["timings"]["torch"], row["timings"]["eager"]):
            assert 0 < low <= median <= high and calls >= grid.ROUNDS
        ours, theirs = (row["timings"][name][0] for name in ("torch", "eager"))
        assert row["ratios"] == pytest.approx({"eager": theirs / ours}, rel=1e-4)
        assert row["gb_per_s"] == pytest.approx(3 * 2 * 512 * 4 / ours / 1e3, rel=1e-4)
    written = (tmp_path / "out" / "cpu.md").read_text()
    assert report.load(tmp_path / "out" / "cpu.json") == result
    assert written.strip() in capsys.readouterr().out
    assert all(f"| {name} | 2 | 512 |" in written for name in DIVERGENCES)


def test_backend_that_is_wrong_on_the_same_inputs_is_not_timed(tmp_path, monkeypatch):
    right = mod_fused.log_probs

    def wrong(*args, divergence, **kwargs):
        out = right(*args, divergence=divergence, **kwargs)
        if divergence == "jsd":
            out[0] = torch.log_softmax(1.001 * out[0], -1)
        return out

    monkeypatch.setattr(mod_fused, "log_probs", wrong)
    status, result = run_json(tmp_path, "--contestants", "--divergences", "jsd", "forward_kl")
    jsd, forward_kl = result["rows"]
    assert status == 1
    assert "total variation" in jsd["refused"] and jsd["tv"]["torch"] > check.TOLERANCE
    assert jsd["timings"] == {} and jsd["gb_per_s"] is None
    assert forward_kl["refused"] == "" and "torch" in forward_kl["timings"]


@pytest.mark.parametrize("fault", ["nan", "invalid", "logprobs"])
def test_check_fails_on_nan_invalid_rows_and_wrong_logprobs(monkeypatch, fault):
    problem, rows = inputs("forward_kl")
    expected = check.oracle(problem, problem.batch)
    assert check.check(problem, rows, expected, "torch").passed
    log_probs, sample = mod_fused.log_probs, mod_fused.sample
    if fault == "nan":
        monkeypatch.setattr(mod_fused, "log_probs", lambda *a, **k: log_probs(*a, **k) * torch.nan)
    elif fault == "invalid":  # the last row only, which the oracle does not look at
        valid = torch.tensor([True, False])
        monkeypatch.setattr(
            mod_fused, "sample", lambda *a, **k: sample(*a, **k)._replace(valid=valid)
        )
    else:
        off = torch.tensor([0.0, 1e-3])
        monkeypatch.setattr(
            mod_fused,
            "sample",
            lambda *a, **k: (s := sample(*a, **k))._replace(logprobs=s.logprobs + off),
        )
    assert not check.check(problem, rows, expected, "torch").passed


def test_calls_foreseen_to_be_slow_are_skipped_with_the_reason(tmp_path, monkeypatch):
    peers = dict(CASES["cpu"].contestants)
    peers["eager"] = peers["eager"]._replace(call_limit=0.0)
    monkeypatch.setitem(CASES, "cpu", CASES["cpu"]._replace(contestants=peers))
    words = ["--contestants", "eager", "--divergences", "jsd", "--shapes", "2x512", "2x1024"]
    words += ["--out", str(tmp_path)]
    status, result = run_json(tmp_path, *words)
    first, second = result["rows"]
    assert "eager" in first["timings"]  # nothing to foresee it from
    assert list(second["timings"]) == ["torch"] and "V=1024" in second["skipped"]["eager"]
    lines = re.findall(r"^\| jsd \|.*$", (tmp_path / "cpu.md").read_text(), re.M)
    assert [line.count("e-") for line in lines] == [2, 1] and "NaN" not in str(lines)


def test_unknown_contestants_and_shapes_are_refused(capsys):
    for words in ([*TINY, "--contestants", "nonsense"], ["cpu", "--shapes", "8"]):
        with pytest.raises(SystemExit, match="2"):
            run.main(words)
        assert repr(words[-1]) in capsys.readouterr().err


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peers_compute_the_mixture(divergence, dtype):
    # Peers may be less accurate than the op (fixed Newton steps, textbook f'), not something else.
    problem, rows = inputs(divergence, dtype)
    expected = reference.log_probs(rows[0], rows[1:], WEIGHTS, divergence=divergence)
    mass = compiled.masses(rows, WEIGHTS, get_divergence(divergence))
    probs = eager.probabilities(rows, WEIGHTS, divergence)
    for log_p in (mass.log(), probs.log()):
        for row, oracle in zip(log_p, expected, strict=True):
            assert check.total_variation(row, oracle) < 3e-4
    for token, log_prob in (
        compiled.sampler(divergence)(rows, WEIGHTS),
        eager.sample(rows, WEIGHTS, divergence),
    ):
        at = expected[np.arange(problem.batch), token.numpy()]
        np.testing.assert_allclose(log_prob.numpy(), at, atol=2e-3)


def test_the_race_of_the_compiled_peer_draws_from_the_masses():
    torch.manual_seed(0)
    draws, vocab = 20000, 2 * compiled.TILE
    mass = torch.zeros(vocab)
    mass[torch.tensor([3, 200, 255, 256, 300])] = torch.tensor([5.0, 1.0, 2.0, 1.0, 7.0])
    token, total = compiled.tiled(mass.expand(draws, vocab))
    expected = (mass / mass.sum()).double() * draws
    counts = torch.bincount(token, minlength=vocab).double()
    assert counts[mass == 0].sum() == 0
    chi_squared = ((counts - expected)[mass > 0] ** 2 / expected[mass > 0]).sum()
    assert chi_squared < 23.5  # 4 degrees of freedom: one false alarm in 1e4 seeds
    torch.testing.assert_close(total, torch.full((draws,), 16.0))


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the floors are compiled when they are used"
)


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("threads", [1, 2])
def test_read_floor_reads_every_word(dtype, threads):
    problem, rows = inputs("jsd", dtype, batch=3, vocab=1300)
    problem = problem._replace(threads=threads)
    words = [x.view(torch.uint8).numpy().view(np.uint64) for x in rows]
    assert floors.read(problem, rows)() == int(np.add.reduce(np.concatenate(words), axis=None))


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_transcendental_floor_evaluates_them_on_every_token(divergence, dtype, threads):
    problem, rows = inputs(divergence, dtype, batch=3, vocab=1300)
    got = floors.transcendentals(problem._replace(threads=threads), rows)()
    l0, l1, l2 = (x.double().numpy() for x in rows)
    norms = [np.log(np.exp(x).sum(-1, keepdims=True)) for x in (l0, l1, l2)]
    w1, w2 = WEIGHTS
    if divergence == "reverse_kl":
        w0 = 1.0 - w1 - w2
        key = w0 * (l0 - norms[0]) + w1 * (l1 - norms[1]) + w2 * (l2 - norms[2])
        expected = np.exp(key).sum()
    else:
        d1, d2 = l1 - l0, l2 - l0
        expected = 3 * (3 + np.exp(-1.0))  # log-sum-exps and pi_ref of three rows
        if divergence == "forward_kl":
            expected += (w1 * np.exp(-d1) + w2 * np.exp(-d2)).sum()
        elif divergence == "alpha:0.5":
            expected += (w1 * np.exp(-d1 / 2) + w2 * np.exp(-d2 / 2)).sum()
        elif divergence == "jsd":
            q = [np.log1p(np.exp(-np.abs(d))) for d in (d1, d2)]
            expected += np.expm1(w1 * q[0] + w2 * q[1]).sum()
        else:
            q = w1 * np.expm1(-d1) + w2 * np.expm1(-d2)
            for k in range(4):
                e = np.exp(np.where(q > 80, -80, k - q))
                expected += sum(np.log(e + j).sum() for j in (1, 2, 3, 4))
    assert got == pytest.approx(expected, rel=1e-4)


def test_floors_refuse_another_number_of_policies():
    problem, rows = inputs("jsd")
    with pytest.raises(ValueError, match="2 policies, got 1"):
        floors.transcendentals(problem, rows[:2])


def test_logits_are_the_same_rows_for_every_batch():
    problem, all_rows = inputs("jsd", batch=3)
    for x, y in zip(logits(problem._replace(batch=1), 3), all_rows, strict=True):
        assert x.shape == (1, problem.vocab) and torch.equal(x[0], y[0])
    assert len(all_rows) == POLICIES + 1
    assert not torch.equal(all_rows[0][0], all_rows[0][1])


def test_rounds_interleave_and_percentiles_are_those_of_the_calls():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    out = measure.rounds(calls, budget=0.0, min_rounds=3)
    blocks = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert blocks == ["a", "b"] * 4  # the estimates, then three rounds
    assert set(out) == {"a", "b"}
    timing = measure.timing([s * 1e-6 for s in (9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 10)])
    assert timing == pytest.approx((5.0, 2.0, 8.0, 11))


def test_disturbance_is_the_busy_time_less_our_own(monkeypatch):
    # user nice system idle iowait irq softirq steal guest, in ticks
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    stat = iter(
        ["cpu  100 10 50 900 70 3 4 5 0 0\ncpu0 9", "cpu  400 30 150 999 99 5 8 15 7 0\ncpu0 9"]
    )
    clock, own = iter([50.0, 52.0]), iter([7.0, 7.0 + 36 * tick])
    monkeypatch.setattr(Path, "read_text", lambda self: next(stat))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    busy = (300 + 20 + 100 + 2 + 4 + 10 - 36) * tick
    assert measure.Others().cores() == pytest.approx(busy / 2.0)


def test_disturbed_rows_are_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Others, "cores", lambda self: 0.5)
    words = ["--contestants", "--divergences", "jsd", "--out", str(tmp_path)]
    _, result = run_json(tmp_path, *words)
    assert result["rows"][0]["other_cores"] == 0.5
    text = (tmp_path / "cpu.md").read_text()
    assert "1 of 1 rows, marked \\*, were disturbed" in text and " \\* |" in text


@pytest.mark.parametrize("busy", [[0.05], [0.5, 0.05], [0.5, 0.2, 0.9]])
def test_a_disturbed_row_is_timed_again_and_the_quietest_counts(tmp_path, monkeypatch, busy):
    cores = iter(busy)
    monkeypatch.setattr(measure.Others, "cores", lambda self: next(cores))
    _, result = run_json(tmp_path, "--contestants", "--divergences", "jsd")
    assert result["rows"][0]["other_cores"] == min(busy)
    assert next(cores, None) is None  # tried no more often, no less


def test_memory_growth_sees_a_batch_of_temporaries():
    # Eager torch keeps several float32 [B, V] tensors alive: at least two of them must show.
    problem = Problem("reverse_kl", "bfloat16", 16, 65536, 1)
    assert memory.growth("cpu", "eager", problem) >= 2 * 16 * 65536 * 4


def test_grid_puts_batches_of_one_apart_and_small_vocabularies_first():
    shapes = case.Grid(("float32",), ((8, 100), (1, 200), (1, 100)), (1,), ("jsd",))
    assert [(p.batch, p.vocab) for p in shapes.problems()] == [(1, 100), (1, 200), (8, 100)]
