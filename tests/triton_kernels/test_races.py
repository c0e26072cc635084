"""The race of tokens: the same token whether every tile has run its own, or the winner's alone runs
afterwards (TRITON_INTERPRET=1)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import logits
from mod_fused.triton_kernels import configurations, launch

import mod_fused

pytestmark = pytest.mark.interpreted

BATCH, VOCAB = 4, 2500
FEW = "log_linear, few rows"


def mask() -> torch.Tensor:
    allowed = torch.rand(BATCH, VOCAB, generator=torch.Generator().manual_seed(5)) < 0.5
    allowed[1] = False
    allowed[1, 2400:] = True  # all mass in the last parts
    allowed[2] = False
    return allowed


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 1e-30},
    "hot": {"temperature": 1e30},
    "by row": {"temperature": torch.tensor([0.0, 0.3, 1.0, 2.0])},
    "mask": {"mask": mask(), "temperature": 0.7, "return_proposal_logprobs": True},
    "models": {"return_model_logprobs": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_races_in_every_tile_draw_what_one_race_in_the_winner_draws(name, dtype, monkeypatch):
    ref, policies = logits(31, BATCH, VOCAB, 1, dtype=dtype, kind="typical")
    ref[3, ::2] = -math.inf
    policies[0][0, 1024:1030] = policies[0][0].max() + 9  # equal keys: the lowest id wins at 0
    ref[0, 1024:1030] = ref[0].max()
    ways = []
    variant_of = launch.variant_of

    def watched(*args: Any) -> launch.Variant:
        found = variant_of(*args)
        ways.append(found.races)
        return found

    monkeypatch.setattr(launch, "variant_of", watched)
    args, given = (ref, policies, [0.7]), CALLS[name] | {"seed": 3, "position": 9}
    outs = []
    for chunk in (1, 4):
        table = {**configurations.TABLE, FEW: configurations.Configuration(chunk=chunk)}
        with configurations.using(table):
            outs.append(mod_fused.sample(*args, **given, backend="triton"))
    assert ways == [True, False]
    few, many = outs
    for a, b in zip(few, many, strict=True):
        assert a is b is None or torch.equal(a.double().nan_to_num(-7), b.double().nan_to_num(-7))
    expected = mod_fused.sample(*args, **given, backend="torch")
    assert torch.equal(few.tokens, expected.tokens) and torch.equal(few.valid, expected.valid)
    if name == "greedy":
        assert few.tokens[0] == 1024
