"""`mod-fused tune`: the choice on a bench of made-up times, the command in Triton's interpreter."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mod_fused.triton_kernels import configurations, launch
from mod_fused.triton_kernels.configurations import TABLE, Configuration, read_table

from mod_fused.app import tune
from mod_fused.app.tune_bench import Device, Shape
from mod_fused.cli import main
from mod_fused.ops import Sample

DEFAULT = Configuration(threads=128, chunk=2)
FAST = Configuration(threads=256, chunk=2)
SAME = Sample(torch.tensor([3]), torch.tensor([-1.5]), torch.tensor([True]), None)


class Bench:
    """By its clock results take a second and a timing `cost`; what they are, it is told."""

    cost = 0.05

    def __init__(self, times: Any, results: Any = lambda c: SAME, **shape: Any) -> None:
        self.shapes = [Shape("jsd", 1, 1000, 2, "bfloat16", {})._replace(**shape)]
        self.times, self.made = times, results
        self.now, self.timed, self.compiled = 0.0, [], []

    def compile_ahead(self, candidates, seconds):
        self.compiled += candidates

    def results(self, configured):
        self.now += 1.0
        return [self.made(configured)]

    def seconds(self, configured):
        self.now += self.cost
        self.timed.append(configured)
        return [self.times(self, configured)]

    def choose(self, seconds: float = 1e6) -> tune.Outcome:
        return tune.choose(self, DEFAULT, seconds, lambda: self.now)


def faster(microseconds: float, of: Configuration = FAST) -> Any:
    """All configurations take 100 µs but one."""
    return lambda bench, c: 1e-6 * (microseconds if c == of else 100.0)


@pytest.mark.parametrize(("microseconds", "kept"), [(97.9, True), (98.1, False), (100.1, False)])
def test_the_fastest_is_kept_beyond_the_margin_only(microseconds, kept):
    bench = Bench(faster(microseconds))
    outcome = bench.choose()
    assert outcome.kept is kept and not outcome.out_of_time and not outcome.refused
    assert outcome.fastest == (FAST if microseconds < 100 else outcome.fastest)
    if kept:
        assert outcome.default_us == pytest.approx([100.0])
        assert outcome.fastest_us == pytest.approx([97.9])
    assert outcome.tried == len(set(bench.timed)) - 1 == 26  # 3 fields at 3 values each
    assert set(bench.compiled) == set(bench.timed)


def test_a_lead_that_the_second_measurement_does_not_find_is_not_kept():
    def times(bench, c):
        first = bench.timed.count(c) <= tune.ROUNDS
        return 1e-6 * (50.0 if c == FAST and first else 100.0)

    bench = Bench(times)
    outcome = bench.choose()
    assert outcome.fastest == FAST and not outcome.kept and outcome.ratio() == pytest.approx(1.0)
    assert bench.timed.count(FAST) == bench.timed.count(DEFAULT) == 2 * tune.ROUNDS
    assert set(bench.timed[-2 * tune.ROUNDS :]) == {DEFAULT, FAST}


def test_medians_ignore_a_single_slow_round():
    bench = Bench(lambda b, c: 1.0 if b.timed.count(c) == 2 and c == FAST else faster(90)(b, c))
    assert bench.choose().kept


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokens": torch.tensor([4])}, "1 tokens are not the default's"),
        ({"logprobs": torch.tensor([-1.5 + 2**-23])}, "log-probabilities .* 1.2e-07 off"),
        ({"valid": torch.tensor([False])}, "not the default's"),
        (None, "RuntimeError: too many registers"),
    ],
)
def test_a_candidate_with_other_results_is_refused_and_never_timed(changed, reason):
    def results(c):
        if c != FAST:
            return SAME
        if changed is None:
            raise RuntimeError("too many\nregisters")
        return SAME._replace(**changed)

    bench = Bench(faster(1.0), results)
    outcome = bench.choose()
    assert FAST not in bench.timed and not outcome.kept
    (refused,) = outcome.refused
    assert Configuration(**refused["configuration"]) == FAST
    assert re.search(reason, refused["reason"])


def test_equal_bits_are_no_refusal_nan_included():
    nan = SAME._replace(logprobs=torch.tensor([torch.nan]))
    assert tune.refusal([nan, SAME], [nan, SAME]) == ""
    assert tune.refusal([nan], [SAME]) != ""


def test_out_of_time_keeps_what_was_measured():
    bench = Bench(faster(50.0))
    outcome = bench.choose(20.0)  # the results of all 26 candidates take 26
    assert outcome.out_of_time and outcome.kept and outcome.fastest == FAST
    assert 0 < outcome.tried < 26
    assert bench.now <= 20.0


@pytest.mark.parametrize("seconds", [0.0, 1.0, 1.6])
def test_nothing_is_kept_when_there_was_no_time_to_measure(seconds):
    outcome = Bench(faster(50.0)).choose(seconds)
    assert outcome.out_of_time and not outcome.kept
    assert outcome.fastest == DEFAULT and outcome.default_us == []


def test_a_single_round_is_no_measurement():
    bench = Bench(faster(50.0))
    bench.cost = 1.0
    outcome = bench.choose(40.0)  # 22 of the results, one round of their times
    assert FAST in bench.timed and outcome.fastest == DEFAULT
    assert outcome.out_of_time and not outcome.kept and outcome.tried == 0


def test_filters_are_tuned_after_the_mixture_and_the_log_linear_grid_is_not():
    both = Configuration(threads=256, chunk=2, filter_block=2048)
    times = {FAST: 80.0, both: 60.0}
    bench = Bench(
        lambda b, c: 1e-6 * times.get(c, 100.0), divergence="reverse_kl", filters={"top_k": 5}
    )
    outcome = bench.choose()
    assert outcome.kept and outcome.fastest == both
    assert {c.programs_per_processor for c in bench.timed} == {DEFAULT.programs_per_processor}


def test_neighbours_are_configurations_and_the_nearest_come_first():
    least = Configuration(threads=64, chunk=1, filter_threads=1024, filter_block=1024)
    near = tune.neighbours(least, ("threads", "chunk"))
    assert [(c.threads, c.chunk) for c in near] == [(64, 2), (128, 1), (128, 2)]
    near = tune.neighbours(least, ("filter_threads", "filter_block"))
    assert {(c.filter_threads, c.filter_block) for c in near} == {
        (1024, 2048), (512, 1024), (512, 2048),
    }  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------

ARGUMENTS = ["tune", "--vocab-size", "1100", "--policies", "1", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--minutes", "0"], "minutes > 0"),
        (["--minutes", "nan"], "minutes > 0"),
        (["--minutes", "soon"], "minutes > 0"),
        (["--vocab-size", "0"], ">= 1"),
        (["--batch-sizes", "1,x"], ">= 1"),
        (["--batch-sizes", ","], "commas"),
        (["--divergences", "jsd,chi_squared"], "chi"),
        (["--dtype", "auto"], "float32"),
        (["--out", "no/such/folder/x.json"], "folder that exists"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(changed, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*ARGUMENTS, *changed]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_it_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mod_fused.dispatch.backends.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*ARGUMENTS, "--out", str(tmp_path / "x.json")]) == 2
    out, err = capsys.readouterr()
    assert "torch sees no GPU" in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


class CommandBench(Bench):
    """In place of `Device`: 256 threads are twice as fast, but for many rows."""

    def __init__(self, shapes):
        super().__init__(lambda b, c: 1e-6 if c.threads == 256 and b.few else 2e-6)
        self.shapes = shapes
        self.few = shapes[0].batch < configurations.MANY_ROWS


def test_the_file_holds_the_winners_and_reads_back(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "triton_status", lambda: "available")
    monkeypatch.setattr(tune, "Device", CommandBench)
    path = tmp_path / "table.json"
    argv = ["--batch-sizes", "1,2,16", "--divergences", "jsd,kl", "--out", str(path)]
    assert main([*ARGUMENTS, *argv]) == 0
    record = json.loads(path.read_text())
    # The other entry for few rows has 256 threads anyway.
    assert set(record["configurations"]) == {"general, few rows"}
    table = read_table(path)
    for name, configured in table.items():
        few = name == "general, few rows"
        assert configured.threads == (256 if few else TABLE[name].threads)
    assert set(record) >= {"device", "capability", "driver", "torch", "triton", "mod_fused", "date"}
    assert record["torch"] == torch.__version__ and record["device"] == configurations.device_name()
    general = record["measured"]["general, few rows"]
    assert [(s["divergence"], s["batch"]) for s in general["shapes"]] == [("jsd", 1), ("jsd", 2)]
    assert general["default_us"] == [2.0] and general["fastest_us"] == [1.0]
    out = capsys.readouterr().out
    assert f"export {configurations.TABLE_VARIABLE}={path}" in out
    assert "threads=256" in out and "kept" in out


def test_refusals_are_printed_and_recorded(capsys, tmp_path, monkeypatch):
    class Wrong(CommandBench):
        def results(self, configured):
            wrong = configured.threads == 256
            return [SAME._replace(tokens=torch.tensor([5])) if wrong else SAME]

    monkeypatch.setattr(tune, "triton_status", lambda: "available")
    monkeypatch.setattr(tune, "Device", Wrong)
    path = tmp_path / "table.json"
    assert main([*ARGUMENTS, "--divergences", "jsd", "--out", str(path)]) == 0
    assert read_table(path) == TABLE
    refused = json.loads(path.read_text())["measured"]["general, few rows"]["refused"]
    assert {entry["configuration"]["threads"] for entry in refused} == {256}
    out = capsys.readouterr().out
    assert "REFUSED threads=256: 1 tokens are not the default's" in out
    assert "no need to use it" in out


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "the package's own"),
        ({"configurations": {}, "device": "cpu"}, "made for this device"),
        ({"configurations": {}, "device": "some GPU"}, "made for ANOTHER DEVICE: some GPU"),
        ({"configurations": {}}, "does not say"),
        ({}, "cannot be used"),
    ],
)
def test_the_doctor_says_which_table_is_in_force(record, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mod_fused.app.doctor.working", lambda: [])
    monkeypatch.delenv(configurations.TABLE_VARIABLE, raising=False)
    if record is not None:
        path = tmp_path / "table.json"
        path.write_text(json.dumps(record))
        monkeypatch.setenv(configurations.TABLE_VARIABLE, str(path))
    main(["doctor"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("launch table")]
    assert said in line


# ---- in the interpreter --------------------------------------------------------------------------


@pytest.mark.interpreted
def test_the_command_runs_in_the_interpreter(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(
        tune, "neighbours", lambda c, names: [tune.replace(c, **{names[0]: 2 * c.threads})]
    )
    path = tmp_path / "table.json"
    argv = ["--divergences", "jsd", "--batch-sizes", "1", "--top-k", "5", "--out", str(path)]
    assert main([*ARGUMENTS, "--vocab-size", "300", *argv]) == 0
    read_table(path)
    found = json.loads(path.read_text())["measured"]["general, few rows"]
    assert found["refused"] == [] and found["tried"] >= 2
    assert found["default_us"][0] > 0 and found["shapes"][0]["filters"] == {"top_k": 5}


@pytest.mark.interpreted
def test_the_bench_runs_the_configuration_it_is_given(monkeypatch):
    seen = []
    run = launch.Launch.run
    monkeypatch.setattr(
        launch.Launch, "run", lambda self, device: (seen.append(self), run(self, device))[1]
    )
    bench = Device([Shape("kl", 1, 2100, 1, "float32", {})])
    few = [bench.results(Configuration(threads=t, chunk=c)) for t, c in ((64, 1), (256, 2))]
    assert [(x.threads, x.variant.chunk) for x in seen] == [(64, 1)] * 2 + [(256, 2)] * 2
    assert tune.refusal(*few) == ""
    assert len({int(x.tokens) for x in few[0]}) == len(few[0])  # other seeds
