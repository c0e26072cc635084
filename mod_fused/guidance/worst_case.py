"""Weights of several values for the worst of them (RMOD, arXiv 2503.08796), solved at every step.

With p the distribution before the values, beta the strength and w on the simplex,

    max_pi min_w  sum_j w_j E_pi[V_j] - KL(pi || p) / beta  =  min_w  F(w) / beta,
    F(w) = log sum_s p(s) exp(beta sum_j w_j V_j(s)),      pi_w ~ p exp(beta sum_j w_j V_j)

F is convex. Its gradient is beta E_{pi_w}[V], its Hessian beta^2 Cov_{pi_w}[V]. At any w

    gap(w) = beta (sum_j w_j E_{pi_w}[V_j] - min_j E_{pi_w}[V_j])  >=  KL(pi_w || pi*)   in nats,

so that a small gap proves that pi_w is the optimum pi*.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.fields import check_tensor, number
from ..divergence import Divergence, get_divergence
from .guide import Guidance

MAX_VALUES = 8
_GAP = 1e-10  # nats: total variation below 1e-5
_STEPS = 1000
_RIDGE = 1e-12


class WorstCase(NamedTuple):
    """The result of `worst_case_weights`.

    Attributes:
        weights: float64 [B, J] on the simplex.
        gap: float64 [B], nats: a bound of KL(pi_w || pi*). At most 1e-10, or 1e-13 of strength
            times the range of the values where that is more, unless 1000 steps were too few.
    """

    weights: Tensor
    gap: Tensor


def worst_case_weights(log_p: Tensor, values: Tensor, strength: float) -> WorstCase:
    """The weights w of the values under which the worst expected value is largest, for reverse KL.

    `mod_fused.sample` with value_weights = strength * w then draws from the pi that maximises min_j
    E_pi[V_j] - KL(pi || p) / strength.

    Args:
        log_p: floating point [B, V], log-probabilities before the values, up to a constant of the
            row; -inf excludes a token.
        values: floating point [J, B, V], finite, J at most 8.
        strength: beta, positive.

    Raises:
        TypeError, ValueError: wrong shapes, types or numbers. The contents of the tensors are not
            checked: a row with NaN gets NaN.
    """
    beta = _checked_strength(strength)
    if not isinstance(values, Tensor) or values.dim() != 3 or not 1 <= len(values) <= MAX_VALUES:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"values must be a tensor [J, B, V], J from 1 to {MAX_VALUES}, got {got}")
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    values = check_tensor("values", values, kinds, values.device, {"[J, B, V]": values.shape})
    log_p = check_tensor("log_p", log_p, kinds, values.device, {"[B, V]": values.shape[1:]})
    return _solved(log_p.double(), beta * values.double().transpose(0, 1))


def _solved(log_p: Tensor, tilts: Tensor) -> WorstCase:
    """The same for log_p [B, V] and tilts beta V_j [B, J, V], float64.

    Newton's method on the simplex. Each step minimises the quadratic model there exactly. It is
    damped so far that F falls: along a step d the third derivative of F is at most the range of d.V
    times the second.
    """
    batch, count = tilts.shape[:2]
    weights = tilts.new_full((batch, count), 1.0 / count)
    excluded = log_p[:, None] == -math.inf
    least = tilts.masked_fill(excluded, math.inf).amin((1, 2), keepdim=True)
    tilts = (tilts - least).masked_fill(excluded, 0.0)  # a constant of the row changes nothing
    enough = (1e-13 * tilts.amax((1, 2))).clamp(min=_GAP)
    faces = _faces(count, tilts)
    gap = torch.zeros_like(enough)
    for left in reversed(range(_STEPS)):
        pi = (log_p + torch.einsum("bj,bjs->bs", weights, tilts)).softmax(1)
        mean = torch.einsum("bs,bjs->bj", pi, tilts)
        # Less their mean: constants cancel, and beside them the last digits would be lost.
        gradient = mean - (weights * mean).sum(1, keepdim=True)
        gap = -gradient.amin(1)
        going = (gap > enough) & gap.isfinite()
        if not left or not bool(going.any()):
            break
        centred = tilts - mean[:, :, None]
        hessian = (centred * pi[:, None]) @ centred.transpose(1, 2)
        step = _model_minimum(weights, gradient, hessian, faces) - weights
        along = torch.einsum("bj,bjs->bs", step, tilts)
        spread = (along.amax(1) - along.amin(1)).clamp(min=1e-300)
        curvature = torch.einsum("bj,bjk,bk->b", step, hessian, step)
        slope = -(step * gradient).sum(1)
        length = torch.log1p(slope / curvature.clamp(min=1e-300) * spread) / spread
        length = torch.where(going, length.nan_to_num(1.0).clamp(0.0, 1.0), 0.0)
        weights = weights + length[:, None] * step
    return WorstCase(weights, gap)


def _faces(count: int, like: Tensor) -> Tensor:
    """The faces of the simplex [2^J - 1, J]: 1 for the weights that may be above 0."""
    faces = itertools.product((0.0, 1.0), repeat=count)
    return torch.tensor([face for face in faces if any(face)], dtype=like.dtype, device=like.device)


def _model_minimum(weights: Tensor, gradient: Tensor, hessian: Tensor, faces: Tensor) -> Tensor:
    """The point of the simplex [B, J] where the quadratic model around `weights` is least: the best
    of the minima on the hyperplanes of all faces."""
    batch, count = weights.shape
    eye = torch.eye(count, dtype=weights.dtype, device=weights.device)
    size = hessian.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-300)[:, None]
    hessian = hessian / size[:, :, None] + _RIDGE * eye
    linear = gradient / size - (hessian @ weights[:, :, None])[:, :, 0]

    # Stationary on a face: H w + linear = nu and sum w = 1 over its weights; the others are 0.
    system = weights.new_zeros(batch, len(faces), count + 1, count + 1)
    system[:, :, :count, :count] = hessian[:, None] * (faces[:, :, None] * faces[:, None])
    system[:, :, :count, :count] += torch.diag_embed(1.0 - faces)
    system[:, :, :count, count] = system[:, :, count, :count] = faces
    right = torch.cat([-linear[:, None] * faces, linear.new_ones(batch, len(faces), 1)], dim=2)
    found = torch.linalg.solve_ex(system, right)[0][:, :, :count]

    found = found.clamp(min=0.0)  # a minimum outside gives some other point, which cannot be better
    found = found / found.sum(2, keepdim=True)
    height = torch.einsum("bfj,bjk,bfk->bf", found, hessian, found) / 2
    height = height + torch.einsum("bfj,bj->bf", found, linear)
    height = torch.where(height.isfinite(), height, math.inf)
    best = height.argmin(1)
    return found[torch.arange(batch, device=best.device), best]


class WorstCaseWeights:
    """value_weights of `mod_fused.generate` that are chosen at each step and in each row for the
    worst of the values; see `robust`.

    Args:
        strength: beta, positive.
        observer: `observer(weights, gap)`, called at each step with float64 [B, J] and [B]; see
            `WorstCase`.

    Raises:
        TypeError, ValueError: for a strength that is not positive, or an observer that is no
            function.
    """

    def __init__(
        self, strength: float, observer: Callable[[Tensor, Tensor], Any] | None = None
    ) -> None:
        self.strength = _checked_strength(strength)
        if observer is not None and not callable(observer):
            raise TypeError(f"observer must be a function, got {type(observer).__name__}")
        self._observer = observer

    def check(self, divergence: str | Divergence, num_values: int) -> None:
        """Raise ValueError for a divergence or a number of values that cannot be weighed."""
        name = get_divergence(divergence).name
        if name != "reverse_kl":
            raise ValueError(f"weights for the worst value are solved for reverse_kl, got {name}")
        if num_values > MAX_VALUES:
            raise ValueError(f"at most {MAX_VALUES} values can be weighed, got {num_values}")

    def weigh(self, log_p: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The weights strength * w [B, J], and the values [J, B, K] to use with them: a token that
        one value excludes (-inf) is excluded by all, whatever its weight.

        Args:
            log_p: [B, K], of the candidates of the values.
            values: floating point [J, B, K].
        """
        excluded = (values == -math.inf).any(0)
        log_p = log_p.double().masked_fill(excluded, -math.inf)
        # A row with NaN or +inf gets NaN somewhere, and the op finds it invalid.
        finite = values.double().masked_fill(excluded, 0.0)
        found = worst_case_weights(log_p, finite, self.strength)
        if self._observer is not None:
            self._observer(*found)
        return self.strength * found.weights, values.masked_fill(excluded, -math.inf)


