"""Programs that run at the same time: whatever their order, the results are the same, nobody waits
for ever, and counters are left at zero (TRITON_INTERPRET=1)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from calls import poisoned
from cases import logits, normal
from interleaving import Stuck, interleave
from mod_fused.triton_kernels import flat_rows, handoffs, launch
from mod_fused.triton_kernels.configurations import configuration

from mod_fused.call.checks import check_draw, check_mixture

pytestmark = pytest.mark.interpreted

ROWS, VOCAB = 3, 2100
CALLS: dict[str, dict[str, Any]] = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "plausibility": {"divergence": "reverse_kl", "plausibility": 0.001},
    "jsd": {"divergence": "jsd"},
    "jeffrey": {"divergence": "jeffrey"},
}


def launched(call: str, monkeypatch: pytest.MonkeyPatch, programs: int, group: int, chunk: int):
    """The launch of a call that is cut like this, and its outputs; one row of it is invalid."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    monkeypatch.setattr(launch, "rows_together", lambda *args: group)
    changes = {"programs_per_processor": programs, "chunk": chunk}
    monkeypatch.setattr(
        launch, "configuration", lambda *args: dataclasses.replace(configuration(*args), **changes)
    )
    ref, policies = logits(211, ROWS, VOCAB, 2, kind="typical")
    policies[0][1] = math.nan
    mixing = check_mixture(ref, policies, [0.6, 0.3], **CALLS[call])
    drawing = check_draw(mixing, seed=list(range(ROWS)))
    out = poisoned(ROWS, None, "cpu")
    (made,) = launch.sample_launches(mixing, drawing, tuple(out))
    return made, out


def results(out: Any) -> list[bytes]:
    return [x.numpy().tobytes() for x in out[:3]]


def counters(made: launch.Launch) -> list[int]:
    """What a launch leaves in them."""
    w = made.arguments[2]
    return [int(x.ne(0).sum()) for x in (w.tickets, w.flags, w.arrivals)]


#: Programs, rows whose phases are interleaved, tiles of a task.
CUTS = [(2, 1, 1), (4, 3, 1), (7, 2, 2)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_any_order_of_the_programs_gives_the_same_bits(call, cut, monkeypatch):
    made, out = launched(call, monkeypatch, 1, 1, 1)
    made.run(torch.device("cpu"))
    expected = results(out)
    assert out.valid.tolist() == [True, False, True]
    for seed in range(4):
        made, out = launched(call, monkeypatch, *cut)
        interleave(made, seed, monkeypatch)
        assert results(out) == expected, seed
        assert counters(made) == [0, 0, 0], seed


FLAT: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3000},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": 4800, "top_p": 0.95, "min_p": 0.3},
    "min_p": {"min_p": 0.4},
}


def filtered(call: str, monkeypatch: pytest.MonkeyPatch, slices: int) -> tuple[launch.Launch, Any]:
    """The launch of the filters of two flat rows, that of the mixture done, and its outputs."""
    monkeypatch.setattr(launch, "processors", lambda device: 2 * slices)
    ref = 0.3 * normal(212, 2, 6000)
    mixing = check_mixture(ref, [ref], [0.5])
    drawing = check_draw(mixing, seed=[1, 2], **FLAT[call])
    out = poisoned(2, None, "cpu")
    mixture, made = launch.sample_launches(mixing, drawing, tuple(out))
    mixture.run(torch.device("cpu"))
    return made, out


@pytest.mark.parametrize("slices", [2, 6])
@pytest.mark.parametrize("call", FLAT)
def test_programs_that_search_a_flat_row_together_draw_what_one_draws(call, slices, monkeypatch):
    made, out = filtered(call, monkeypatch, 1)
    made.run(torch.device("cpu"))
    expected, masses = results(out), made.arguments[2].masses.clone()
    assert out.valid.all()
    for seed in range(3):
        made, out = filtered(call, monkeypatch, slices)
        assert made.grid == (2 * slices,)
        interleave(made, seed, monkeypatch)
        assert results(out) == expected, seed
        assert torch.equal(made.arguments[2].masses, masses), seed


def test_a_search_that_does_not_go_on_makes_the_row_invalid(monkeypatch):
    monkeypatch.setattr(handoffs, "MOST_LOOKS", 20)
    made, out = filtered("top_p", monkeypatch, 3)
    work = made.arguments[2]
    work.searches[flat_rows.TICKETS.value] = 1  # a slice that nobody does
    interleave(made, 0, monkeypatch)
    assert out.valid.tolist() == [False, True]
    assert out.tokens[0] == 0 and out.logprobs[0].isnan()


def test_programs_that_wait_for_ever_are_seen(monkeypatch):
    made, _ = launched("jsd", monkeypatch, 3, 1, 1)
    made.arguments[2].arrivals[0] = -1  # one that will not come
    with pytest.raises(Stuck):
        interleave(made, 0, monkeypatch, most=2000)
