"""Workspaces that are not as a launch expects them: rows come out invalid or right, and nobody
waits for ever (TRITON_INTERPRET=1)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calls import poisoned
from cases import logits
from interleaving import Stuck, interleave
from mod_fused.triton_kernels import handoffs, launch

import mod_fused
from mod_fused.call.checks import check_draw, check_mixture

pytestmark = pytest.mark.interpreted

ROWS, VOCAB = 2, 2100
CALLS: dict[str, dict[str, Any]] = {
    "one phase": {},
    "two phases": {"plausibility": 1e-3},
    "early": {"divergence": "jsd"},
    "newton": {"divergence": "jeffrey"},
    "filters": {"divergence": "jsd", "top_k": 5},
    "filters of one phase": {"top_p": 0.9},
}
REF, POLICIES = logits(231, ROWS, VOCAB, 2, kind="typical")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(handoffs, "MOST_LOOKS", 50)


def sample(call: str, workspace: torch.Tensor, **others: Any) -> mod_fused.Sample:
    others = {"return_model_logprobs": True, "return_proposal_logprobs": True} | others
    return mod_fused.sample(
        REF, POLICIES, [0.6, 0.3], **CALLS[call], seed=1, backend="triton", workspace=workspace,
        **others, out=poisoned(ROWS, 3, "cpu", proposal=True),
    )  # fmt: skip


def new_workspace() -> torch.Tensor:
    return torch.zeros(mod_fused.workspace_size(ROWS, VOCAB), dtype=torch.uint8)


def assert_invalid(out: mod_fused.Sample) -> None:
    assert out.valid.tolist() == [False] * ROWS
    assert out.tokens.tolist() == [0] * ROWS
    for x in (out.logprobs, out.model_logprobs, out.proposal_logprobs):
        assert x.isnan().all()


def bits(out: Any) -> list[bytes]:
    return [x.numpy().tobytes() for x in out]


@pytest.mark.parametrize(
    ("call", "fill"),
    [(call, 1) for call in CALLS]
    + [(call, x) for call in ("one phase", "early") for x in (255, "noise")],
)
def test_a_workspace_that_was_never_zeroed_gives_invalid_rows_until_it_is_reset(call, fill):
    expected = bits(sample(call, new_workspace()))
    workspace = new_workspace()
    if fill == "noise":
        generator = torch.Generator().manual_seed(0)
        workspace.random_(1, 256, generator=generator)
    else:
        workspace.fill_(fill)
    for _ in range(2):
        assert_invalid(sample(call, workspace))
    mod_fused.reset_workspace(workspace)
    assert bits(sample(call, workspace)) == expected


@pytest.mark.parametrize("call", ["one phase", "early"])
def test_log_probs_are_nan_then(call):
    workspace = new_workspace().fill_(1)
    arguments: dict[str, Any] = {**CALLS[call], "backend": "triton", "workspace": workspace}
    for _ in range(2):
        out = torch.zeros(ROWS, VOCAB)
        assert mod_fused.log_probs(REF, POLICIES, [0.6, 0.3], **arguments, out=out).isnan().all()
    mod_fused.reset_workspace(workspace)
    assert not mod_fused.log_probs(REF, POLICIES, [0.6, 0.3], **arguments).isnan().any()


#: One counter that is not zero: (its name, its place, what it holds).
COUNTERS = [("tickets", 0, 1), ("tickets", 0, 7), ("tickets", 0, 1 << 32), ("tickets", 0, -1)]
COUNTERS += [("flags", 1, 1), ("flags", 1, 3), ("flags", 0, -1), ("arrivals", 1, 1)]
COUNTERS += [("arrivals", 0, 2), ("arrivals", 1, 1 + (1 << 32)), ("arrivals", 1, -1)]


def launched(call: str, scale: float, workspace: torch.Tensor) -> tuple[launch.Launch, Any]:
    """The launch of a call without a second one, and its outputs; of `scale` depends what it
    draws."""
    mixing = check_mixture(scale * REF, POLICIES, [0.6, 0.3], **CALLS[call])
    drawing = check_draw(mixing, seed=[4, 5])
    out = poisoned(ROWS, None, "cpu")
    (made,) = launch.sample_launches(mixing, drawing, tuple(out), workspace)
    return made, out


def assert_right_or_invalid(out: mod_fused.Sample, expected: mod_fused.Sample) -> None:
    for row in range(ROWS):
        if out.valid[row]:
            assert out.tokens[row] == expected.tokens[row]
            assert out.logprobs[row] == expected.logprobs[row]
        else:
            assert out.tokens[row] == 0 and math.isnan(out.logprobs[row])


@pytest.mark.parametrize("counter", COUNTERS, ids=str)
@pytest.mark.parametrize("call", ["one phase", "two phases", "early"])
def test_one_wrong_counter_makes_rows_invalid_and_no_token_wrong(call, counter):
    name, place, content = counter
    made, expected = launched(call, 1.0, new_workspace())
    made.run(torch.device("cpu"))
    workspace = new_workspace()
    for turn in range(2):
        made, out = launched(call, 1.0, workspace)
        if turn == 0:
            for x in made.arguments[2]:
                if x is not None and x.is_floating_point():
                    x.fill_(0.5)  # of an earlier launch: it must not count
            getattr(made.arguments[2], name)[place] = content
        made.run(torch.device("cpu"))
        assert_right_or_invalid(out, expected)
        if made.variant.phases > 1:  # else the only counters are the arrivals, of one row
            assert out.valid.tolist() == [False] * ROWS


@pytest.mark.parametrize("call", ["two phases", "early"])
def test_after_a_launch_was_stopped_rows_are_invalid_or_right(call, monkeypatch):
    made, expected = launched(call, 1.0, new_workspace())
    made.run(torch.device("cpu"))
    monkeypatch.setattr(launch, "processors", lambda device: 2)
    stopped = 0
    for seed, most in enumerate((1, 3, 6, 10, 15, 20, 25, 30, 40, 50)):
        workspace = new_workspace()
        made, _ = launched(call, 0.5, workspace)
        try:
            interleave(made, seed, monkeypatch, most=most)
        except Stuck:
            stopped += 1
        made, out = launched(call, 1.0, workspace)
        made.run(torch.device("cpu"))
        assert_right_or_invalid(out, expected)
    assert stopped >= 5


@pytest.mark.parametrize("wrong", [torch.zeros(64), torch.zeros(64, 2, dtype=torch.uint8)[:, 0], 5])
def test_what_is_no_workspace_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="workspace must be a"):
        mod_fused.reset_workspace(wrong)
