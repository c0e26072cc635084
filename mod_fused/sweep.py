"""Mean rewards and divergence from the reference of decodes at given weights, and their trade-off.

`evaluate` measures a grid of weights; `lead_over_line` says whether mixing two policies in the
decoder beats choosing one of them at random for each response; `write_csv` and `draw` keep the
result. The demo uses the same functions.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .decoder import generate
from .ensemble import Ensemble
from .philox import split_mix
from .terminal import track

Reward = Callable[[str, str], float]
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
    prompts: Sequence[str],
    grid: Sequence[Sequence[float]],
    rewards: Sequence[Reward] | None,
    *,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    **options: Any,
) -> list[Point]:
    """Draw `samples` responses to each prompt from pi* at each weight vector, and score them.

    Shows a progress bar. Rows of different weights are decoded in one batch.

    Args:
        ensemble: the reference and M policies, with a tokenizer.
        prompts: N prompts.
        grid: weight vectors [M].
        rewards: functions of (prompt, response), reward i being what policy i is meant to raise
            where there are policies; None for no rewards.
        samples: responses per prompt.
        seed: response r of a weight vector (sample by sample, prompts in order) is drawn with row
            seed SplitMix64(seed + r): the same noise at every weight, however rows are batched.
        batch_size: responses decoded at the same time.
        **options: for `mod_fused.generate`; temperature and filters would make `kl` meaningless.

    Raises:
        ValueError: if a decode has an invalid step.
    """
    noise = split_mix(seed, len(prompts) * samples, torch.device("cpu")).tolist()
    responses = list(zip(list(prompts) * samples, noise, strict=True))
    rows = [(prompt, list(w), row_seed) for w in grid for prompt, row_seed in responses]
    scores = np.empty((len(rows), len(rewards or ())))
    log_ratios = np.empty((len(rows), ensemble.num_policies))
    kl = np.empty(len(rows))
    starts = range(0, len(rows), batch_size)
    for start in track(starts, "decoding", len(starts)):
        part = slice(start, min(start + batch_size, len(rows)))
        batch, weights, seeds = (list(column) for column in zip(*rows[part], strict=True))
        out = generate(
            ensemble, batch, weights=weights, seed=seeds, return_model_logprobs=True, **options
        )
        if not out.valid.all():
            raise ValueError(
                f"no valid distribution at weights {weights[int((~out.valid).nonzero()[0])]}: "
                "a model's logits hold NaN, or normalizer='zero' has no solution there"
            )
        assert out.model_logprobs is not None  # asked for above
        totals = out.model_logprobs.double().sum(1).cpu().numpy()  # [B, M+1], whole responses
        log_ratios[part] = totals[:, 1:] - totals[:, :1]
        kl[part] = out.logprobs.double().sum(1).cpu().numpy() - totals[:, 0]
        if rewards is not None:
            texts = zip(batch, out.texts or (), strict=True)
            scores[part] = [[reward(p, t) for reward in rewards] for p, t in texts]

    def per_prompt(values: Array) -> Array:
        """[G * S * N, ...] to [G, ..., N], averaged over the samples S."""
        shape = len(grid), samples, len(prompts), *values.shape[1:]
        return np.moveaxis(values.reshape(shape).mean(1), 1, -1)

    columns = per_prompt(scores), per_prompt(log_ratios), per_prompt(kl)
    return [
        Point(tuple(map(float, weights)), r if rewards else None, ratios, k, samples)
        for weights, r, ratios, k in zip(grid, *columns, strict=True)
    ]


def simplex_grid(policies: int, points: int) -> list[tuple[float, ...]]:
    """All weight vectors [policies] on the simplex with `points` equally spaced values per edge.

    Raises:
        ValueError: if `points` < 2 or `policies` < 1.
    """
    if points < 2 or policies < 1:
        raise ValueError(f"a grid needs 2 points per edge and 1 policy, got {points}, {policies}")
    steps = points - 1

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

    Scale both rewards so that policy i alone is (1, 0) and policy j alone is (0, 1). Tossing a coin
    between the two for each response gives x + y = 1; the lead is x + y - 1, averaged over the
    interior points of the edge. The standard error is that of 500 bootstrap samples of the prompts.
    NaN where there is no interior point, or an end does not beat the other on its own reward.
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


def write_csv(path: str | Path, points: Sequence[Point], names: Sequence[str]) -> None:
    """One line per weight vector: weights, rewards if measured, log-ratios, KL, their errors."""

    def record(point: Point) -> dict[str, float]:
        columns: dict[str, Array] = {}
        if point.rewards is not None:
            columns |= {f"reward_{n}": v for n, v in zip(names, point.rewards, strict=True)}
        columns |= {f"log_ratio_{n}": v for n, v in zip(names, point.log_ratios, strict=True)}
        columns["kl"] = point.kl
        line = {f"weight_{n}": w for n, w in zip(names, point.weights, strict=True)}
        for name, values in columns.items():
            line[name], line[f"{name}_se"] = mean_and_error(values)
        line |= {"prompts": len(point.kl), "samples": point.samples}
        return line

    records = [record(p) for p in points]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def picture_endings() -> list[str]:
    """The file endings that `draw` can write, without their dot; empty without matplotlib."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        return []
    return sorted(FigureCanvasBase.get_supported_filetypes())


def draw(path: str | Path, points: Sequence[Point], names: Sequence[str], title: str) -> None:
    """A picture with one panel per pair of policies: the curve between them, and the straight line.

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
    what = "log pi_i/pi_ref" if points[0].rewards is None else "mean reward"
    figure = Figure(figsize=(4.6 * len(drawn), 4.4), layout="constrained")
    for axes, (i, j) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        line = edge(points, i, j)
        for p in (p for p in points if p not in line):
            axes.plot(*measures(p)[[i, j]].mean(1), "o", color="0.75", markersize=4)
        if line:
            stats = [[mean_and_error(measures(p)[k]) for k in (i, j)] for p in line]
            (x, dx), (y, dy) = (np.array([s[k] for s in stats]).T for k in (0, 1))
            axes.plot(x[[0, -1]], y[[0, -1]], "--", color="0.5", label="choosing one at random")
            axes.errorbar(x, y, dy, dx, fmt="o-", capsize=2, label="mixed by mod_fused (±1 SE)")
            for p, px, py in zip(line, x, y, strict=True):
                note = f"{p.weights[i]:.2g} / {p.weights[j]:.2g}"
                axes.annotate(note, (px, py), (4, 4), textcoords="offset points", fontsize=7)
            axes.legend(fontsize=8)
        axes.set_xlabel(f"{names[i]} ({what})")
        axes.set_ylabel(f"{names[j]} ({what})")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
