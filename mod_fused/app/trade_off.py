"""Mean rewards and divergence from the reference of decodes at given weights, and their trade-off.

`evaluate` measures a grid of weights. `lead_over_line` says whether mixing two policies in the
decoder beats choosing one of them at random for each response. `draw` plots the result. `demo` and
`sweep` use these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..decoding.ensemble import Ensemble
from ..decoding.generate import generate
from ..decoding.memory import check_memory
from ..torch_kernels.philox import split_mix
from .terminal import track

Reward = Callable[[Any, str], float]
Array = np.ndarray


@dataclass(frozen=True)
class Point:
    """Responses to N prompts at one weight vector. Every array is averaged over a prompt's samples.

    Attributes:
        weights: [M], the weight of each policy.
        rewards: [R, N], reward i of the responses to each prompt; None without reward functions.
        log_ratios: [M, N], log pi_i - log pi_ref of the whole response, in nats: the reward that
            policy i was implicitly trained on, divided by its beta.
        kl: [N], log pi* - log pi_ref of the whole response, in nats. Responses are drawn from pi*,
            so its mean estimates KL(pi* || pi_ref) of whole responses.
        samples: responses per prompt.
    """

    weights: tuple[float, ...]
    rewards: Array | None
    log_ratios: Array
    kl: Array
    samples: int


def mean_and_error(values: Array) -> tuple[float, float]:
    """Mean over prompts and its standard error (NaN for fewer than two prompts)."""
    n = values.shape[-1]
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), error


def evaluate(
    ensemble: Ensemble,
    prompts: Sequence[Any],
    grid: Sequence[Sequence[float]],
    rewards: Sequence[Reward] | None,
    **options: Any,
) -> list[Point]:
    """All points of `evaluating`, with the same arguments."""
    batches = evaluating(ensemble, prompts, grid, rewards, **options)
    return [point for finished in batches for point in finished]


def evaluating(
    ensemble: Ensemble,
    prompts: Sequence[Any],
    grid: Sequence[Sequence[float]],
    rewards: Sequence[Reward] | None,
    *,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    done: int = 0,
    **options: Any,
) -> Iterator[list[Point]]:
    """Draw `samples` responses to each prompt from pi* at each weight vector, and score them.

    Shows a progress bar. A batch may hold rows of different weights. After each batch it yields the
    points whose last response was in that batch, in the order of the grid.

    Args:
        ensemble: the reference and M policies, with a tokenizer.
        prompts: N prompts, texts or conversations.
        grid: weight vectors [M].
        rewards: functions of (prompt, response); policy i is meant to raise reward i. None for no
            rewards.
        samples: responses per prompt.
        seed: response r of a weight vector (sample by sample, prompts in order) has the row seed
            SplitMix64(seed + r). The noise is the same at every weight, whatever batch_size is.
        batch_size: responses decoded at the same time.
        done: how many points to leave out at the beginning of the grid. The batches are those of
            the whole grid, so that the other points keep every bit.
        **options: for `mod_fused.generate`; temperature and filters would make `kl` meaningless.

    Raises:
        ValueError: if the results would not fit into memory, or a decode has an invalid step.
    """
    columns = len(rewards or ()) + ensemble.num_policies + 1
    check_size(len(prompts), samples, len(grid), columns)
    each = len(prompts) * samples  # rows of a point
    noise = split_mix(seed, each, torch.device("cpu")).tolist()
    first = done * each // batch_size * batch_size  # the first row to decode, which begins a batch
    found = np.empty((0, columns))  # of the rows from `first` on
    starts = range(first, len(grid) * each if done < len(grid) else first, batch_size)
    for start in track(starts, "decoding", len(starts)):
        rows = range(start, min(start + batch_size, len(grid) * each))
        batch = [prompts[row % each % len(prompts)] for row in rows]
        weights = [list(grid[row // each]) for row in rows]
        seeds = [noise[row % each] for row in rows]
        scores = _scores(ensemble, batch, weights, rewards, seed=seeds, **options)
        found = np.concatenate([found, scores])
        finished = []
        while first + len(found) >= (done + 1) * each and done < len(grid):
            begin = done * each - first
            finished.append(_point(grid[done], found[begin : begin + each], rewards, samples))
            done += 1
        yield finished
        kept = max(0, min(done * each - first, len(found)))
        found, first = found[kept:], first + kept


def check_valid(valid: Tensor, weights: Sequence[Sequence[float]]) -> None:
    """Refuse answers of which one, `valid` [B] says which, has a step without a distribution.

    Raises:
        ValueError: with its `weights`, which are given by row.
    """
    if not valid.all():
        raise ValueError(
            f"no valid distribution at weights {list(weights[int((~valid).nonzero()[0])])}: "
            "a model's logits hold NaN, or normalizer='zero' has no solution there"
        )


def _scores(
    ensemble: Ensemble,
    prompts: list[Any],
    weights: list[list[float]],
    rewards: Sequence[Reward] | None,
    **options: Any,
) -> Array:
    """Rewards, log-ratios and KL of one response to each prompt, [B, R + M + 1]."""
    out = generate(ensemble, prompts, weights=weights, return_model_logprobs=True, **options)
    check_valid(out.valid, weights)
    assert out.model_logprobs is not None  # asked for above
    totals = out.model_logprobs.double().sum(1).cpu().numpy()  # [B, M+1], whole responses
    kl = out.logprobs.double().sum(1).cpu().numpy() - totals[:, 0]
    texts = zip(prompts, out.texts or (), strict=True) if rewards else ()
    scores = np.array([[reward(p, t) for reward in rewards or ()] for p, t in texts], dtype=float)
    scores = scores.reshape(len(prompts), -1) if rewards else np.empty((len(prompts), 0))
    return np.concatenate([scores, totals[:, 1:] - totals[:, :1], kl[:, None]], axis=1)


def _point(
    weights: Sequence[float], found: Array, rewards: Sequence[Reward] | None, samples: int
) -> Point:
    """The point with the scores `found` of its rows, [S N, R + M + 1]."""
    means = found.reshape(samples, -1, found.shape[1]).mean(0).T  # [R + M + 1, N]
    count = len(rewards or ())
    scores = means[:count] if rewards else None
    return Point(tuple(map(float, weights)), scores, means[count:-1], means[-1], samples)


def check_size(prompts: int, samples: int, weights: int, columns: int) -> None:
    """Refuse a sweep whose results cannot fit: prompts x (weights + 2 x samples) x columns numbers
    of 8 bytes, 40 bytes for the seed of each row of a point, 150 for each weight vector.

    Raises:
        ValueError: says how much memory they would take.
    """
    needed = 8 * prompts * (weights + 2 * samples) * columns + 40 * prompts * samples
    what = f"a sweep of {weights} weights with {prompts} prompts and {samples} samples of each"
    check_memory(needed + 150 * weights, what)


def grid_size(policies: int, points: int) -> int:
    """How many weight vectors `simplex_grid` gives."""
    return math.comb(points - 1 + policies - 1, policies - 1)


def simplex_grid(policies: int, points: int) -> list[tuple[float, ...]]:
    """All weight vectors [policies] on the simplex with `points` equally spaced values per edge.

    Raises:
        ValueError: if `points` < 2 or `policies` < 1, or they do not fit into memory.
    """
    if points < 2 or policies < 1:
        raise ValueError(f"a grid needs 2 points per edge and 1 policy, got {points}, {policies}")
    steps = points - 1
    count = grid_size(policies, points)
    check_memory(count * (50 + 32 * policies), f"a grid of {count} weight vectors")

    def split(total: int, parts: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(total,)]
        return [(k, *rest) for k in range(total, -1, -1) for rest in split(total - k, parts - 1)]

    return [tuple(k / steps for k in parts) for parts in split(steps, policies)]


def edge(points: Sequence[Point], i: int, j: int) -> list[Point]:
    """The points with weight on policies i and j only, from w_i = 1 to w_j = 1; [] without both."""
    on_edge = [
        p
        for p in points
        if math.isclose(p.weights[i] + p.weights[j], 1.0)
        and all(w == 0.0 for k, w in enumerate(p.weights) if k not in (i, j))
    ]
    on_edge.sort(key=lambda p: p.weights[j])
    complete = len(on_edge) > 1 and on_edge[0].weights[j] == 0.0 and on_edge[-1].weights[i] == 0.0
    return on_edge if complete else []


def measures(point: Point) -> Array:
    """[M, N]: the rewards, or the log-ratios where there are no reward functions."""
    return point.log_ratios if point.rewards is None else point.rewards


def lead_over_line(points: Sequence[Point], i: int, j: int) -> tuple[float, float]:
    """How far the curve from policy i to policy j lies beyond the straight line, and its error.

    Scale both rewards so that policy i alone is (1, 0) and policy j alone is (0, 1). Choosing one
    of them at random for each response gives x + y = 1. The lead is x + y - 1, averaged over the
    interior points of the edge. The standard error is that of 500 bootstrap samples of the prompts.
    Both are NaN where there is no interior point, or where a policy does not beat the other on its
    own reward.
    """
    line = edge(points, i, j)
    if len(line) < 3:
        return math.nan, math.nan
    values = np.stack([measures(p)[[i, j]] for p in line])  # [points, 2, N]

    def lead(means: Array) -> float:
        first, last = means[0], means[-1]
        spans = first[0] - last[0], last[1] - first[1]
        if min(spans) <= 0:
            return math.nan
        x, y = (means[:, 0] - last[0]) / spans[0], (means[:, 1] - first[1]) / spans[1]
        return float(np.mean((x + y - 1.0)[1:-1]))

    random = np.random.default_rng(0)
    n = values.shape[-1]
    resampled = [lead(values[..., random.integers(n, size=n)].mean(-1)) for _ in range(500)]
    return lead(values.mean(-1)), float(np.std(resampled, ddof=1))


def leads(points: Sequence[Point], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """`lead_over_line` for each pair of policies whose edge was measured."""
    return {
        f"{names[i]} - {names[j]}": lead_over_line(points, i, j)
        for i, j in combinations(range(len(names)), 2)
        if len(edge(points, i, j)) > 2
    }


def signed(lead: float, error: float) -> str:
    """A lead and its error in words."""
    if math.isnan(lead):
        return "not defined, a policy does not beat the other on its own reward"
    if math.isnan(error):
        return f"{lead:+.3f}, too few prompts for its error"
    return f"{lead:+.3f} ±{error:.3f}"


def table_rows(points: Sequence[Point], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the summary: weights, each reward with its standard error, KL."""

    def cell(values: Array) -> str:
        mean, error = mean_and_error(values)
        return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ±{error:.3f}"

    headers = ["weights " + ", ".join(names), *names, "KL(pi*||ref)"]
    rows = [
        [", ".join(f"{w:g}" for w in np.round(p.weights, 3)), *map(cell, measures(p)), cell(p.kl)]
        for p in points
    ]
    return headers, rows


