"""The search for tau from moments, without a sweep: the quadratures, and that rows are solved by
them where they are good, and only there (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import logits
from mod_fused.triton_kernels import draw, launch, moments
from mod_fused.triton_kernels.workspace import STEPS

import mod_fused
from mod_fused import reference

pytestmark = pytest.mark.interpreted

WEIGHTS = [0.6, 0.3]
FIXED = ["forward_kl", "jsd"]
VOCAB = 9000


@triton.jit
def quadrature_kernel(sums, most, out, N: tl.constexpr):
    i = tl.arange(0, N)
    s1, s2 = tl.load(sums + i), tl.load(sums + N + i)
    s3, s4 = tl.load(sums + 2 * N + i), tl.load(sums + 3 * N + i)
    found = moments.quadrature(s1, s2, s3, s4, tl.load(most + i))
    for k in tl.static_range(7):
        tl.store(out + k * N + i, found[k].to(tl.float32))


def quadratures(sums: np.ndarray, most: np.ndarray) -> np.ndarray:
    """What the device function makes of moments [4, parts]."""
    out = torch.empty(7, sums.shape[1])
    given = (torch.from_numpy(x).float() for x in (sums, most))
    quadrature_kernel[(1,)](*given, out, N=sums.shape[1])
    return out.numpy().astype(float)


def quadrature(h: np.ndarray, u: np.ndarray) -> np.ndarray:
    """low, its weight, high, its weight, inner, its weight, [6, parts], of measures [parts,
    tokens]."""
    sums = np.stack([(h * u**k).sum(1) for k in range(4)])
    *found, sound = quadratures(sums, u.max(1))
    assert sound.all()
    return np.stack(found)


def test_two_values_are_found_again():
    rng = np.random.default_rng(401)
    u = np.sort(rng.uniform(0.05, 3.0, (64, 2)), 1) * 10.0 ** rng.integers(-6, 6, (64, 1))
    u[:, 1] += u[:, 0]
    h = rng.uniform(0.1, 1.0, (64, 2))
    low, low_weight, high, high_weight, inner, inner_weight = quadrature(h, u)
    np.testing.assert_allclose(low, u[:, 0], rtol=1e-3)
    np.testing.assert_allclose(high, u[:, 1], rtol=1e-4)
    np.testing.assert_allclose(low_weight, h[:, 0], rtol=1e-3)
    np.testing.assert_allclose(high_weight, h[:, 1], rtol=1e-3)
    np.testing.assert_allclose(inner, u[:, 0], rtol=1e-3)
    np.testing.assert_allclose(inner_weight, h[:, 0], rtol=1e-3)


def test_the_moments_of_many_values_are_kept_and_none_is_larger_than_the_largest():
    rng = np.random.default_rng(402)
    u, h = rng.lognormal(size=(64, 256)), rng.lognormal(size=(64, 256))
    low, low_weight, high, high_weight, inner, inner_weight = quadrature(h, u)
    assert (0 < low).all() and (low < high).all() and (high <= u.max(1) * 1.001).all()
    weight, most = h.sum(1), u.max(1)
    for k in range(3):
        expected = (h * u**k).sum(1)
        found = low_weight * low**k + high_weight * high**k
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        found = inner_weight * inner**k + (weight - inner_weight) * most**k
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    # What lies between them: the sum itself, for t < t0.
    for step in (-0.1, -0.5, -0.9):
        of = lambda v, step=step: 1.0 / (1.0 + step * v / most)  # noqa: E731
        exact = (h / (1.0 + step * u / most[:, None])).sum(1)
        gauss = low_weight * of(low) + high_weight * of(high)
        radau = inner_weight * of(inner) + (weight - inner_weight) * of(most)
        assert (gauss <= exact * (1 + 1e-5)).all() and (exact <= radau * (1 + 1e-5)).all()


def test_parts_that_hold_nothing_or_one_value_have_one():
    u = np.array([[2.0, 2.0], [1e-8, 1e-8], [1e9, 1e9], [1.0, 1.0]])
    h = np.array([[1.0, 2.0], [1.0, 1.0], [1.0, 3.0], [0.0, 0.0]])
    low, low_weight, high, high_weight, inner, inner_weight = quadrature(h, u)
    np.testing.assert_allclose(low_weight + high_weight, h.sum(1))
    np.testing.assert_allclose(low[:3], u[:3, 0], rtol=1e-5)
    np.testing.assert_allclose(inner[:3], u[:3, 0], rtol=1e-5)
    assert (low[3], high[3], inner[3]) == (0.0, 0.0, 0.0)
    assert ((inner_weight >= 0) & (inner_weight <= h.sum(1))).all()


def test_moments_beyond_float32_are_known():
    nan, inf = np.nan, np.inf
    sums = np.array(
        [[1.0, 1.0, 1.0, nan, 1.0, 1e-20, 1.0, 0.0], [1.0, inf, 1.0, 1.0, 0.0, 0.0, nan, 0.0]]
        + [[0.9, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]]
    )
    assert quadratures(sums, np.full(8, 2.0))[-1].tolist() == [0.0] * 7 + [1.0]


class Watched:
    """Samples, and keeps how many evaluations each row took and the masses of the tiles that the
    race got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masses: dict[int, np.ndarray] = {}  # by where the row's state is
        self.work: Any = None
        make, solved = launch.make_workspace, draw.solved_masses

        def keep(*args: Any) -> Any:
            self.work = make(*args)
            return self.work

        def watch(mixing: Any, state: Any, *rest: Any) -> Any:
            found = solved(mixing, state, *rest)
            self.masses[state.handle.data.item()] = found.handle.data.astype(float)
            return found

        monkeypatch.setattr(launch, "make_workspace", keep)
        monkeypatch.setattr(draw, "solved_masses", watch)

    def run(
        self, kind: str, scale: float, divergence: str, **others: Any
    ) -> tuple[list[float], np.ndarray]:
        """Evaluations of each row, and how far its tiles' masses are from the oracle's (TV)."""
        ref, policies = logits(403, 3, VOCAB, 2, kind=kind)
        policies = [ref + scale * (x - ref) for x in policies]
        options: dict[str, Any] = {"divergence": divergence, "seed": [1, 2, 3], **others}
        self.masses.clear()
        ours = mod_fused.sample(ref, policies, WEIGHTS, backend="triton", **options)
        theirs = mod_fused.sample(ref, policies, WEIGHTS, backend="torch", **options)
        steps = self.work.states.view(3, -1)[:, STEPS.value].tolist()
        p = np.exp(
            np.array(reference.log_probs(ref, policies, WEIGHTS, divergence=divergence, **others))
        )
        tiles = np.add.reduceat(p, np.arange(0, VOCAB, 1024), axis=1)
        masses = np.stack([x for _, x in sorted(self.masses.items())])[:, : tiles.shape[1]]
        away = 0.5 * np.abs(masses / masses.sum(1, keepdims=True) - tiles).sum(1)
        if away.max() < 2e-5:
            assert torch.equal(ours.tokens, theirs.tokens)
            assert (ours.logprobs - theirs.logprobs).abs().max() < 5e-5
        return steps, away


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.mark.parametrize("divergence", FIXED)
@pytest.mark.parametrize(("kind", "scale"), [("mild", 1.0), ("mild", 0.1), ("typical", 0.3)])
def test_rows_near_their_reference_need_no_evaluation(kind, scale, divergence, watched):
    steps, away = watched.run(kind, scale, divergence)
    assert steps == [0.0] * 3
    assert away.max() < 5e-7