def robust(
    scorers: Sequence[Any],
    strength: float,
    *,
    candidates: int | None = None,
    observer: Callable[[Tensor, Tensor], Any] | None = None,
) -> dict[str, Any]:
    """Tokenwise control for the worst of several values (RMOD, arXiv 2503.08796): the next token's
    distribution pi maximises min_j E_pi[V_j(x, [y, z])] - KL(pi || p) / strength, with p the
    reference, or the mixture of policies under reverse KL.

    It is p(z) exp(strength sum_j w_j V_j(x, [y, z])) with weights w on the simplex that differ from
    step to step and from row to row, solved until the gap proves the optimum. The values must be on
    one scale: their sizes and offsets count.

    Args:
        scorers: J scorers, at most 8, dense unless candidates are given.
        strength: one positive number.
        candidates: as in `Guidance`; p is then the distribution among them.
        observer: `observer(weights, gap)`, called at each step with the w, float64 [B, J], and the
            certified gap in nats, float64 [B].
    """
    guide = Guidance(scorers, candidates=candidates)
    return {"value_fn": guide, "value_weights": WorstCaseWeights(strength, observer)}


def _checked_strength(strength: Any) -> float:
    beta = number("strength", strength)
    if not 0.0 < beta < math.inf:
        raise ValueError(f"strength must be a positive number, got {strength}")
    return beta
