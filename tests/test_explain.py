"""`explain`: the numbers of one row on every backend beside the oracle's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mod_fused
from mod_fused import reference
from mod_fused.app import doctor
from mod_fused.divergence import ForwardKL

V, B = 2500, 2


def inputs(seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ref = 3.0 * torch.randn(B, V, generator=generator)
    return ref, [ref + torch.randn(B, V, generator=generator) for _ in range(2)]


def explained(op: Any, *args: Any, **kwargs: Any) -> mod_fused.Explanation:
    return op._call(mod_fused.explain, args, kwargs)


def drawn(op: Any, ref: Any, policies: Any, weights: Any, row: int, **kwargs: Any) -> int:
    return int(op.sample(ref, policies, weights, **kwargs).tokens[row])


GENERATOR = torch.Generator().manual_seed(5)
CASES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "forward_kl": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd"},
    "alpha": {"divergence": "alpha:0.5"},
    "jeffrey": {"divergence": "jeffrey"},
    "values": {"divergence": "jsd", "values": 0.3 * torch.randn(1, B, V, generator=GENERATOR)},
    "prefix": {
        "divergence": "alpha:0.5",
        "prefix_logprobs": torch.tensor([[-3.0, -2.0, -4.0], [-3.0, -2.5, -3.5]]),
    },
    "own mass": {
        "divergence": "jsd",
        "prefix_logprobs": torch.tensor([[-3.0, -2.0, -4.0], [-30.0, -22.0, -41.0]]),
        "mixture_prefix_logprobs": torch.tensor([-2.5, -26.0]),
    },
    "own mass, any": {
        "divergence": "jeffrey",
        "prefix_logprobs": torch.tensor([[-3.0, -2.0, -4.0], [-3.0, -2.5, -3.5]]),
        "mixture_prefix_logprobs": torch.tensor([-2.5, -4.0]),
        "plausibility": 1e-3,
    },
    "zero": {"divergence": "forward_kl", "normalizer": "zero"},
    "filters": {"divergence": "jsd", "temperature": 0.8, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    "mask": {"divergence": "jeffrey", "mask": torch.arange(V).expand(B, V) % 3 == 0},
    "greedy": {"divergence": "jsd", "temperature": 0.0},
    "bias": {
        "divergence": "jsd",
        "bias": torch.randn(B, V, generator=GENERATOR),
        "mask": torch.arange(V).expand(B, V) % 3 == 0,
        "top_p": 0.99,
    },
    "sparse bias": {"bias": torch.tensor([4.0, -2.0]), "bias_ids": torch.tensor([7, V - 1])},
}

LOG_LINEAR = ("reverse_kl", "sparse bias")


@pytest.mark.parametrize("case", CASES)
def test_its_numbers_are_the_oracles_and_its_token_is_that_of_sample(op: Any, case: str) -> None:
    arguments = CASES[case]
    ref, policies = inputs()
    found = explained(op, ref, policies, [0.6, 0.3], **arguments, seed=3, position=2, row=1)
    expected = found.oracle
    assert found.backend == op.backend and found.valid and expected.valid
    assert found.token == found.winner == expected.token
    assert found.token == drawn(op, ref, policies, [0.6, 0.3], 1, **arguments, seed=3, position=2)
    log_norms = [float(torch.logsumexp(x[1].double(), 0)) for x in (ref, *policies)]
    assert found.norms == pytest.approx(log_norms, abs=1e-4)
    assert expected.norms == pytest.approx(log_norms, abs=1e-9)
    close: dict[str, Any] = {"rel": 1e-4, "abs": 1e-5}
    for name in (
        "tau", "z", "shifts", "log_ratios", "deficits", "total_deficit", "least_deficit",
        "excess_deficit",
    ):  # fmt: skip
        theirs = getattr(expected, name)
        assert (theirs is None) == (case in LOG_LINEAR), name
        assert getattr(found, name) == (
            theirs if theirs is None else pytest.approx(theirs, **close)
        )
    assert (found.lower is None) == (case in (*LOG_LINEAR, "zero"))
    if found.lower is not None:
        assert found.lower <= expected.tau <= found.upper
        assert op.backend == "cpu" or found.evaluations > 0
    assert list(found.filters) == list(expected.filters)
    for name, one in found.filters.items():
        assert one == pytest.approx(expected.filters[name], rel=1e-4), name
    for mine, theirs in ((found.tile, expected.tile), (found.race, expected.race)):
        assert (mine is None) == (theirs is None) == (case == "greedy")
        if mine is not None:
            assert mine == pytest.approx(theirs, rel=1e-4)
    assert (found.bias is None) == ("bias" not in arguments) and found.bias == expected.bias
    if case == "bias":
        assert found.bias == arguments["bias"][1, found.token]
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert found.proposal_logprob == pytest.approx(expected.proposal_logprob, abs=1e-4)


def test_the_oracles_tau_solves_the_equation() -> None:
    ref, policies = inputs()
    found = mod_fused.explain(ref, policies, [0.6, 0.3], divergence="forward_kl", seed=1).oracle
    lr = torch.log_softmax(ref[0].double(), 0)
    q = sum(
        w * torch.exp(lr - torch.log_softmax(x[0].double(), 0))
        for w, x in zip((0.6, 0.3), policies, strict=True)
    )
    total = (lr.exp() / (found.tau + q - q.min())).sum()  # H(q) = 1 / q
    assert float(total) == pytest.approx(1.0, abs=1e-9)
    assert found.least_deficit == pytest.approx(float(q.min()))
    assert found.lower <= found.tau <= found.upper
    # f' = -1/x, and f'(pi* / pi_ref) = u - Z
    assert found.z == pytest.approx(
        -found.total_deficit + math.exp(float(lr[found.token]) - found.logprob)
    )


def test_the_race_shows_its_margin() -> None:
    ref, policies = inputs()
    found = mod_fused.explain(ref, policies, [0.6, 0.3], seed=torch.tensor([11, 12]), row=1)
    p = torch.from_numpy(reference.log_probs(ref, policies, [0.6, 0.3])[1]).exp()
    tiles = [float(x.sum()) for x in p.split(reference.TILE)]
    times = reference.exponentials(12, 0, range(3), 0) / tiles
    first, second = sorted(range(3), key=lambda t: times[t])[:2]
    assert (found.tile.winner, found.tile.runner_up) == (first, second)
    assert found.tile.runner_up_quotient == pytest.approx(times[second], rel=1e-4)
    assert found.race.winner // reference.TILE == first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"logit": torch.inf}, "logit"),
        ({"mask": torch.zeros(B, V, dtype=torch.bool)}, "mask"),
        ({"bias": torch.full((V,), -torch.inf)}, "bias"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "parameter"),
    ],
)
def test_an_invalid_row_says_why(op: Any, change: dict[str, Any], reason: str) -> None:
    ref, policies = inputs()
    policies[0][1, 3] = change.get("logit", 0.0)
    others = {name: x for name, x in change.items() if name != "logit"}
    found = explained(op, ref, policies, [0.6, 0.3], **others, seed=1, row=1)
    assert not found.valid and reason in found.reason and found.norms is None
    assert "False" in str(found) and "tau" not in str(found)


def test_a_row_outside_the_batch_is_refused() -> None:
    ref, policies = inputs()
    for row in (-1, B):
        with pytest.raises(ValueError, match=rf"row must be in \[0, {B}\), got {row}"):
            mod_fused.explain(ref, policies, [0.6, 0.3], row=row)


def test_a_broken_divergence_shows_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    ref, policies = inputs()
    arguments = {"divergence": "forward_kl", "seed": 1, "backend": "torch"}
    right = mod_fused.explain(ref, policies, [0.6, 0.3], **arguments)
    assert right.tau == pytest.approx(right.oracle.tau, rel=1e-4)
    monkeypatch.setattr(ForwardKL, "deficit", lambda self, d: 1.1 * torch.exp(-d))
    wrong = mod_fused.explain(ref, policies, [0.6, 0.3], **arguments)
    assert wrong.tau != pytest.approx(wrong.oracle.tau, rel=1e-2)
    assert wrong.deficits != pytest.approx(wrong.oracle.deficits, rel=1e-2)
    line = next(x for x in str(wrong).splitlines() if x.startswith("tau"))
    assert f"{wrong.tau:.9g}" in line and f"{wrong.oracle.tau:.9g}" in line


def test_reverse_kl_shows_neither_tau_nor_z() -> None:
    ref, policies = inputs()
    lines = str(mod_fused.explain(ref, policies, [0.6, 0.3], seed=1)).splitlines()
    names = {line.split("  ")[0] for line in lines}
    assert {"what", "norms[0]", "tile winner", "token"} <= names and not {"tau", "z"} & names


def test_doctor_explains_the_first_wrong_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "working", lambda: [("torch", "cpu")])
    monkeypatch.setattr(doctor, "DIVERGENCES", ["forward_kl"])
    assert doctor.run() == 0
    assert "first wrong row" not in capsys.readouterr().out
    monkeypatch.setattr(ForwardKL, "log_ratio", lambda self, q: -1.1 * torch.log(q))
    assert doctor.run() == 1
    out = capsys.readouterr().out
    assert "the first wrong row: torch, forward_kl log pi*" in out
    assert "tau" in out and "race winner" in out and "oracle" in out


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_far_levels_leave_its_numbers(backend: str) -> None:
    if mod_fused.backends()[backend] != "available":
        pytest.skip(mod_fused.backends()[backend])
    ref, policy = torch.full((1, 3), 1e16), torch.tensor([[0.0, 1.0, 2.0]])
    found = mod_fused.explain(ref, [policy], [0.5], divergence="jsd", seed=1, backend=backend)
    for name in ("tau", "z", "log_ratios", "least_deficit"):
        assert getattr(found, name) == pytest.approx(getattr(found.oracle, name), abs=1e-5), name