def line(point: Point, names: Sequence[str]) -> dict[str, float]:
    """One line of the CSV: weights, rewards if measured, log-ratios, KL, their errors."""
    columns: dict[str, Array] = {}
    if point.rewards is not None:
        columns |= {f"reward_{n}": v for n, v in zip(names, point.rewards, strict=True)}
    columns |= {f"log_ratio_{n}": v for n, v in zip(names, point.log_ratios, strict=True)}
    columns["kl"] = point.kl
    values = {f"weight_{n}": w for n, w in zip(names, point.weights, strict=True)}
    for name, column in columns.items():
        values[name], values[f"{name}_se"] = mean_and_error(column)
    return values | {"prompts": len(point.kl), "samples": point.samples}


def picture_endings() -> list[str]:
    """The file endings that `draw` can write, without their dot; empty without matplotlib."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        return []
    return sorted(FigureCanvasBase.get_supported_filetypes())


#: Colours that the colour-blind tell apart (Okabe and Ito's), with marker and line.
_MIXED, _RANDOM, _REFERENCE, _ELSEWHERE = "#0072B2", "0.4", "black", "0.7"
_OTHERS = (("#D55E00", "s:"), ("#009E73", "^-."), ("#CC79A7", "D:"), ("#E69F00", "v-."))


def draw(
    path: str | Path,
    points: Sequence[Point],
    names: Sequence[str],
    title: str,
    others: Mapping[str, Sequence[Point]] | None = None,
) -> None:
    """Plot one panel per pair of policies: the curve between them, the straight line, the reference
    (the point without weight) and the curves of `others`, at most four, by their label.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: with fewer than two policies, or an ending that matplotlib does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'mod-fused[demo]'") from error
    pairs = list(combinations(range(len(names)), 2))
    drawn = [pair for pair in pairs if edge(points, *pair)] or pairs
    if not drawn:
        raise ValueError("a trade-off picture needs at least two policies, got one")
    figure = Figure(figsize=(4.6 * len(drawn), 4.9), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, pair in zip(panels, drawn, strict=True):
        _panel(axes, points, names, pair, others or {})
    handles = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    # Below the panels it covers no point.
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": max(1, 2 * len(drawn) - 1)}
    figure.legend(list(handles.values()), list(handles), fontsize=9, **where)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _panel(
    axes: Any,
    points: Sequence[Point],
    names: Sequence[str],
    pair: tuple[int, int],
    others: Mapping[str, Sequence[Point]],
) -> None:
    """Plot the points of one pair of policies."""
    i, j = pair

    def means(point: Point) -> Array:
        return measures(point)[[i, j]].mean(1)

    def note(text: str, at: Array, offset: tuple[int, int], **form: Any) -> None:
        axes.annotate(text, at, offset, textcoords="offset points", fontsize=8, **form)

    line = edge(points, i, j)
    if line:
        stats = [[mean_and_error(measures(p)[k]) for k in (i, j)] for p in line]
        (x, dx), (y, dy) = (np.array([s[k] for s in stats]).T for k in (0, 1))
        form = {"color": _MIXED, "zorder": 3, "label": "mixed by mod_fused (±1 standard error)"}
        axes.errorbar(x, y, dy, dx, fmt="o-", capsize=2, **form)
        form = {"color": _RANDOM, "linewidth": 1.2, "label": "one policy at random"}
        axes.plot(x[[0, -1]], y[[0, -1]], "--", **form)
        note(f"only {names[i]}", means(line[0]), (-6, -12), color=_MIXED, ha="right")
        note(f"only {names[j]}", means(line[-1]), (6, 5), color=_MIXED)
        for p in line[1:-1]:
            note(f"{p.weights[i]:.2g} / {p.weights[j]:.2g}", means(p), (6, 5), color=_MIXED)
    for label, (colour, style) in zip(others, _OTHERS, strict=False):
        if curve := edge(others[label], i, j):
            x, y = np.array([means(p) for p in curve]).T
            axes.plot(x, y, style, color=colour, markersize=4, linewidth=1.2, label=label)
    unmixed = [p for p in points if not any(p.weights)]
    for p in unmixed:
        axes.plot(*means(p), "X", color=_REFERENCE, markersize=8, linewidth=0, label="reference")
        note("reference", means(p), (0, -13), ha="center")
    elsewhere = [p for p in points if p not in (*line, *unmixed) and (not line or all(p.weights))]
    if elsewhere:
        x, y = np.array([means(p) for p in elsewhere]).T
        label = "mixed at other weights" if line else "mixed by mod_fused"
        axes.plot(x, y, "o", color=_ELSEWHERE, markersize=4, label=label)
    what = "log pi_i/pi_ref" if points[0].rewards is None else "mean reward"
    axes.set(xlabel=f"{names[i]} ({what})", ylabel=f"{names[j]} ({what})")
    axes.margins(0.18, 0.12)  # room for the text beside the points
    axes.grid(color="0.9")
