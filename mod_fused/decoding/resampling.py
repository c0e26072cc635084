"""The mathematics of resampling: N candidates of a prompt, drawn token by token, are weighed to the
optimum over whole responses, and responses are drawn from them.

With q(y) the probability with which a candidate was drawn, d_i = log pi_i(y) - log pi_ref(y),
V_j(y) the value of its last token and u = sum_i w_i f'(e^d_i) + sum_j v_j V_j, a candidate weighs
pi*(y) / q(y), where

    reverse KL:    pi*(y) ~ pi_ref(y)^(1 - sum w) prod_i pi_i(y)^w_i exp(sum_j v_j V_j(y))
    the others:    pi*(y) = pi_ref(y) (f')^-1(u(y) - Z),    Z such that the mean weight is 1

Everything is float64: the log-probability of a response may be far below float32's range.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..divergence import Divergence, ReverseKL, get_divergence
from ..torch_kernels import philox
from ..torch_kernels.mixture import normal, own_coefficient
from ..torch_kernels.own_mass import own_mass
from ..torch_kernels.parameters import row_vector
from .totals import Totals

#: Of the random numbers that choose among whole responses, and of those that resample them on the
#: way; tokens use streams 0 and 1.
STREAM, ON_THE_WAY = 2, 3
#: So many halve any bracket of float64 down to neighbouring numbers; about 60 are usual.
_BISECTIONS = 2200
_LARGEST_DEFICIT = 1e300


class Weighed(NamedTuple):
    """The candidates of each prompt, float64; the fields are documented in `GenerateOutput`."""

    weights: Tensor  # [B, N]
    effective_sample_size: Tensor  # [B]
    log_normalizer: Tensor  # [B]


def weigh(
    options: dict[str, Any], totals: Totals, valid: Tensor, count: int, has_reference: bool
) -> Weighed:
    """Weigh the candidates of each prompt.

    Args:
        options: of `mod_fused.sample`: divergence, the weights w and, where there are values, v.
        totals: of B N candidates; those of a prompt are adjacent. `proposal` is log q.
        valid: bool [B N]; an invalid candidate weighs 0.
        count: N.
        has_reference: whether the first column of `models` is the reference's.
    """
    rows, device = slice(0, len(valid)), valid.device
    given = options["weights"]
    w = normal(row_vector(given, rows, device))
    log_models, log_q = totals.models, torch.where(valid, totals.proposal, torch.inf)
    tilt = torch.zeros_like(log_q)
    if totals.values is not None:
        v = options["value_weights"]
        v = normal(row_vector([1.0] * totals.values.shape[1] if v is None else v, rows, device))
        tilt = torch.where(v == 0, 0.0, v * totals.values).sum(1)
    divergence = get_divergence(options["divergence"])
    if type(divergence) is ReverseKL:
        coefficients = w
        if has_reference:
            coefficients = torch.cat([own_coefficient(given, w)[:, None], w], 1)
        # A model of coefficient 0 is not looked at: it may find the response impossible.
        terms = torch.where(coefficients == 0, 0.0, coefficients * log_models)
        log_weights = (terms.sum(1) + tilt - log_q).view(-1, count)
        log_normalizer = log_weights.logsumexp(1) - math.log(count)
        weights = log_weights.softmax(1)
    else:
        log_base, tilt = (log_models[:, 0] - log_q).view(-1, count), tilt.view(-1, count)
        ratios = (log_models[:, 1:] - log_models[:, :1]).view(*log_base.shape, w.shape[1])
        w = w[::count]
        weights = _solved(divergence, w, log_base, ratios, tilt)
        log_normalizer = _constant(divergence, w, weights, log_base, ratios, tilt)
    none = ~valid.view(-1, count).any(1)
    weights = torch.where(none[:, None], torch.nan, weights)
    log_normalizer = torch.where(none, torch.nan, log_normalizer)
    return Weighed(weights, 1.0 / weights.square().sum(1), log_normalizer)


def _deficits(divergence: Any, w: Tensor, d: Tensor) -> Tensor:
    """Q = sum_i w_i q(d_i) of [B, N, M]; a policy of weight 0 is not looked at."""
    w = w[:, None]
    return torch.where(w == 0, 0.0, w * divergence.deficit(torch.where(w == 0, 0.0, d))).sum(2)


def _solved(
    divergence: Divergence, w: Tensor, log_base: Tensor, ratios: Tensor, tilt: Tensor
) -> Tensor:
    """The weights [B, N] of any divergence but reverse KL; log_base is log(pi_ref / q) [B, N], tilt
    sum v V [B, N].

    The candidates are the tokens of one step, whose reference is p = pi_ref / q, normalised over
    them: sum p H = m with m = N / sum(pi_ref / q), as in mod_fused/torch_kernels/own_mass.py.
    """
    log_sum = log_base.logsumexp(1)
    log_p = log_base - log_sum[:, None]
    inside = log_p > -torch.inf
    # The least of the policies' probabilities of all candidates, against the reference's.
    masses = torch.where(inside[..., None], ratios + log_p[..., None], -torch.inf).logsumexp(1)
    masses = torch.where(w != 0, masses, torch.inf)
    least = torch.nn.functional.pad(masses, (0, 1), value=torch.inf).amin(1)
    functions = own_mass(divergence, math.log(log_p.shape[1]) - log_sum, least)
    log_ratio = functions.divergence.log_ratio
    d = ratios - functions.log_mass[:, None, None]
    d = torch.maximum(d, functions.least_log_ratio[:, None, None])
    deficit = _deficits(functions.divergence, w, d) - functions.tilt_scale[:, None] * tilt
    deficit = torch.where(inside, deficit, torch.inf).clamp(max=_LARGEST_DEFICIT)
    excess = deficit - deficit.amin(1, keepdim=True)
    best = excess.argmin(1, keepdim=True)

    # The bracket of mod_fused/torch_kernels/normalizer.py, of probabilities that sum to 1.
    level = functions.divergence.deficit
    upper = level(torch.zeros_like(log_sum))
    lower = level(-log_p.gather(1, best).squeeze(1))
    lower = torch.minimum(torch.maximum(lower, upper - (log_p.exp() * excess).sum(1)), upper)
    for _ in range(_BISECTIONS):
        middle = lower.sqrt() * upper.sqrt() if divergence.bounded else 0.5 * (lower + upper)
        if not bool(((middle > lower) & (middle < upper)).any()):
            break
        high = (log_p + log_ratio(middle[:, None] + excess)).logsumexp(1) > 0
        lower, upper = torch.where(high, middle, lower), torch.where(high, upper, middle)
    # The upper end is never 0, where a ratio would be infinite.
    return (log_p + log_ratio(upper[:, None] + excess)).softmax(1)


def _constant(
    divergence: Divergence,
    w: Tensor,
    weights: Tensor,
    log_base: Tensor,
    ratios: Tensor,
    tilt: Tensor,
) -> Tensor:
    """Z [B] = u(y) - f'(pi*(y) / pi_ref(y)), at the candidate of the largest ratio."""
    log_ratio = torch.where(weights > 0, weights.log() + math.log(weights.shape[1]), -torch.inf)
    log_ratio = torch.where(log_base > -torch.inf, log_ratio - log_base, -torch.inf)
    best = log_ratio.argmax(1, keepdim=True)
    u = divergence.supremum * w.sum(1, keepdim=True) - _deficits(divergence, w, ratios) + tilt
    slope = divergence.supremum - divergence.deficit(log_ratio.gather(1, best))
    return (u.gather(1, best) - slope).squeeze(1)


