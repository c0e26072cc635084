"""Programs that run at the same time: whatever their order, the results are the same, nobody waits
for ever, and counters are left at zero (TRITON_INTERPRET=1)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from calls import poisoned
from cases import logits
from interleaving import Stuck, interleave
from mod_fused.triton_kernels import launch
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


def test_programs_that_wait_for_ever_are_seen(monkeypatch):
    made, _ = launched("jsd", monkeypatch, 3, 1, 1)
    made.arguments[2].arrivals[0] = -1  # one that will not come
    with pytest.raises(Stuck):
        interleave(made, 0, monkeypatch, most=2000)
