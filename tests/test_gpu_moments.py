"""The experiment with moments (bench/gpu/moments.py): the oracle's distribution and its tokens,
which rows its certificate refuses, and its machine code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_tokens_are_the_oracle_s, total_variation
from interpreter import INTERPRETED

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench is not installed

pytest.importorskip("triton")

from mod_fused.triton_kernels import launch  # noqa: E402
from mod_fused.triton_kernels.ahead_of_time import (  # noqa: E402
    TARGETS,
    compile_launch,
    machine_code,
)
from mod_fused.triton_kernels.tiles import POINT, STATE_FIELDS, STEPS  # noqa: E402

import mod_fused  # noqa: E402
from bench.gpu import moments  # noqa: E402
from bench.logits import generated  # noqa: E402
from mod_fused import reference  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
DIVERGENCES = ("forward_kl", "jsd")
WEIGHTS = {"shared": [0.6, 0.3], "simplex": [0.5, 0.5], "signed": [1.4, -0.6]}
CASES = [
    ("model", "shared", 3, 5000),
    ("model", "shared", 1, 1024),
    ("model", "simplex", 3, 33),
    ("model", "signed", 3, 2100),
    ("far", "simplex", 1, 1024),
    ("far", "signed", 3, 33),
]


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """From now on calls run the experiment's kernel; the states [B, STATE_FIELDS] of each."""
    states, shipped = [], launch.sample_launches

    def replaced(*args: Any) -> Any:
        calls, bad = shipped(*args)
        states.append(calls[0].arguments[2].states.view(-1, STATE_FIELDS.value))
        return moments.launches(*calls), bad

    monkeypatch.setattr(launch, "sample_launches", replaced)
    return states


def distribution(divergence: str, logits: list[torch.Tensor], weights: list[float], state: Any):
    """log pi* [V] of a row in float64 at the point that its state holds."""
    ref, *policies = (reference.log_softmax(reference.to_float64(x)) for x in logits)
    if divergence == "forward_kl":
        deficits = [np.exp(ref - x) for x in policies]
    else:
        deficits = [np.logaddexp(0.0, ref - x) for x in policies]
    distance = sum(w * q for w, q in zip(weights, deficits, strict=True))
    distance = distance - distance.min()
    x = distance if divergence == "forward_kl" else np.expm1(np.minimum(distance, 80.0))
    key = ref - np.log(float(state[POINT.value]) + x)
    return reference.log_softmax(key)


@interpreted
@pytest.mark.parametrize(
    ("setting", "weights", "batch", "vocab"), CASES, ids=["-".join(map(str, c)) for c in CASES]
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_and_log_probabilities_are_the_oracle_s(
    divergence, setting, weights, batch, vocab, experiment
):
    ref, *policies = generated(setting, vocab, batch, 2).bfloat16()
    arguments = ref, policies, WEIGHTS[weights]
    seeds = torch.arange(batch) + 17
    drawn = mod_fused.sample(*arguments, divergence=divergence, seed=seeds, backend="triton")
    assert drawn.valid.all() and len(experiment) == 1
    expected = reference.log_probs(*arguments, divergence=divergence)
    assert_tokens_are_the_oracle_s(drawn.tokens, expected, seeds, [0] * batch)
    error = np.abs(drawn.logprobs.double().numpy() - expected[range(batch), drawn.tokens])
    assert error.max() <= 1e-4
    rows = [
        distribution(divergence, [ref[b], *(p[b] for p in policies)], WEIGHTS[weights], state)
        for b, state in enumerate(experiment[0])
    ]
    tv = total_variation(np.stack(rows), expected)
    steps = experiment[0][:, STEPS.value]
    print(f"total variation {tv.max():.1e}, {int((steps > 0).sum())} of {batch} rows swept again")
    assert tv.max() <= 2e-5
    if setting == "model" and weights != "signed":
        # But for a row whose point is 1e-4 of the centre, beside several poles.
        assert (steps > 0).sum() <= batch // 3, "moments are enough where policies are mild"


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_the_certificate_refuses_are_finished_by_sweeps(
    divergence, experiment, monkeypatch
):
    # No step on the model, and a certificate that nothing meets.
    monkeypatch.setattr(moments, "MODEL_STEPS", 0)
    monkeypatch.setattr(moments, "CERTIFICATE", -1.0)
    ref, *policies = generated("model", 2100, 2, 2).bfloat16()
    ref[1] = torch.nan  # an invalid row is swept no more
    drawn = mod_fused.sample(
        ref, policies, [0.6, 0.3], divergence=divergence, seed=1, backend="triton"
    )
    assert drawn.valid.tolist() == [True, False]
    assert experiment[0][0, STEPS.value] > 0.0 and experiment[0][1, STEPS.value] == 0.0
    expected = reference.log_probs(ref, policies, [0.6, 0.3], divergence=divergence)
    assert abs(float(drawn.logprobs[0]) - expected[0, drawn.tokens[0]]) <= 1e-4


@compiled
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiled_kernels_spill_nothing(divergence, target):
    from test_triton_compile import launches

    for call in moments.launches(*launches(divergence=divergence)):
        code = machine_code(compile_launch(call, TARGETS[target]))
        print(f"{divergence} {target} phase {call.arguments[-1]}: {code}")
        assert (code.spills, code.stack) == (0, 0), code
