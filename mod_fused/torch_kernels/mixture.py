"""The mathematics of the op in plain torch, on any device.

A row is padded to whole tiles of 1024 ids, [B, T, 1024]. `mix` gives its *key*, log pi* up to a
constant of the row, and that constant apart: filters and the race work on the key, so that order
never depends on a normaliser's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.arguments import MixtureArguments
from ..divergence import ReverseKL
from . import normalizer
from .own_mass import RowFunctions, own_mass
from .parameters import row_scalar, row_vector
from .vocabulary import Vocabulary

# The range of float32, the same in every backend and in the oracle (design §2).
_SMALLEST_LOG_REF = -80.0
SMALLEST_LOG_RATIO = -80.0
_SMALLEST_PREFIX_DIFFERENCE = -40.0
_LARGEST_DEFICIT = 9.999999933815813e36  # 1e37 in float32
_LEAST_TAU = 1e-36
_WEIGHT_ROUNDING, _FLOAT32_ROUNDING = 2.0**-40, 2.0**-24  # of a sum, of each number of one


#: Levels [b] and logs of the sums [b] of some rows, `normalizer.levels_and_log_sums`.
Norms = tuple[list[Tensor], list[Tensor]]


class Mixture(NamedTuple):
    """A chunk of b rows after the mathematics: log pi* = (key - level) - log_norm."""

    key: Tensor  # float32 [b, T, TILE], -inf off the support
    level: Tensor  # float32 [b], the largest key
    log_norm: Tensor  # float64 [b]
    valid: Tensor  # bool [b]
    logits: list[Tensor]  # float32 [b, T, TILE] each: scaled, reference first if there is one
    norms: Norms | None  # of the logits, where the mathematics needs them


def _tiles(x: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The columns of [b, >= V] as float32 [b, T, TILE], the rest filled with -inf."""
    return vocabulary.tiled(x.float(), -torch.inf)


def normal(weights: Tensor) -> Tensor:
    """Weights [b, n] in the range of float32: infinite beyond it, 0 below its normal numbers."""
    overflows = weights.float().isinf()
    weights = torch.where(weights.abs() < torch.finfo(torch.float32).tiny, 0.0, weights)
    return torch.where(overflows, torch.inf, weights)


def _fma(c: Tensor, x: Tensor, total: Tensor) -> Tensor:
    """fma(c, x, total) with one rounding to float32, c [b] against [b, T, TILE]; `total` where c is
    0.

    The product of two float32 is exact in float64. x may be infinite off the support, where nothing
    reads the result.
    """
    c = c.float()[:, None, None]
    return torch.where(c == 0, total, (c.double() * x.double() + total.double()).float())


