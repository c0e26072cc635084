"""Importance resampling of whole responses: N candidates of a prompt, drawn token by token, are
weighed to the optimum over whole responses, and the responses are drawn from them.

With q(y) the probability with which a candidate was drawn, d_i = log pi_i(y) - log pi_ref(y) and
u = sum_i w_i f'(e^d_i), a candidate weighs pi*(y) / q(y), where

    reverse KL:    pi*(y) proportional to pi_ref(y)^(1 - sum w) prod_i pi_i(y)^w_i
    the others:    pi*(y) = pi_ref(y) (f')^-1(u(y) - Z),    Z such that the mean weight is 1

Everything is float64: the log-probability of a response may be far below float32's range.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..divergence import Divergence, ReverseKL, get_divergence, is_built_in
from ..torch_kernels import philox
from ..torch_kernels.mixture import normal, own_coefficient
from ..torch_kernels.own_mass import own_mass
from ..torch_kernels.parameters import row_vector
from .options import plain

#: Of the random numbers that choose among candidates; tokens use streams 0 and 1.
STREAM = 2
#: So many halve any bracket of float64 down to neighbouring numbers; about 60 are usual.
_BISECTIONS = 2200
_LARGEST_DEFICIT = 1e300


class Weighed(NamedTuple):
    """The candidates of each prompt, float64; the fields are documented in `GenerateOutput`."""

    weights: Tensor  # [B, N]
    effective_sample_size: Tensor  # [B]
    log_normalizer: Tensor  # [B]


def check_resampling(options: dict[str, Any], **refused: Any) -> None:
    """Refuse what cannot go with num_candidates: in `options` of `mod_fused.sample`, as they were
    given, and `refused`, arguments of `generate` that must be None.

    Raises:
        ValueError: names the argument.
    """
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"num_candidates cannot be combined with {name}")
    if not is_built_in(divergence := get_divergence(options["divergence"])):
        raise ValueError(
            f"num_candidates is possible for the built-in divergences only, got {divergence.name}"
        )
    temperature = plain(options["temperature"])
    each = temperature.flatten().tolist() if isinstance(temperature, Tensor) else temperature
    if 0 in (each if isinstance(each, list) else [each]):
        raise ValueError(
            "num_candidates needs candidates that differ: do_sample=True and a temperature above 0"
        )


def weigh(
    options: dict[str, Any], totals: Tensor, valid: Tensor, count: int, has_reference: bool
) -> Weighed:
    """Weigh the candidates of each prompt.

    Args:
        options: of `mod_fused.sample`, among them divergence and the weights w.
        totals: float64 [B N, models + 1], log-probability in nats of each candidate under each
            model, reference first, and log q. The candidates of a prompt are adjacent.
        valid: bool [B N]; an invalid candidate weighs 0.
        count: N.
        has_reference: whether the first column is the reference's.
    """
    rows = slice(0, len(totals))
    given = options["weights"]
    w = normal(row_vector(given, rows, totals.device))
    log_models, log_q = totals[:, :-1], torch.where(valid, totals[:, -1], torch.inf)
    divergence = get_divergence(options["divergence"])
    if type(divergence) is ReverseKL:
        coefficients = w
        if has_reference:
            coefficients = torch.cat([own_coefficient(given, w)[:, None], w], 1)
        # A model of coefficient 0 is not looked at: it may find the response impossible.
        terms = torch.where(coefficients == 0, 0.0, coefficients * log_models)
        log_weights = (terms.sum(1) - log_q).view(-1, count)
        log_normalizer = log_weights.logsumexp(1) - math.log(count)
        weights = log_weights.softmax(1)
    else:
        log_base = (log_models[:, 0] - log_q).view(-1, count)
        ratios = (log_models[:, 1:] - log_models[:, :1]).view(-1, count, w.shape[1])
        w = w[::count]
        weights = _solved(divergence, w, log_base, ratios)
        log_normalizer = _constant(divergence, w, weights, log_base, ratios)
    none = ~valid.view(-1, count).any(1)
    weights = torch.where(none[:, None], torch.nan, weights)
    log_normalizer = torch.where(none, torch.nan, log_normalizer)
    return Weighed(weights, 1.0 / weights.square().sum(1), log_normalizer)


def _deficits(divergence: Any, w: Tensor, d: Tensor) -> Tensor:
    """Q = sum_i w_i q(d_i) of [B, N, M]; a policy of weight 0 is not looked at."""
    w = w[:, None]
    return torch.where(w == 0, 0.0, w * divergence.deficit(torch.where(w == 0, 0.0, d))).sum(2)


def _solved(divergence: Divergence, w: Tensor, log_base: Tensor, ratios: Tensor) -> Tensor:
    """The weights [B, N] of any divergence but reverse KL; log_base is log(pi_ref / q) [B, N].

    The candidates are the tokens of one step, whose reference is p = pi_ref / q, normalised over
    them: sum p H = m with m = N / sum(pi_ref / q), as in mod_fused/torch_kernels/own_mass.py.
    """
    log_sum = log_base.logsumexp(1)
    log_p = log_base - log_sum[:, None]
    inside = log_p > -torch.inf
    # The least of the policies' probabilities of all candidates, against the reference's.
    masses = torch.where(inside[..., None], ratios + log_p[..., None], -torch.inf).logsumexp(1)
    least = torch.where(w != 0, masses, torch.inf).amin(1)
    functions = own_mass(divergence, math.log(log_p.shape[1]) - log_sum, least)
    log_ratio = functions.divergence.log_ratio
    d = ratios - functions.log_mass[:, None, None]
    d = torch.maximum(d, functions.least_log_ratio[:, None, None])
    deficit = torch.where(inside, _deficits(functions.divergence, w, d), torch.inf)
    deficit = deficit.clamp(max=_LARGEST_DEFICIT)
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
    divergence: Divergence, w: Tensor, weights: Tensor, log_base: Tensor, ratios: Tensor
) -> Tensor:
    """Z [B] = u(y) - f'(pi*(y) / pi_ref(y)), at the candidate of the largest ratio."""
    log_ratio = torch.where(weights > 0, weights.log() + math.log(weights.shape[1]), -torch.inf)
    log_ratio = torch.where(log_base > -torch.inf, log_ratio - log_base, -torch.inf)
    best = log_ratio.argmax(1, keepdim=True)
    u = divergence.supremum * w.sum(1, keepdim=True) - _deficits(divergence, w, ratios)
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
