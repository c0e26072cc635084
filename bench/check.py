"""Correctness before timing: nothing is reported of a backend that is wrong on the same inputs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import mod_fused
from mod_fused import reference

from .problem import Problem, logits

TOLERANCE = 2e-5  # total variation from the float64 oracle: the op's contract
_LOG_PROB_TOLERANCE = 1e-4  # of a drawn token, against the same backend's log_probs


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
    first = [x[0] for x in logits(problem, problem.batch)]
    return reference.log_probs_row(
        first[0], first[1:], list(problem.weights), divergence=problem.divergence
    )


def oracle(problem: Problem, largest_batch: int) -> np.ndarray:
    """log pi* of the first row in float64 [V]: the same for every batch and thread count."""
    return _oracle(problem._replace(batch=largest_batch, threads=0))


def check(problem: Problem, rows: list[Tensor], expected: np.ndarray, backend: str) -> Check:
    """Compare the backend with the oracle on the first row, and what it draws with its own log pi*
    on all rows."""
    arguments = (rows[0], rows[1:], list(problem.weights))
    log_probs = mod_fused.log_probs(*arguments, divergence=problem.divergence, backend=backend)
    first = log_probs[0]
    # Not normalised here: that the probabilities sum to one is part of what is checked.
    tv = float(np.abs(first.double().exp().cpu().numpy() - np.exp(expected)).sum() / 2)
    if not tv <= TOLERANCE:  # NaN fails too
        shown = tv if np.isfinite(tv) else None
        return Check(False, shown, f"total variation {tv:.1e} from the oracle, not <= {TOLERANCE}")
    drawn = mod_fused.sample(*arguments, divergence=problem.divergence, seed=1, backend=backend)
    if not bool(drawn.valid.all()):
        return Check(False, tv, "a row was declared invalid")
    at = log_probs.gather(1, drawn.tokens[:, None]).squeeze(1)
    error = float((at - drawn.logprobs).abs().max())
    if not error <= _LOG_PROB_TOLERANCE:
        return Check(False, tv, f"log-probability of a drawn token is off by {error:.1e}")
    return Check(True, tv, "")
