"""The filters and the race of one row by name, for `explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import reference
from .call.arguments import DrawArguments
from .torch_kernels import philox
from .torch_kernels.filters import biased, kept, scaled_key
from .torch_kernels.parameters import row_scalar

Array = np.ndarray
Kept = Callable[[Tensor, dict[str, Any]], Array]
Arrivals = Callable[[int, int, Array, int], Array]


class Contest(NamedTuple):
    """One race, among tiles or among the tokens of the winner tile: the smallest E / mass wins."""

    winner: int
    mass: float
    arrival: float  # E
    quotient: float  # E / mass
    runner_up: int | None  # None: nobody else has a mass
    runner_up_quotient: float | None


class Filter(NamedTuple):
    """One filter: the least log pi* that it keeps, and how many tokens are left after it."""

    threshold: float
    left: int
    mass: float  # kept of what the filters before it left, at the temperature


def drawn(drawing: DrawArguments, log_pi: Tensor, log_kept: Kept, arrivals: Arrivals) -> Any:
    """Filters and races of one row from its log pi* [V]; empty where no token is left.

    `log_kept` gives the log of what the named filters leave, on any scale common to the row.
    """
    settings = {
        name: float(getattr(drawing, name)) if name != "top_k" else int(drawing.top_k)
        for name in ("temperature", "top_k", "top_p", "min_p")
    }
    off = {"mask": None, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    wanted = {"mask": drawing.mask, **settings}
    so_far: dict[str, Any] = {"temperature": settings["temperature"], "bias": drawing.bias}
    scores, filters = log_kept(log_pi, so_far), {}
    for name, value in off.items():
        if wanted[name] is value or (name != "mask" and wanted[name] == value):
            continue
        if name != "mask" and settings["temperature"] == 0:
            continue  # argmax, whatever they keep
        so_far[name] = wanted[name]
        before, scores = np.exp(scores), log_kept(log_pi, so_far)
        left = scores > -np.inf
        if np.isnan(scores).any() or not left.any():
            return {}
        mass = float(before[left].sum() / before.sum())
        filters[name] = Filter(float(log_pi[torch.from_numpy(left)].min()), int(left.sum()), mass)
    if np.isnan(scores).any():
        return {}
    if settings["temperature"] == 0:
        token = int(np.argmax(scores))
        found = {"filters": filters, "winner": token, "proposal_logprob": 0.0}
        return found | _bias(drawing, token)
    p = np.exp(scores)
    tiles = np.add.reduceat(p, np.arange(0, len(p), philox.TILE))
    seed, position = int(drawing.seed), int(drawing.position)
    tile = _contest(arrivals(seed, position, np.arange(len(tiles)), 0), tiles, 0)
    first = tile.winner * philox.TILE
    inside = p[first : first + philox.TILE]
    ids = first + np.arange(len(inside))
    race = _contest(arrivals(seed, position, ids, 1), inside, first)
    found = {"filters": filters, "tile": tile, "race": race, "winner": race.winner}
    found |= _bias(drawing, race.winner)
    return found | {"proposal_logprob": float(scores[race.winner])}


def _bias(drawing: DrawArguments, token: int) -> dict[str, float]:
    return {} if drawing.bias is None else {"bias": float(drawing.bias[0, token])}


def _contest(arrival: Array, mass: Array, first: int) -> Contest:
    with np.errstate(divide="ignore"):
        quotient = np.where(mass > 0, arrival / mass, np.inf)
    order = np.argsort(quotient, kind="stable")[:2]
    best = int(order[0])
    found = (first + best, float(mass[best]), float(arrival[best]), float(quotient[best]))
    if len(order) < 2 or not np.isfinite(quotient[order[1]]):
        return Contest(*found, None, None)
    return Contest(*found, first + int(order[1]), float(quotient[order[1]]))


def oracle_kept(drawing: DrawArguments) -> Kept:
    def log_kept(log_pi: Tensor, settings: dict[str, Any]) -> Array:
        of_row: dict[str, Any] = {
            name: x[0] if isinstance(x, Tensor) else x for name, x in settings.items()
        }
        return reference.filtered_log_probs(log_pi, **of_row)

    return log_kept


def oracle_arrivals(seed: int, position: int, index: Array, stream: int) -> Array:
    return reference.exponentials(seed, position, index, stream)


def torch_kept(drawing: DrawArguments) -> Kept:
    """The filters of the torch backend, for every backend's log pi*."""

    def log_kept(log_pi: Tensor, settings: dict[str, Any]) -> Array:
        key = log_pi[None].clone()
        level = key.max(1).values
        if settings.get("mask") is not None:
            key[
                0, ~torch.from_numpy(reference.unpack_mask(settings["mask"][0], len(log_pi)))
            ] = -torch.inf
        if settings["bias"] is not None:
            key, _ = biased(key, settings["bias"], level)
        cpu, one = torch.device("cpu"), slice(0, 1)
        t = row_scalar(settings["temperature"], one, cpu, torch.float32)
        k = row_scalar(settings.get("top_k", 0), one, cpu, torch.int64)
        p = row_scalar(settings.get("top_p", 1.0), one, cpu, torch.float64)
        m = row_scalar(settings.get("min_p", 0.0), one, cpu, torch.float32)
        on = drawing._replace(top_k=k, top_p=p, min_p=m)
        scaled = scaled_key(key, key.amax(1), t)
        keep = kept(on, key, scaled, k, p, m)
        scores = torch.where(keep, scaled, -torch.inf)[0].double()
        return (scores - scores.logsumexp(0)).numpy()

    return log_kept


def torch_arrivals(seed: int, position: int, index: Array, stream: int) -> Array:
    one = torch.tensor([seed]), torch.tensor([position])
    return philox.exponential(*one, torch.from_numpy(index)[None], stream)[0].double().numpy()
