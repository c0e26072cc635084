"""The check before timing: a backend that is wrong on the inputs is not timed on them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import mod_fused
from mod_fused import reference

from .problem import Problem, filters, logits, mixture

TOLERANCE = 2e-5  # total variation from the float64 oracle: the op's contract
_LOG_PROB_TOLERANCE = 1e-4  # of a drawn token, against the same backend's log_probs
_DRAWS = 16  # filtered draws of the first row that are compared with the oracle's
_CLOSE_RACE = 1e-3  # `race_margin`: float32 may decide a closer race otherwise


class Check(NamedTuple):
    """Whether a backend may be timed on a problem."""

    passed: bool
    tv: float | None  # total variation from the oracle on the first row; None if it has none
    reason: str  # why it failed; empty if it passed


def total_variation(log_p: Tensor, oracle: np.ndarray) -> float:
    """Half the L1 distance between exp(log_p), normalised, and exp(oracle); both [V]."""
    p = torch.softmax(log_p.double(), -1).cpu().numpy()
    return float(np.abs(p - np.exp(oracle)).sum() / 2)


@functools.lru_cache(maxsize=64)
def _oracle(problem: Problem) -> np.ndarray:
    (ref, policies, weights), options = mixture(problem, logits(problem, problem.batch))
    if "values" in options:
        options["values"] = options["values"][:, 0]
    first = None if ref is None else ref[0]
    return reference.log_probs_row(first, [x[0] for x in policies], weights, **options)


def oracle(problem: Problem, largest_batch: int) -> np.ndarray:
    """log pi* of the first row, float64 [V]: independent of batch, thread count and filter."""
    return _oracle(problem._replace(batch=largest_batch, threads=0, filters=""))


def check(problem: Problem, rows: list[Tensor], expected: np.ndarray, backend: str) -> Check:
    """Compare the backend's log pi* with the oracle's on the first row, and the log-probabilities
    of drawn tokens with its own log pi* on all rows. With filters also compare draws of the first
    row with the oracle's."""
    arguments, options = mixture(problem, rows)
    log_probs = mod_fused.log_probs(*arguments, **options, backend=backend)
    first = log_probs[0]
    # Do not normalise: the check includes that the probabilities sum to one.
    tv = float(np.abs(first.double().exp().cpu().numpy() - np.exp(expected)).sum() / 2)
    if not tv <= TOLERANCE:  # NaN fails too
        shown = tv if np.isfinite(tv) else None
        return Check(False, shown, f"total variation {tv:.1e} from the oracle, not <= {TOLERANCE}")
    after = filters(problem, rows[0].device)
    drawn = mod_fused.sample(*arguments, **options, **after, seed=1, backend=backend)
    if not bool(drawn.valid.all()):
        return Check(False, tv, "a row was declared invalid")
    at = log_probs.gather(1, drawn.tokens[:, None]).squeeze(1)
    error = float((at - drawn.logprobs).abs().max())
    if not error <= _LOG_PROB_TOLERANCE:
        return Check(False, tv, f"log-probability of a drawn token is off by {error:.1e}")
    if problem.filters and (wrong := _wrong_draws(problem, rows, expected, backend)):
        return Check(False, tv, f"{wrong} of {_DRAWS} filtered draws are not the oracle's")
    return Check(True, tv, "")


def _wrong_draws(problem: Problem, rows: list[Tensor], expected: np.ndarray, backend: str) -> int:
    """How many draws of the first row, each at another position, are not the oracle's race."""
    draws = problem._replace(batch=_DRAWS)
    arguments, options = mixture(draws, [x[:1].repeat(_DRAWS, 1) for x in rows])
    after: dict[str, Any] = filters(draws, rows[0].device)
    tokens = mod_fused.sample(
        *arguments, **options, **after, seed=[1] * _DRAWS, position=list(range(_DRAWS)),
        backend=backend,
    ).tokens.tolist()  # fmt: skip
    if "mask" in after:
        after["mask"] = after["mask"][0].cpu()
    p = np.exp(reference.filtered_log_probs(expected, **after))
    return sum(not won(token, p, 1, position) for position, token in enumerate(tokens))


def won(token: int, p: np.ndarray, seed: int, position: int) -> bool:
    """Whether a token of p [V] wins the oracle's race. In a race so close that float32 may decide
    it otherwise every possible token does."""
    close = p[token] > 0 and reference.race_margin(p, seed, position) <= _CLOSE_RACE
    return bool(close or token == reference.race(p, seed, position))
