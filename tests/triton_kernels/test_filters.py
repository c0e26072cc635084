"""The filters' kernel in the interpreter: the tokens that it keeps and the masses of its tiles
against the float64 oracle on the very keys, its tokens against the torch backend."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import logits, normal
from mod_fused.triton_kernels import (
    configurations,
    filters,
    flat_rows,
    launch,
    thresholds,
    workspace,
)

import mod_fused
from mod_fused import reference

pytestmark = pytest.mark.interpreted

INF = math.inf
TILE = 1024


class Kept(NamedTuple):
    """What the kernel made of a row."""

    least: float
    log_min_p: float
    masses: np.ndarray  # of the tiles
    peak: float
    beta: float


class Watched:
    """Runs calls and records, for each row, what the filters kept and whether they swept it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[int, Kept] = {}
        self.swept: set[int] = set()
        self.keys = torch.empty(0)
        kept, of_row, make = filters.kept, filters.search_row, launch.make_workspace

        def record(mixing, drawing, work, top_k, row, keys, peaks, parts, peak, beta, *rest):
            found = kept(mixing, drawing, work, top_k, row, keys, peaks, parts, peak, beta, *rest)
            draws, well, least, log_min_p, masses, *numbers = (
                x.handle.data for x in (*found, peak, beta)
            )
            assert well.item()
            if draws.item():
                assert int(row) not in self.kept  # one program draws a row
                self.kept[int(row)] = Kept(
                    least.item(), log_min_p.item(), masses.copy(), *(x.item() for x in numbers)
                )
            return found

        def sweep(work, row, *rest):
            self.swept.add(int(row))
            return of_row(work, row, *rest)

        def keep_keys(*args):
            work = make(*args)
            self.keys = work.keys
            return work

        monkeypatch.setattr(filters, "kept", record)
        monkeypatch.setattr(filters, "search_row", sweep)
        monkeypatch.setattr(launch, "make_workspace", keep_keys)

    def check(self, ref: torch.Tensor, policies: list[torch.Tensor], **options: Any) -> None:
        """Sample, and compare each row with the oracle on its keys and with the torch backend."""
        self.kept.clear()
        self.swept.clear()
        options = {"seed": torch.arange(len(ref)) + 3, **options}
        options["return_proposal_logprobs"] = True
        ours, theirs = (
            mod_fused.sample(ref, policies, [0.5], backend=b, **options)
            for b in ("triton", "torch")
        )
        assert torch.equal(ours.valid, theirs.valid)
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(
            ours.proposal_logprobs, theirs.proposal_logprobs, rtol=0, atol=1e-5, equal_nan=True
        )
        for row, keys in enumerate(self.keys.view(ref.shape).numpy().copy()):
            filters = {
                name: x[row].item() if isinstance(x, torch.Tensor) else x
                for name, x in options.items()
                if name in ("temperature", "top_k", "top_p", "min_p")
            }
            if ours.valid[row] and filters.get("temperature") != 0.0:
                self.compare(keys, self.kept[row], **filters)

    def compare(self, keys: np.ndarray, kept: Kept, **filters: Any) -> None:
        expected = reference.filtered_log_probs(keys.astype(np.float64), **filters) > -INF
        scaled = (keys - np.float32(kept.peak)) * np.float32(kept.beta)
        got = (keys >= np.float32(kept.least)) & (keys > -INF) & (scaled >= kept.log_min_p)
        assert (got == expected).all(), f"{filters}: {got.sum()}, not {expected.sum()}"
        masses = np.where(expected, np.exp(scaled.astype(np.float64)), 0.0)
        masses = np.append(masses, np.zeros(-len(keys) % TILE)).reshape(-1, TILE)
        np.testing.assert_allclose(kept.masses[: len(masses)], masses.sum(1), rtol=2e-6, atol=1e-8)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def by_row(*rows: tuple[float, int, float, float]) -> dict[str, torch.Tensor]:
    """Temperature, top-k, top-p and min-p of the rows."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return {
        "temperature": torch.tensor(temperature),
        "top_k": torch.tensor(top_k),
        "top_p": torch.tensor(top_p, dtype=torch.float64),
        "min_p": torch.tensor(min_p),
    }


SETTINGS = by_row(
    (1.0, 50, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 0.3, 0.0),
    (1.0, 0, 1.0, 0.05), (1.0, 50, 0.9, 0.02), (0.7, 300, 1.0, 0.0), (1.5, 0, 0.99, 0.0),
    (0.0, 5, 0.5, 0.1), (1.0, 0, 1.0, 0.0), (1.0, 9000, 0.5, 0.0), (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0 - 1e-7, 0.0), (1.0, 2500, 1.0, 0.0), (1.3, 700, 0.95, 1.0), (0.1, 0, 0.8, 1e-4),
    (1e-30, 40, 0.9, 0.0), (1e30, 2, 0.6, 0.5),
)  # fmt: skip
ROWS = len(SETTINGS["top_k"])
KINDS = {
    "typical": lambda x: 3.0 * x,
    "negative": lambda x: 3.0 * x - 50.0,
    "tied": lambda x: (3.0 * x).round(),
    "two_values": lambda x: (x > 1.0).float(),
    "alike": lambda x: torch.zeros_like(x),
    "flat": lambda x: 0.01 * x,
    "tail": lambda x: 4.0 * x.abs() * x,
    "peaked": lambda x: torch.where(torch.arange(x.shape[1]) == 777, 40.0, x),
    "one_tile": lambda x: x + 12.0 * (torch.arange(x.shape[1]) < 900),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_the_oracle_s_whatever_the_row_and_its_parameters(kind, watched):
    ref = KINDS[kind](normal(301, ROWS, 5000))
    watched.check(ref, [ref], **SETTINGS)
    # Some rows have few cells that reach the bound, and some too many.
    assert kind == "peaked" or 0 < len(watched.swept) < ROWS


@pytest.mark.parametrize("kind", ["typical", "flat", "peaked"])
def test_rows_of_any_kind_are_drawn_by_one_of_their_programs(kind, watched, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 3 * ROWS)
    ref = KINDS[kind](normal(311, ROWS, 5000))
    ref[3, 17] = math.nan
    watched.check(ref, [ref], **SETTINGS)
    assert len(watched.kept) == ROWS


def test_slices_cover_a_row_and_are_no_more_programs_than_run_at_once():
    configured = configurations.Configuration()
    for vocab in (1, 1025, 9300, 32000, 128256, 262144):
        tiles = -(-vocab // TILE)
        for rows in (1, 3, 8, 131, 132, 500):
            slices = launch.row_slices(vocab, rows, configured, 132)
            each = -(-tiles // slices)
            assert (slices - 1) * each < tiles <= slices * each
            assert slices <= workspace.SLICES.value and rows * slices <= max(132, rows)
    assert launch.row_slices(128256, 1, configured, 132) == 32
    few = configurations.Configuration(filter_slices=4)
    assert launch.row_slices(128256, 1, few, 132) == 4


@pytest.mark.parametrize("vocab", [1, 7, 1023, 1025, 4099])
def test_short_vocabularies_fit_registers(vocab, watched):
    ref = normal(302, ROWS, vocab) * 3.0
    watched.check(ref, [ref], **SETTINGS)
    assert not watched.swept or vocab == 4099


@pytest.mark.parametrize("cell", [8, 16, 64])
def test_the_size_of_a_cell_changes_no_bit(cell, watched, monkeypatch):
    monkeypatch.setattr(launch, "cell_size", lambda vocab: cell)
    ref, policies = logits(303, ROWS, 5000, 1, kind="typical", excluded=0.1)
    watched.check(ref, policies, divergence="jsd", **SETTINGS)


def test_a_long_vocabulary_has_larger_cells(watched):
    assert [workspace.cell_size(v) for v in (5, 131072, 131073, 600000)] == [8, 8, 16, 64]
    ref = 3.0 * normal(304, 2, 131080)
    watched.check(ref, [ref], top_k=50, top_p=torch.tensor([1.0, 0.9]))
    assert not watched.swept


@pytest.mark.parametrize(
    "setting",
    [{"top_k": 3000}, {"top_p": 0.9}, {"top_k": 6000, "top_p": 0.5}, {"min_p": 0.5}]
    + [{"top_p": 1.0 - 1e-7}, {"top_k": 3000, "temperature": 0.01}]
    + [{"top_p": 0.999, "min_p": 0.1, "temperature": 3.0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("slices", [1, 4, 10])
def test_flat_rows_are_swept(setting, slices, watched, monkeypatch):
    found = []
    gathered = flat_rows.least_gathered

    def count(*args):
        found.append(gathered(*args))
        return found[-1]

    monkeypatch.setattr(flat_rows, "least_gathered", count)
    monkeypatch.setattr(launch, "processors", lambda device: 2 * slices)
    ref = torch.cat([0.1 * normal(305, 1, 9300), (20.0 * normal(306, 1, 9300)).round() / 100.0])
    watched.check(ref, [ref], **setting)
    assert watched.swept == {0, 1}
    assert len(found) >= ("min_p" not in setting or "top_p" in setting)  # the rest in registers


def test_a_mask_that_leaves_few_tokens_and_one_that_leaves_fewer_than_k(watched):
    ref = torch.cat([3.0 * normal(307, 2, 9300), 0.1 * normal(308, 2, 9300)])
    left = torch.zeros(4, 9300, dtype=torch.bool)
    left[0, 4000], left[1, 5:300:7], left[2, ::2], left[3, 20:] = True, True, True, True
    watched.check(ref, [ref], mask=left, top_k=6000)
    assert watched.swept == {2, 3}
    watched.check(ref, [ref], mask=left, top_k=6000, top_p=0.9, temperature=0.5)
    watched.check(ref, [ref], mask=left, top_p=0.5, min_p=0.9)


def test_rows_that_are_broken_or_excluded_disturb_no_other(watched):
    ref, policies = logits(309, ROWS, 5000, 1, kind="typical", excluded=0.3)
    ref[2, 4999], policies[0][5] = math.nan, -INF
    ref[7], policies[0][7] = -INF, -INF
    ref[7, 4321], policies[0][7, 4321] = 2.0, 2.0
    ref[11, ::2] = -1e38  # finite, and far below
    policies[0][11, ::2] = -1e38
    watched.check(ref, policies, **SETTINGS)


@pytest.mark.parametrize("factor", [1.0 - 1e-5, 1.0, 1.0 + 1e-5])
def test_the_rounding_of_a_row_s_mass_in_float32_decides_nothing(factor, watched, monkeypatch):
    # As if it were 5% off, which only makes more rows be summed in fixed point.
    summed, weights_from = [], filters.weights_from

    def count(*args):
        summed.append(args)
        return weights_from(*args)

    kept = filters.kept

    def other_masses(*args):
        return kept(*args[:7], args[7] * factor, *args[8:])

    ref = torch.cat([3.0 * normal(310, 20, 5000), normal(310, 20, 5000).round() * 3.0])
    monkeypatch.setattr(filters, "weights_from", count)
    monkeypatch.setattr(filters, "kept", other_masses)
    p = torch.linspace(0.05, 0.9, 20).double().repeat(2)
    watched.check(ref, [ref], top_p=p)
    few = len(summed)
    monkeypatch.setattr(filters, "ROUNDING", tl.constexpr(0.05))
    watched.check(ref, [ref], top_p=p)
    assert few + 10 < len(summed)


@triton.jit
def order_kernel(x, order, back, N: tl.constexpr):
    i = tl.arange(0, N)
    own = thresholds.ordered(tl.load(x + i))
    tl.store(order + i, own)
    tl.store(back + i, thresholds.unordered(own))


def test_an_order_is_that_of_the_floats_and_goes_back():
    x = torch.tensor([-INF, -3.4028235e38, -1.5, -0.0, 0.0, 1e-38, 3.4028235e38, INF])
    order, back = torch.empty(8, dtype=torch.int32), torch.empty(8)
    order_kernel[(1,)](x, order, back, N=8)
    assert order[3] == order[4] and (order[[0, 1, 2, 3, 5, 6, 7]].diff() > 0).all()
    assert order[1] == thresholds.LEAST_ORDER.value
    assert torch.equal(back, x)


@triton.jit
def pivots_kernel(ends, out):
    low, high = tl.load(ends), tl.load(ends + 1)
    tl.store(out + tl.arange(0, thresholds.PIVOTS), thresholds.pivots_of(low, high))


def pivots_between(low: int, high: int) -> np.ndarray:
    pivots = torch.empty(thresholds.PIVOTS.value, dtype=torch.int32)
    pivots_kernel[(1,)](torch.tensor([low, high], dtype=torch.int32), pivots)
    return pivots.numpy().astype(np.int64)


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 7, 1000, 2**32 - 2**24])
@pytest.mark.parametrize("low", [thresholds.LEAST_ORDER.value, -1, 0x41200000])
def test_pivots_lie_between_their_ends_and_leave_shorter_parts(width, low):
    width = min(width, 0x7F800000 - low)
    pivots = pivots_between(low, low + width)
    assert (low < pivots).all() and (pivots < low + width).all() and (np.diff(pivots) >= 0).all()
    parts = np.diff([low, *pivots, low + width])
    assert parts.max() <= 2 + width // 5


def test_pivots_are_even_among_keys_around_0():
    ends = np.array([-3.0, 5.0], np.float32).view(np.int32).astype(np.int64)
    ends[0] ^= 0x7FFFFFFF
    keys = pivots_between(*ends.tolist()).astype(np.int32)
    keys = np.where(keys < 0, keys ^ 0x7FFFFFFF, keys).astype(np.int32).view(np.float32)
    np.testing.assert_allclose(keys, [-1.4, 0.2, 1.8, 3.4], rtol=1e-5)