@pytest.mark.parametrize("divergence", FIXED)
@pytest.mark.parametrize("kind", ["typical", "apart", "brutal"])
def test_rows_between_are_evaluated_where_the_moments_do_not_do(kind, divergence, watched):
    for scale in (0.3, 1.0, 3.0):
        _, away = watched.run(kind, scale, divergence)
        assert away.max() < 1e-5, scale


@pytest.mark.parametrize("divergence", FIXED)
@pytest.mark.parametrize("behind", [-20.0, -28.0, -35.0, -50.0, -52.0, -55.0, -60.0])
def test_rows_far_behind_their_reference_are_right(behind, divergence, watched):
    prefix = torch.tensor([[0.0, behind, behind]]).repeat(3, 1)
    for kind, scale in (("mild", 0.3), ("mild", 3.0), ("typical", 1.0), ("apart", 1.0)):
        _, away = watched.run(kind, scale, divergence, prefix_logprobs=prefix)
        assert away.max() < 1e-5, kind


@pytest.mark.parametrize("divergence", FIXED)
@pytest.mark.parametrize("value", [-50.0, 3.0])
def test_rows_with_values_are_right(value, divergence, watched):
    values = torch.full((1, 3, VOCAB), value)
    _, away = watched.run("mild", 1.0, divergence, values=values)
    assert away.max() < 1e-5


@pytest.mark.parametrize("divergence", FIXED)
def test_the_certificate_is_what_keeps_other_rows_right(divergence, watched, monkeypatch):
    steps, away = watched.run("typical", 1.0, divergence)
    assert min(steps) >= 1.0 and away.max() < 1e-5
    monkeypatch.setattr(moments, "MOST_DIFFERENCE", tl.constexpr(1e3))
    steps, away = watched.run("typical", 1.0, divergence)
    assert min(steps) == 0.0 and away.max() > 2e-5
