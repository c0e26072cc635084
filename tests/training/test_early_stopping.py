"""Early stopping: the correlations it watches, the parameters it keeps, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mod_fused.training.early_stopping import EarlyStopping, quarter_correlations


def test_correlations_are_those_of_the_prefixes_in_each_quarter() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(6, 11, generator=generator)
    targets = 0.5 * predictions + torch.randn(6, 11, generator=generator)
    begins, lengths = [3, 0, 2, 1, 0, 5], [8, 11, 4, 5, 1, 6]
    mask = torch.zeros(6, 11)
    pairs: list[list[tuple[float, float]]] = [[], [], [], []]
    for row, (begin, n) in enumerate(zip(begins, lengths, strict=True)):
        mask[row, begin : begin + n] = 1
        for t in range(1, n + 1):
            quarter = next(q for q in range(4) if t / n <= (q + 1) / 4)
            at = row, begin + t - 1
            pairs[quarter].append((float(predictions[at]), float(targets[at])))
    assert min(map(len, pairs)) > 4
    got = quarter_correlations(predictions, targets, mask)
    assert got == pytest.approx([np.corrcoef(np.array(x).T)[0, 1] for x in pairs], abs=1e-6)


def test_what_cannot_correlate_is_zero_or_unknown() -> None:
    mask, targets = torch.ones(3, 1), torch.tensor([[0.0], [0.5], [1.0]])
    # Responses of one token lie in the last quarter.
    unknown = [math.nan] * 3
    assert quarter_correlations(targets, targets, mask) == pytest.approx(
        [*unknown, 1.0], nan_ok=True
    )
    flat = torch.full((3, 1), 0.25)
    assert quarter_correlations(flat, targets, mask) == pytest.approx([*unknown, 0.0], nan_ok=True)
    assert quarter_correlations(targets, flat, mask) == pytest.approx([math.nan] * 4, nan_ok=True)


def watched(means: list[float], count: int = 100, steps: int = 100) -> tuple[EarlyStopping, int]:
    """A training whose checks find these means: its watcher, and when it ended. The parameter is
    the number of steps."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    found = iter(means)

    def correlations() -> list[float]:
        assert not model.training
        mean = next(found)
        return [mean - 0.1, mean + 0.1, math.nan, mean]

    stopping = EarlyStopping(model, correlations, count, every=10, steps=steps, patience=2)
    model.train()
    for step in range(1, steps + 1):
        torch.nn.init.constant_(model.weight, float(step))
        ends = stopping.stop_after(step)
        assert model.training
        if ends:
            return stopping, step
    return stopping, steps


@pytest.mark.parametrize(
    ("means", "best", "ended", "checks"),
    [
        ([0.3, 0.5, 0.4, 0.5, 0.9], 20, 40, 4),  # no rise in two checks; equal is no rise
        ([0.3, 0.2, 0.4, 0.3, 0.5, 0.4, 0.4], 50, 70, 7),  # a fall between is forgiven
        ([0.3] * 2 + [-1.0], 10, 25, 3),  # the last step is checked, too
    ],
)
def test_the_best_parameters_are_kept(
    means: list[float], best: int, ended: int, checks: int
) -> None:
    stopping, end = watched(means, steps=25 if ended == 25 else 100)
    assert (stopping.best, end, len(stopping.history)) == (best, ended, checks)
    assert [x[-1] for _, x in stopping.history] == means[:checks]
    stopping.finish()
    assert stopping.model.weight.item() == best


@pytest.mark.parametrize(("mean", "learned"), [(0.19, False), (0.21, True), (-0.5, False)])
def test_a_scorer_no_better_than_chance_is_refused_and_unchanged(
    mean: float, learned: bool
) -> None:
    """Two standard errors of 100 responses are 0.2."""
    stopping, _ = watched([mean] * 3)
    if learned:
        stopping.finish()
    else:
        with pytest.raises(ValueError, match="has not learned: over 3 checks .* by chance"):
            stopping.finish()
    assert stopping.model.weight.item() == (10 if learned else 0)
