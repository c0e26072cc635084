"""A vocabulary in shards: four processes on the CPU, against the oracle and against one device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    assert_matches_oracle,
    assert_proposal_logprobs_are_the_oracle_s,
    assert_tokens_are_the_oracle_s,
)
from shards import (
    ONE_REFUSES,
    POSITIONS,
    RANKS,
    REFUSALS,
    SEEDS,
    WEIGHTS,
    B,
    Case,
    cases,
    make,
)

from mod_fused import log_probs, reference, sample

CASES = cases()
FILTERS = ("mask", "bias", "temperature", "top_k", "top_p", "min_p")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = str(Path(__file__).parents[1] / "shards.py")
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def alone(case: Case) -> Any:
    """The same call on one device."""
    return sample(*case.args, **case.mixing, **case.drawing, backend="torch")


def same(one: Any, other: Any) -> bool:
    """Equal to the bit; NaN equals NaN."""
    if one is None or other is None:
        return one is other
    if one.dtype == torch.float32:
        one, other = one.view(torch.int32), other.view(torch.int32)
    return torch.equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_returns_the_tokens_of_one_device(ranks, name):
    case = CASES[name]
    (_, first), *others = (x[name] for x in ranks[: len(case.widths)])
    for _, other in others:
        assert all(map(same, first, other))
    for got, wanted in zip(first, alone(case), strict=True):
        if got is None or not got.is_floating_point():
            assert same(got, wanted)  # tokens and valid
        else:
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", [x for x in CASES if x.startswith(("whole_tiles", "one_rank"))])
def test_shards_of_whole_tiles_change_no_bit(ranks, name):
    case = CASES[name]
    each = [x[name] for x in ranks[: len(case.widths)]]
    assert all(map(same, each[0][1], alone(case)))
    whole = log_probs(*case.args, **case.mixing, backend="torch")
    assert same(torch.cat([x[0] for x in each], 1), whole)


@pytest.mark.parametrize("name", CASES)
def test_log_pi_and_draws_are_the_oracle_s(ranks, name):
    case = CASES[name]
    each = [x[name] for x in ranks[: len(case.widths)]]
    got = torch.cat([x[0] for x in each], 1)
    expected = reference.log_probs(*case.args, **case.mixing)
    padding = got[:, case.vocab :]
    invalid = torch.from_numpy(expected).isnan().all(1)
    assert (padding[~invalid] == -torch.inf).all() and padding[invalid].isnan().all()
    assert_matches_oracle(got[:, : case.vocab].contiguous(), expected)
    drawn = each[0][1]
    filters = {x: case.drawing[x] for x in FILTERS if x in case.drawing}
    if "bias_ids" in case.drawing:
        filters["bias"] = dense(filters["bias"], case.drawing["bias_ids"], case.vocab)
    seeds, positions = SEEDS, POSITIONS
    if case.drawing["seed"] is not SEEDS:
        seeds, positions = reference.row_seeds(case.drawing["seed"], B), [3] * B
    assert_tokens_are_the_oracle_s(drawn[0], expected, seeds, positions, **filters)
    like = type("", (), {"tokens": drawn[0], "proposal_logprobs": drawn[4]})
    assert_proposal_logprobs_are_the_oracle_s(like, expected, **filters)


def dense(bias: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """The bias of listed tokens [B, K] as [B, V]; NaN where a row's list is none."""
    out = torch.zeros(B, vocab)
    for b, row in enumerate(ids.tolist()):
        listed = [x for x in row if x >= 0]
        if len(set(listed)) < len(listed) or max(listed) >= vocab:
            out[b] = torch.nan
            continue
        for token, x in zip(row, bias[b], strict=True):
            out[b, token] = x if token >= 0 else out[b, token]
    return out


def test_without_a_seed_all_draw_what_the_first_rank_s_generator_says(ranks):
    torch.manual_seed(0)
    case = make("ragged", "jsd")
    wanted = sample(*case.args, **case.mixing, backend="torch")
    for found in ranks:
        assert torch.equal(found["others"]["unseeded"][0], wanted.tokens)


def test_tensors_of_the_caller_are_filled_and_no_rows_are_right(ranks):
    case = make("ragged", "jsd")
    wanted, log_pi = alone(case), log_probs(*case.args, **case.mixing, backend="torch")
    for found in ranks:
        assert found["others"]["is_out"] and found["others"]["empty"] == (0,)
        for x, y in zip(found["others"]["out"], wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5)
    got = torch.cat([x["others"]["log_probs_out"] for x in ranks], 1)
    torch.testing.assert_close(got, log_pi, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", REFUSALS)
def test_all_ranks_refuse_together(ranks, name):
    refusal = REFUSALS[name]
    for found in ranks:
        kind, message = found[f"refusal-{name}"]
        assert refusal.kind is Exception or kind == refusal.kind.__name__
        assert re.search(refusal.message, message, re.DOTALL), message


def test_what_one_rank_refuses_the_others_refuse_by_its_number(ranks):
    for rank, found in enumerate(ranks):
        kind, message = found["refusal-one_refuses"]
        assert kind == "ValueError" and re.search(ONE_REFUSES.message, message)
        assert message.startswith("rank 2 of the group refused") == (rank != 2)


def test_without_initialisation_it_is_refused():
    group = torch.distributed.ProcessGroup(0, 2)
    x = torch.randn(2, 9)
    with pytest.raises(ValueError, match="init_process_group"):
        sample(x, [x], WEIGHTS[:1], seed=1, group=group)
