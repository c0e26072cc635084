"""The Triton kernels in Triton's interpreter: how the work is cut, the device functions, the C++
backend's tokens. The tests of the op run there too, some of their cases (interpreter.py).

More draws: `MOD_FUSED_DRAWS=5000 TRITON_INTERPRET=1 pytest tests/triton_kernels/test_interpreter.py
-k tokens`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import DIVERGENCES, KNOWN_ANSWERS, check, logits, normal
from mod_fused.triton_kernels import (
    divergences,
    elementary,
    filters,
    launch,
    mixture,
    moments,
    normalizer,
)
from mod_fused.triton_kernels.configurations import configuration
from mod_fused.triton_kernels.workspace import STEPS

import mod_fused
from mod_fused import reference
from mod_fused.call.checks import check_mixture
from mod_fused.divergence import Divergence, get_divergence
from mod_fused.torch_kernels import philox

pytestmark = pytest.mark.interpreted

DRAWS = int(os.environ.get("MOD_FUSED_DRAWS", "56"))


class Triton:
    """The op as the tests of the op see it."""

    backend, device = "triton", "cpu"

    @staticmethod
    def log_probs(*args: Any, **kwargs: Any) -> torch.Tensor:
        return mod_fused.log_probs(*args, **kwargs, backend="triton")

    @staticmethod
    def sample(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {"return_model_logprobs": True, "return_proposal_logprobs": True}
        return mod_fused.sample(*args, **kwargs, backend="triton")


OP = Triton()


def assert_identical(x: Any, y: Any) -> None:
    """Same bits, NaN included."""
    for a, b in zip(x, y, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.numpy().tobytes() == b.numpy().tobytes()


@pytest.fixture
def workspaces(monkeypatch):
    """The workspaces of all launches, found poisoned."""
    made, make = [], launch.make_workspace

    def record(*args):
        workspace = make(*args)
        for x in (workspace.states, workspace.fields):
            assert x.isnan().all()
        made.append(workspace)
        return workspace

    monkeypatch.setattr(launch, "make_workspace", record)
    return made


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    """Programs run one after the other here: who had to wait would wait for ever."""

    def wait_for(flag, value):
        assert bool(tl.load(flag) >= value), "a task waits for one with a higher ticket"
        return tl.full([], True, tl.int1)

    monkeypatch.setattr(mixture, "wait_for", wait_for)


# --- how the work is cut --------------------------------------------------------------------------


def cut(monkeypatch: pytest.MonkeyPatch, programs: int, group: int, **changes: int) -> None:
    """From now on calls run on so many programs and interleave so many rows."""
    changes["programs_per_processor"] = programs
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    monkeypatch.setattr(launch, "rows_together", lambda *args: group)
    monkeypatch.setattr(
        launch, "configuration", lambda *args: dataclasses.replace(configuration(*args), **changes)
    )


# Programs, chunk and group: every number of each, chunks that divide the tiles and not, groups that
# divide the rows and not.
CUTS = [(1, 1, 1), (2, 2, 3), (3, 3, 2), (4, 4, 1), (5, 1, 2)]
CALLS: dict[str, dict[str, Any]] = {
    "one_phase": {"divergence": "reverse_kl"},
    "two_phases": {"divergence": "reverse_kl", "plausibility": 0.001},
    "secular": {"divergence": "jsd"},
    "newton": {"divergence": "jeffrey"},
}


@pytest.mark.parametrize("call", CALLS)
def test_how_the_work_is_cut_changes_no_bit_and_counters_are_left_at_zero(
    call, monkeypatch, workspaces
):
    ref, policies = logits(201, 4, 2100, 1, kind="typical")
    policies[0][1] = math.nan  # an invalid row goes through all phases too
    kwargs = {**CALLS[call], "seed": torch.arange(4)}
    results = []
    for programs, chunk, group in CUTS if call != "newton" else CUTS[1:3]:
        cut(monkeypatch, programs, group, chunk=chunk)
        drawn = OP.sample(ref, policies, [0.5], **kwargs)
        results.append([OP.log_probs(ref, policies, [0.5], **CALLS[call]), *drawn])
        assert drawn.valid.tolist() == [True, False, True, True]
    for result in results[1:]:
        assert_identical(results[0], result)
    alone = OP.sample(ref[2:3], [policies[0][2:3]], [0.5], **{**kwargs, "seed": torch.tensor([2])})
    assert_identical([x[2:3] for x in results[0][1:]], alone)
    assert len(workspaces) == 2 * len(results) + 1
    for w in workspaces:
        assert not any(x.any() for x in (w.tickets, w.flags, w.arrivals))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_blocks_of_the_filters_change_no_bit(divergence, monkeypatch):
    ref, policies = logits(202, 2, 9300, 1, kind="typical")
    results, swept, search = [], [], filters.search_row

    def count(work, row, *rest):
        swept.append(int(row))
        return search(work, row, *rest)

    monkeypatch.setattr(filters, "search_row", count)
    for block in (1024, 2048, 4096):
        cut(monkeypatch, 1, 1, filter_block=block)
        results.append(
            OP.sample(
                ref, policies, [0.5], divergence=divergence, seed=1, top_k=[6000, 3000],
                top_p=0.9, min_p=0.001, temperature=[0.5, 2.0],
            )
        )  # fmt: skip
        assert results[-1].valid.all()
    assert_identical(results[0], results[1])
    assert_identical(results[0], results[2])
    assert swept == [0, 1] * 3


@pytest.mark.parametrize(
    ("vocab", "divergence"),
    [(1, "jsd"), (31, "jeffrey"), (1023, "alpha:0.5"), (1025, "jsd"), (4099, "jeffrey"),
     (50261, "reverse_kl"), (50261, "forward_kl")],
)  # fmt: skip
def test_vocabularies_of_any_length_match_the_oracle(vocab, divergence, workspaces):
    ref, policies = logits(203, 1, vocab, 2, kind="typical", dtype=torch.bfloat16)
    check(OP, ref, policies, [0.5, 0.25], divergence=divergence)


@pytest.mark.parametrize("divergence", ["jsd", "alpha:0.25", "jeffrey"])
def test_rows_that_are_not_solved_in_time_finish_alone(divergence, monkeypatch):
    monkeypatch.setattr(launch, "MOMENTS_EVALUATIONS", 1)
    monkeypatch.setattr(launch, "SECULAR_EVALUATIONS", 1)
    monkeypatch.setattr(launch, "NEWTON_EVALUATIONS", 1)
    monkeypatch.setattr(moments, "MOST_PASSES", tl.constexpr(0))  # they would solve the rows
    ref, policies = logits(204, 3, 2100, 2, kind="apart")
    steps = []
    name = "step_newton" if divergence == "jeffrey" else "step_stieltjes"
    step = getattr(normalizer, name)

    def count(mixing, state, s1, s2, variant):
        steps.append(state)
        step(mixing, state, s1, s2, variant)

    monkeypatch.setattr(normalizer, name, count)
    check(OP, ref, policies, [0.5, 0.5], divergence=divergence)
    assert len(steps) > 3  # steps after the one that is spread


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.75"])
def test_three_evaluations_after_the_first_step_are_enough_two_after_moments(
    divergence, monkeypatch, workspaces
):
    ref, policies = logits(205, 6, 2100, 2, kind="typical")
    monkeypatch.setattr(launch, "MOMENTS_EVALUATIONS", 2)
    monkeypatch.setattr(launch, "SECULAR_EVALUATIONS", 3)
    monkeypatch.setattr(mixture, "MAX_EVALUATIONS", 0)
    check(OP, ref, policies, [0.5, 0.5], divergence=divergence)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5"])
def test_one_evaluation_does_for_half_the_rows_where_z_0_has_no_inverse(divergence, workspaces):
    ref, policies = logits(214, 6, 2100, 2, kind="brutal")
    check(OP, ref, policies, [1.5, -0.5], divergence=divergence)
    zero = mod_fused.log_probs(
        ref, policies, [1.5, -0.5], divergence=divergence, normalizer="zero", backend="torch"
    )
    assert zero.isnan().all()
    steps = workspaces[0].states.view(6, -1)[:, STEPS.value]
    assert (steps == 1.0).sum() >= 3, steps


@pytest.mark.parametrize("other", [6, 505, 1500], ids=["one part", "two parts", "two tiles"])
@pytest.mark.parametrize(
    ("divergence", "log_p"), [("forward_kl", -50.0), ("jsd", -50.3), ("alpha:0.5", -64.0)]
)
def test_tokens_that_the_reference_all_but_excludes_share_the_mass(divergence, log_p, other):
    ref = torch.full((1, 2048), -75.0)
    policy = ref.clone()
    ref[0, 0], ref[0, [5, other]] = 0.0, log_p
    policy[0, [5, other]] = -math.log(2.0)
    check(OP, ref, [policy], [1.0], divergence=divergence)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5"])
def test_such_rows_are_not_bisected(divergence, workspaces):
    # p times the slope of H is a number there, the slope alone is beyond float32.
    ref = torch.full((1, 2048), -75.0)
    policy = ref.clone()
    ref[0, [0, 5, 6]] = torch.tensor([0.0, -50.0, -51.0])
    policy[0, [5, 6]] = -math.log(2.0)
    for weight, most in ((1.0, 1.0), (1.5, 2.0)):
        check(OP, ref, [policy], [weight], divergence=divergence)
        assert workspaces[-1].states[STEPS.value] <= most


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.25"])
def test_where_all_policies_agree_no_row_is_bisected(divergence, workspaces):
    # tau is then an end of its bracket, which rounding may put on the wrong side.
    ref, _ = logits(2, 6, 200, 1, kind="brutal")
    check(OP, ref, [ref.clone(), ref.clone()], [0.3, 0.7], divergence=divergence)
    assert workspaces[0].states.view(6, -1)[:, STEPS.value].max() <= 2.0


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_views_at_odd_offsets_and_strides_give_the_same_bits(divergence):
    batch, vocab = 3, 1501
    ref, policies = logits(206, batch, vocab, 1, dtype=torch.float16)
    rng = np.random.default_rng(206)
    mixing = {
        "values": normal(207, 2, batch, 40),
        "value_ids": torch.from_numpy(np.argsort(rng.random((batch, vocab)))[:, :40].copy()),
        "value_weights": normal(208, batch, 2),
        "prefix_logprobs": normal(209, batch, 2).double(),
    }
    drawing = {
        "mask": torch.from_numpy(rng.random((batch, vocab)) < 0.7),
        "temperature": torch.tensor([0.5, 1.0, 2.0]),
        "top_p": torch.tensor([0.5, 1.0, 0.9], dtype=torch.float64),
        "top_k": torch.tensor([0, 5, 2**40]),
        "min_p": torch.tensor([0.0, 0.1, 0.0]),
        "seed": torch.arange(batch) * 7,
        "position": torch.arange(batch),
    }
    drawing["mask"].scatter_(1, mixing["value_ids"][:, :10], True)
    weights = normal(210, batch, 1)

    def odd(x: torch.Tensor) -> torch.Tensor:
        """The same logits, an odd number of elements from row to row, NaN in between."""
        buffer = torch.full((batch * (vocab + 12) + 7,), torch.nan, dtype=x.dtype)
        view = buffer.as_strided(x.shape, (vocab + 12, 1), 3)
        return view.copy_(x)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 1:
            return torch.stack([x, x, x], dim=1)[:, 1]
        return x.t().contiguous().t() if x.dim() == 2 else torch.stack([x] * 3, dim=2)[:, :, 1]

    plain = OP.sample(ref, policies, weights, divergence=divergence, **mixing, **drawing)
    moved = OP.sample(
        odd(ref), [odd(policies[0])], strided(weights), divergence=divergence,
        **{name: strided(x) for name, x in {**mixing, **drawing}.items()},
    )  # fmt: skip
    assert plain.valid.all()
    assert_identical(plain, moved)


# --- the C++ backend's tokens ---------------------------------------------------------------------

FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.4, "top_k": 100},
    {"min_p": 0.01},
)
MASK = torch.from_numpy(np.random.default_rng(213).random((1, 1500)) < 0.5)


def test_same_tokens_as_the_cpp_backend_for_the_same_seeds():
    if mod_fused.backends()["cpu"] != "available":
        pytest.skip(mod_fused.backends()["cpu"])
    cells = [(d, f) for d in DIVERGENCES for f in FILTERS]
    rows, other = -(-DRAWS // len(cells)), 0
    for i, (divergence, own) in enumerate(cells):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        ref, policies = logits(211 + i, 1, 1500, 2, kind="typical", dtype=dtype)
        if i % 3 == 0:
            ref, policies = ref.round(), [p.round() for p in policies]  # ties
        args = ref.expand(rows, -1), [p.expand(rows, -1) for p in policies], [0.5, 0.4]
        kwargs = {"divergence": divergence, "seed": i, "position": list(range(rows)), **own}
        kwargs["return_proposal_logprobs"] = True
        if i % 5 == 0:
            kwargs["mask"] = MASK.expand(rows, -1)
        ours, theirs = (mod_fused.sample(*args, **kwargs, backend=b) for b in ("triton", "cpu"))
        other += int((ours.tokens != theirs.tokens).sum())
        same = ours.tokens == theirs.tokens
        assert (ours.logprobs - theirs.logprobs)[same].abs().max() <= 2e-5
        assert (ours.proposal_logprobs - theirs.proposal_logprobs)[same].abs().max() <= 1e-4
    total = rows * len(cells)
    print(f"{total - other} of {total} tokens equal")
    # Two distributions TV e apart differ in at most 2 e of the draws (design §3), e about 1e-6.
    assert other <= total // 10_000


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def apply_kernel(x, out, a, F: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, F(tl.load(x + i), a))


def apply(function: Any, x: np.ndarray, a: float = 0.0) -> np.ndarray:
    """A device function of float32 numbers, in float64."""
    size = triton.next_power_of_2(len(x))
    padded = torch.from_numpy(np.resize(x, size)).float()
    out = torch.empty(size)
    apply_kernel[(1,)](padded, out, a, F=function, N=size)
    return out.double().numpy()[: len(x)]


RATIOS = np.concatenate([-np.geomspace(1e-6, 80, 60), [0.0], np.geomspace(1e-6, 80, 60)])
SMALL_ALPHAS = ("alpha:0.001", "alpha:0.02")  # measured from f'(1) = 0
QS = np.geomspace(1e-30, 1e30, 400)  # of a bounded divergence
JEFFREY_QS = np.concatenate([-np.geomspace(1e-4, 1e3, 100), [0.0], np.geomspace(1e-4, 1e30, 300)])


@pytest.mark.parametrize("function", ["deficit", "log_ratio", "log_slope"])
@pytest.mark.parametrize(
    "name",
    ["forward_kl", "jsd", "alpha:0.1", "alpha:0.5", "alpha:0.9", *SMALL_ALPHAS, "jeffrey"],
)
def test_divergences_equal_those_of_python(name, function):
    if function == "deficit":
        inputs = RATIOS if name != "jsd" else np.concatenate([RATIOS, [-1e4, -300.0, 300.0, 1e4]])
    else:
        inputs = JEFFREY_QS if name == "jeffrey" else QS
        inputs = inputs[inputs < 1e4] if name == "jsd" else inputs
        if name in SMALL_ALPHAS:  # from just above -1/alpha
            inputs = np.concatenate([-np.geomspace(1e-4, 0.9 / float(name[6:]), 99), inputs])
    divergence = get_divergence(name)
    ours = getattr(divergences.device_functions(divergence), function)
    got = apply(ours, inputs, getattr(divergence, "alpha", 0.0))
    x = torch.from_numpy(inputs).float().double()
    expected = getattr(divergence, function)(x).numpy()
    error = np.abs(got - expected) / np.maximum(np.abs(expected), 0.5)
    assert error.max() <= 4e-6, f"at {x[error.argmax()]}: {got[error.argmax()]}"


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "alpha:0.1", "alpha:0.5", "alpha:0.9"])
def test_the_stieltjes_forms_are_the_divergences_own(name):
    # H(tau + D) is proportional to (shift(tau) + excess(D))^(-1/order).
    divergence = get_divergence(name)
    alpha = getattr(divergence, "alpha", 0.0)
    functions = divergences.device_functions(divergence)
    excess = np.concatenate([[0.0], np.geomspace(1e-6, 30.0, 50)])
    for tau in (1e-4, 0.03, 0.7, 5.0):
        t = float(apply(functions.shift, np.array([tau]), alpha)[0])
        log_h = -np.log(t + apply(functions.excess, excess, alpha)) / (alpha or 1.0)
        expected = divergence.log_ratio(torch.from_numpy(np.float64(np.float32(tau)) + excess))
        difference = log_h - expected.numpy()
        assert np.ptp(difference) <= 2e-6 / (alpha or 1.0)
        back = apply(functions.unshift, np.array([t]), alpha)[0]
        assert abs(back / tau - 1.0) <= 1e-6 / min(1.0, math.exp(-tau))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "jeffrey"])
def test_the_list_of_divergences_alone_says_how_one_is_computed(name, monkeypatch):
    known = get_divergence(name)
    fields = {x: getattr(known, x) for x in ("supremum", "bounded", "clamped")}
    unknown = type("Unknown", (Divergence,), {"name": "unknown", **fields})()
    entries = divergences.DIVERGENCES
    monkeypatch.setattr(divergences, "DIVERGENCES", {"unknown": entries[name]})
    ref, policies = logits(220, 2, 1100, 2, kind="typical")
    mixing = check_mixture(ref, policies, [0.5, 0.4], divergence=name)
    found = torch.empty(2, 1100)
    launch.log_probs_out(mixing._replace(divergence=unknown), found)
    monkeypatch.setattr(divergences, "DIVERGENCES", entries)
    assert_identical([found], [OP.log_probs(ref, policies, [0.5, 0.4], divergence=name)])


class Order(NamedTuple):
    root: bool


@triton.jit
def two_poles_kernel(near, far, distance, right, out, order, V: tl.constexpr, N: tl.constexpr):
    n = tl.full([], order, tl.float64)
    for i in range(N):
        args = tl.load(near + i), tl.load(far + i), tl.load(distance + i), tl.load(right + i)
        tl.store(out + i, normalizer.two_poles(args[0], args[1], args[2], args[3], n, V))


@pytest.mark.parametrize("alpha", [None, 0.1, 0.5, 0.75, 0.9])
def test_the_model_with_two_poles_is_solved(alpha):
    rng, count = np.random.default_rng(212), 256
    order = 1.0 / (alpha or 1.0)
    near, distance = np.exp(-rng.uniform(0, 30, count)), np.exp(rng.uniform(-15, 5, count))
    far = rng.uniform(0, 3, count) * distance**order
    right = np.full(count, 1.5)
    # A far pole that leaves little to the near one, down to a millionth.
    far[125:] = (1.5 * (1.0 - 10 ** -rng.uniform(0, 6, count)) * distance**order)[125:]
    distance[:12], far[:25] = 0.0, 0.0
    out = torch.empty(count, dtype=torch.float64)
    inputs = [torch.from_numpy(x) for x in (near, far, distance, right)]
    two_poles_kernel[(1,)](*inputs, out, order, V=Order(alpha is not None), N=count)
    y = out.numpy()
    model = near * y**-order + far * (y + distance) ** -order
    assert np.abs(model / right - 1.0).max() <= 1e-6


# --- random numbers -------------------------------------------------------------------------------


@triton.jit
def words_kernel(seed, position, index, out, STREAM: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    high, low = elementary.philox(tl.load(seed), tl.load(position), tl.load(index + i), STREAM)
    tl.store(out + i, high.to(tl.int64))
    tl.store(out + N + i, low.to(tl.int64))


@triton.jit
def exponential_kernel(seed, position, out, STREAM: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, elementary.exponential(tl.load(seed), tl.load(position), i, STREAM))


@triton.jit
def split_mix_kernel(state, out, rows):
    for row in range(rows):
        tl.store(out + row, elementary.split_mix(tl.load(state + row)))


def int64(*numbers: int) -> torch.Tensor:
    """The numbers of the same 64 bits."""
    return torch.tensor([(n + 2**63) % 2**64 - 2**63 for n in numbers])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers_of_random123(counter, key, words):
    index = torch.tensor([counter[2] - (counter[2] >> 31 << 32), 5], dtype=torch.int32)
    out = torch.empty(2, 2, dtype=torch.int64)
    seed, position = int64(key[0] | key[1] << 32), int64(counter[0] | counter[1] << 32)
    words_kernel[(1,)](seed, position, index, out, STREAM=counter[3], N=2)
    assert tuple(out[:, 0].tolist()) == words[:2]
    other = reference.philox4x32((*counter[:2], 5, counter[3]), key)
    assert tuple(out[:, 1].tolist()) == other[:2]


def test_exponentials_are_those_of_the_torch_backend():
    for stream, seed, position in ((0, 3, 0), (1, -(2**40) - 1, 2**33 + 7)):
        seeds, positions = int64(seed), int64(position)
        out = torch.empty(1 << 16)
        exponential_kernel[(1,)](seeds, positions, out, STREAM=stream, N=1 << 16)
        expected = philox.exponential(seeds, positions, torch.arange(1 << 16)[None], stream)[0]
        assert (out > 0.0).all() and out.isfinite().all()
        assert (out / expected - 1.0).abs().max() <= 5e-7


def test_split_mix_known_answers():
    states = int64(0, 1234567, -1, 2**63 - 1, -(2**63))
    out = torch.empty(5, dtype=torch.int64)
    split_mix_kernel[(1,)](states, out, 5)
    assert out[0] == int64(0xE220A8397B1DCDAF) and out[1] == 6457827717110365317
    assert out.tolist() == [reference.splitmix64(n) for n in states.tolist()]