def choose(weights: Tensor, seeds: Tensor, position: int | Tensor, draws: int) -> Tensor:
    """K independent draws among the N candidates of each prompt: the race argmin E / weight, with
    E of (seed, position, k N + n, STREAM). A draw depends on its own prompt's seed alone; the first
    draws are the same for every K.

    Args:
        weights: float64 [B, N].
        seeds: int64 [B], of the prompts.
        position: of the first token, a number or int64 [B].
        draws: K.

    Returns:
        int64 [B K], rows of the batch of B N candidates. Where no candidate is valid, the first.
    """
    batch, count = weights.shape
    index = torch.arange(draws * count, device=weights.device)[None]
    at = torch.zeros_like(seeds) + position
    arrival = philox.exponential(seeds, at, index, STREAM).view(batch, draws, count).double()
    chosen = (arrival / weights[:, None]).argmin(2)
    first = torch.arange(batch, device=weights.device)[:, None] * count
    return (first + chosen).flatten()


def spread(weights: Tensor, seeds: Tensor, position: int | Tensor) -> Tensor:
    """Systematic resampling: N rows for the N candidates of each prompt, of which a candidate gets
    N weight in the mean, rounded down or up. The points (u + k) / N, k = 0 .. N - 1, fall into the
    intervals of its weights; u depends on (seed, position, ON_THE_WAY) alone.

    Args:
        weights: float64 [B, N].
        seeds: int64 [B], of the prompts.
        position: of the token drawn last, a number or int64 [B].

    Returns:
        int64 [B N], rows of the batch of B N candidates; where weights are NaN any of the prompt.
    """
    batch, count = weights.shape
    ends = weights.cumsum(1)
    at = torch.zeros_like(seeds) + position
    u = -torch.expm1(-philox.exponential(seeds, at, at.new_zeros(1, 1), ON_THE_WAY).double())
    points = (u + torch.arange(count, device=weights.device)) / count
    chosen = torch.searchsorted(ends / ends[:, -1:], points, right=True).clamp(max=count - 1)
    first = torch.arange(batch, device=weights.device)[:, None] * count
    return (first + chosen).flatten()