def dense_values(
    mixing: MixtureArguments, rows: slice, vocabulary: Vocabulary
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Values as J tensors [b, T, TILE], the candidate set (None: every token), and bool [b]: all
    ids in range."""
    assert mixing.values is not None
    values = mixing.values[:, rows].float()
    if mixing.value_ids is None:
        ids_ok = torch.ones(values.shape[1], dtype=torch.bool, device=values.device)
        return [_tiles(x, vocabulary) for x in values], None, ids_ok
    ids = mixing.value_ids[rows]
    ids_ok = ((ids >= -1) & (ids < vocabulary.size)).all(1)
    # One column more than the row has takes what is not here.
    here, count = ids - vocabulary.start, vocabulary.count
    target = torch.where((ids >= 0) & (here >= 0) & (here < count), here, count)
    zeros = values.new_zeros((ids.shape[0], count + 1))
    dense = [_tiles(zeros.scatter(1, target, x), vocabulary) for x in values]
    candidates = vocabulary.tiled(zeros.scatter(1, target, 1.0) > 0, False)
    return dense, candidates, ids_ok


def mix(
    mixing: MixtureArguments,
    rows: slice,
    vocabulary: Vocabulary,
    record: dict[str, Any] | None = None,
) -> Mixture:
    """Support, validity and log pi* of a chunk of rows (design §2). `record` takes what the solver
    found on its way, for `explain`."""
    divergence = mixing.divergence
    tensors = [x[rows] for x in mixing.tensors()]
    logits = [_tiles(x, vocabulary) for x in tensors]
    if mixing.logit_scales:
        logits = [x * scale for x, scale in zip(logits, mixing.logit_scales, strict=True)]
    policies = logits[mixing.ref_logits is not None :]
    count, device = logits[0].shape[0], logits[0].device

    weights = normal(row_vector(mixing.weights, rows, device))
    valid = weights.isfinite().all(1)
    here = torch.ones((count, vocabulary.count), dtype=torch.bool, device=device)
    support = vocabulary.tiled(here, False)

    values: list[Tensor] = []
    value_weights = weights.new_zeros((count, 0))
    if mixing.values is not None:
        values, candidates, ids_ok = dense_values(mixing, rows, vocabulary)
        value_weights = normal(row_vector(mixing.value_weights, rows, device))
        valid = valid & ids_ok & value_weights.isfinite().all(1)
        if candidates is not None:
            support = support & candidates

    # A tensor of weight 0 is ignored entirely.
    pairs = [(x, weights[:, i]) for i, x in enumerate(policies)]
    pairs += [(x, value_weights[:, j]) for j, x in enumerate(values)]
    own = None
    if mixing.ref_logits is not None:
        own = torch.ones_like(weights.new_empty(count))
        if type(divergence) is ReverseKL:
            own = own_coefficient(mixing.weights, weights)
        pairs.append((logits[0], own))
    for x, weight in pairs:
        counts = weight != 0
        broken = (x.isnan() | (x == torch.inf)).flatten(1).any(1)
        valid = valid & ~(counts & broken)
        support = support & (x.isfinite() | ~counts[:, None, None])

    if mixing.plausibility_is_on():
        kept, readable = _plausible(mixing, rows, logits, vocabulary)
        valid, support = valid & readable, support & kept

    norms = None
    if type(divergence) is ReverseKL:
        key = _log_linear(own, logits, weights, values, value_weights)
    else:
        norms = normalizer.levels_and_log_sums(logits, vocabulary)
        key, support, solvable = _general(
            mixing, rows, logits, norms, weights, values, value_weights, support, vocabulary, record
        )
        valid = valid & solvable
    # What is broken is off the support. Its NaN tells the other processes with a part of the row.
    off = torch.where(valid, -torch.inf, torch.nan).to(key.dtype)
    key = torch.where(support, key, off[:, None, None])
    (level,), (log_norm,) = normalizer.levels_and_log_sums([key], vocabulary)
    # Neither an empty support (-inf) nor an overflow (NaN, +inf) leaves a finite level.
    return Mixture(key, level, log_norm, valid & level.isfinite(), logits, norms)


def _plausible(
    mixing: MixtureArguments, rows: slice, logits: list[Tensor], vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """The tokens that plausibility keeps [b, T, TILE], none where it is out of range, and the rows
    where it is off or its tensor holds neither NaN nor +inf [b]."""
    x = logits[mixing.plausibility_tensor - (mixing.ref_logits is None)]
    share = row_scalar(mixing.plausibility, rows, x.device, torch.float64)
    peak = vocabulary.largest(x.amax((-2, -1)))  # NaN and +inf both end up there
    off = share == 0.0
    kept = x - peak[:, None, None] >= share.log().float()[:, None, None]
    return off[:, None, None] | kept, off | peak.isfinite()


def own_coefficient(given: Sequence[float] | Tensor, weights: Tensor) -> Tensor:
    """1 - sum w [b] of the weights [b, M] made of the `given` ones, 0 where that is no more than
    rounding."""
    total = weights.new_zeros(weights.shape[0])
    for i in range(weights.shape[1]):
        total = total + weights[:, i]
    single = isinstance(given, Tensor) and given.dtype == torch.float32
    rounding = (weights.shape[1] + 1) * _FLOAT32_ROUNDING if single else _WEIGHT_ROUNDING
    return torch.where((1.0 - total).abs() <= rounding, 0.0, 1.0 - total)


def _log_linear(
    own: Tensor | None,
    logits: list[Tensor],
    weights: Tensor,
    values: list[Tensor],
    value_weights: Tensor,
) -> Tensor:
    """Reverse KL: (1 - sum w) l_0 + sum w_i l_i + sum v_j V_j on the raw logits, in the order fixed
    by design §3."""
    coefficients = [] if own is None else [own]
    coefficients += [weights[:, i] for i in range(weights.shape[1])]
    coefficients += [value_weights[:, j] for j in range(value_weights.shape[1])]
    key = torch.zeros_like(logits[0])
    for c, x in zip(coefficients, [*logits, *values], strict=True):
        key = _fma(c, x, key)
    return key


def prefix_differences(
    mixing: MixtureArguments, rows: slice, used: Tensor
) -> tuple[Tensor, RowFunctions]:
    """prefix_i - prefix_ref in the range of float32, float64 [b, M], and the functions of the
    log-ratios that they are part of. `used` [b, M]: weights that are not 0."""
    kind, zeros = mixing.divergence, torch.zeros_like(used, dtype=torch.float64)
    zero = zeros.new_zeros(len(zeros))
    floor = zero + (SMALLEST_LOG_RATIO if kind.clamped else -torch.inf)
    plain = RowFunctions(kind, zero, floor, zero + 1.0)
    if mixing.prefix_logprobs is None:
        return zeros, plain
    prefix = mixing.prefix_logprobs[rows].double()
    difference = prefix[:, 1:] - prefix[:, :1]
    counted = torch.where(used, difference, torch.inf)
    least = torch.cat([counted, torch.full_like(prefix[:, :1], torch.inf)], 1).amin(1)
    if mixing.mixture_prefix_logprobs is not None:
        log_mass = mixing.mixture_prefix_logprobs[rows].double() - prefix[:, 0]
        functions = own_mass(kind, log_mass, least)
        return difference - functions.log_mass[:, None], functions
    lift = (_SMALLEST_PREFIX_DIFFERENCE - least).clamp(min=0.0) if kind.clamped else zero
    return difference + lift[:, None], plain


def _general(
    mixing: MixtureArguments,
    rows: slice,
    logits: list[Tensor],
    norms: Norms,
    weights: Tensor,
    values: list[Tensor],
    value_weights: Tensor,
    support: Tensor,
    vocabulary: Vocabulary,
    record: dict[str, Any] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every other divergence, in deficit form: the key lr + log H(tau + D), the support, and
    whether Z exists [b]."""
    log_sums = norms[1]
    levels = [level.double()[:, None, None] for level in norms[0]]
    ref = logits[0] - levels[0]
    log_ref = (ref - log_sums[0][:, None, None]).float()
    support = support & (log_ref >= _SMALLEST_LOG_REF)
    solvable = torch.ones_like(support[:, 0, 0])

    shifts = torch.stack(log_sums, 1)
    shifts = shifts[:, :1] - shifts[:, 1:]
    used = weights != 0
    differences, functions = prefix_differences(mixing, rows, used)
    divergence, _, least_log_ratio, tilt_scale = functions
    shifts = shifts + differences
    if mixing.prefix_logprobs is not None:
        prefix = mixing.prefix_logprobs[rows]
        solvable = prefix[:, 0].isfinite() & (prefix[:, 1:].isfinite() | ~used).all(1)
    if mixing.mixture_prefix_logprobs is not None:
        solvable = solvable & mixing.mixture_prefix_logprobs[rows].isfinite()
    # Beside the mass of a whole response float32 would lose a token's log-ratio.
    real = torch.float32 if mixing.mixture_prefix_logprobs is None else torch.float64

    deficit = torch.zeros_like(log_ref)  # Q
    for i, x in enumerate(logits[1:]):
        # In float64: the models' logits may lie around different levels, however far from 0.
        d = (((x - levels[i + 1]) - ref) + shifts[:, i, None, None]).to(real)
        d = torch.maximum(d, least_log_ratio.to(real)[:, None, None])
        w = weights[:, i, None, None].float()
        deficit = torch.where(w == 0, deficit, deficit + w * divergence.deficit(d))
        log_norm = (levels[i + 1] + log_sums[i + 1][:, None, None]).float()
        log_policy = x - log_norm  # may be beyond float32
        support = support & ((w == 0) | (log_policy > -torch.inf))
    support = support & (deficit < _LARGEST_DEFICIT)
    # A tilt moves min Q away from 0, and D would keep only its rounding: in float64 until then.
    for j, x in enumerate(values):
        v = value_weights[:, j].float().double()[:, None, None] * tilt_scale[:, None, None]
        deficit = torch.where(v == 0, deficit, deficit - v * x.double())

    support = support & (deficit < _LARGEST_DEFICIT)
    log_ref = torch.where(support, log_ref, -torch.inf)
    excess, least, log_ref_best = normalizer.excess_deficit(deficit, log_ref, support, vocabulary)
    solvable = solvable & (least > -_LARGEST_DEFICIT)
    if mixing.normalizer == "exact":
        tau = normalizer.solve(divergence, log_ref, excess, log_ref_best, record, vocabulary)
        q = tau[:, None, None] + excess
    else:
        # In float64: H magnifies the rounding of Q by 1 / alpha, and near its pole by more.
        constant = divergence.supremum * (1.0 - weights.sum(1))
        tau = (constant + least.double()).float()
        solvable = solvable & tau.isfinite()
        if divergence.bounded:
            solvable = solvable & (tau > _LEAST_TAU)
        q = constant[:, None, None] + deficit.double()
    if record is not None:
        record.update(tau=tau, least=least)
    return log_ref + divergence.log_ratio(q).float(), support, solvable
