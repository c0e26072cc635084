"""The float64 oracle for log pi*: plain bisection, one row at a time, numpy only.

It shares no code and no method with the backends. The equation is the one of MOD
(arXiv 2406.18853, eq. 6) with a tilt by value scores,

    f'(pi*(s) / pi_ref(s)) = u(s) - Z,
    u(s) = sum_i w_i f'(pi_i(s) / pi_ref(s)) + sum_j v_j V_j(s),

Z such that pi* sums to one. Bisecting Z itself fails even in float64, because Z comes within 1e-9
to 1e-40 of the pole of the inverse of f'. The unknown here is rho = log(pi*/pi_ref) of the token
s* with the largest u. The log-ratio r(s) of every other token follows from rho,

    f'(e^r(s)) = f'(e^rho) - (u(s*) - u(s)),

and no r(s) moves faster than rho does. Whatever the weights, rho lies between -log P (all ratios
are equal; P is the reference's mass on the support) and -log pi_ref(s*) (s* takes everything).

The range of float32 decides which rows are valid and which tokens have a probability. The rules are
the same for every backend. A tensor *counts* if it is the reference, if its weight is not 0, or if
plausibility names it. Under reverse KL the reference counts if its coefficient 1 - sum w is not 0.
A coefficient 1 - sum w of at most 2^-40 in magnitude is taken as rounding, and is 0; where the
weights are a float32 tensor, one of at most (M+1) 2^-24 is.

- A number beyond the largest float32 is infinite: a scaled logit, a coefficient (weight, value
  weight, and 1 - sum w under reverse KL), log pi*, and a partial sum, in the order of the
  arguments, of the products of reverse KL or of sum w_i q_i. A weight below the smallest normal
  float32 is 0.
- A row is invalid if a coefficient is not finite, or if a logit or value that counts is NaN or
  +inf. A token leaves the support if a logit or value that counts is -inf.
- Under reverse KL a token leaves if its sum is -inf; the row is invalid if one is +inf or NaN.
- Otherwise let Q = sum w_i q_i - tilt, where q = c - f', c = sup f' (0 for Jeffrey and for
  alpha < 0.03). A token leaves if log pi_ref < -80, if log pi_i of a tensor that counts is -inf, or
  if Q, with or without the tilt, is not below 1e37. The row is invalid if min Q <= -1e37, if a
  prefix that counts is not finite, and, with Z = 0, if tau = c (1 - sum w) + min Q is not finite
  or not more than 1e-36 above the pole of H.
- A row is invalid if no token is left in it.

With the mixture's own mass m = pi*(y_<t) / pi_ref(y_<t) of the response so far (its log is the
mixture's prefix less the reference's) the equation is that of the whole response,

    f'(m pi*(s) / pi_ref(s)) = u(s) - Z,    pi*(s) = pi_ref(s) H(u(s) - Z) / m,

and the probabilities of the next token sum to one. Log-ratios of responses reach hundreds of nats
then. So this file takes numpy's longdouble, where e^d has a range of more than d = 10000, and has
no clamp, no shift and no limits of Q.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .slopes import Slope, slope_of

Array = np.ndarray

LOG_REF_FLOOR = -80.0  # off reverse KL, tokens with log pi_ref below this leave the support
LOG_RATIO_FLOOR = -80.0  # d is clamped below here
PREFIX_FLOOR = -40.0  # the smallest prefix difference, after all are shifted up together
# A token with Q above it leaves; min Q below its negative makes the row invalid.
LARGEST_DEFICIT = float(np.float32(1e37))
# With Z = 0: tau less than this above the pole makes the row invalid.
LEAST_TAU = float(np.float32(1e-36))
SMALLEST_WEIGHT = 2.0**-126  # the smallest normal float32
WEIGHT_ROUNDING, FLOAT32_ROUNDING = 2.0**-40, 2.0**-24  # see 1 - sum w above


def to_float64(x: Any) -> Array:
    """A float64 numpy array of a torch tensor (any dtype and device), array, list or number."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def float32_range(x: Array) -> Array:
    """x, but infinite where it is beyond the largest float32."""
    with np.errstate(over="ignore"):
        return np.where(np.isinf(x.astype(np.float32)), np.copysign(np.inf, x), x)


def _coefficients(weights: Any) -> Array:
    """Weights in the range of float32: infinite beyond it, 0 below its normal numbers."""
    w = float32_range(to_float64(weights).reshape(-1))
    return np.where(np.abs(w) < SMALLEST_WEIGHT, 0.0, w)


def _own_coefficient(weights: Any) -> float:
    """1 - sum w, the reference's coefficient; 0 where it is no more than rounding."""
    w = _coefficients(weights)
    own = 1.0 - float(w.sum())
    single = str(getattr(weights, "dtype", "")).endswith("float32")
    return (
        0.0 if abs(own) <= ((len(w) + 1) * FLOAT32_ROUNDING if single else WEIGHT_ROUNDING) else own
    )


def _log_sum_exp(x: Array) -> float:
    """log sum exp of a vector in float64."""
    peak = x.max()
    return float(peak + np.log(np.exp(x - peak).sum())) if np.isfinite(peak) else float(peak)


def log_softmax(logits: Array) -> Array:
    """log softmax over the last axis in float64; all NaN where no entry is finite."""
    peak = logits.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shifted = logits - peak
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def solve_log_ratios(lr: Array, u: Array, slope: Slope, log_mass: float = 0.0) -> Array:
    """log H(u - Z) over the support, by bisection on rho (see the top of the file).

    `lr` [N] is log pi_ref on the support and `u` [N] is u(s) up to a constant, which only moves Z.
    The sum of pi_ref H is e^log_mass, m of the whole response. The result is not renormalised: its
    distance from that sum is the error of the solution.
    """
    best = int(np.argmax(u))
    behind = u[best] - u  # >= 0

    def log_ratios(rho: float) -> Array:
        return slope.inverse(slope.slope(np.array(rho, dtype=u.dtype)) - behind)

    low, high = log_mass - np.log(np.exp(lr).sum()), log_mass - lr[best]
    while low < (middle := 0.5 * (low + high)) < high:  # until no number lies between
        if np.exp(lr + log_ratios(middle) - log_mass).sum() < 1.0:
            low = middle
        else:
            high = middle
    return log_ratios(middle)


def log_ratios_at_zero(u: Array, weight_sum: float, slope: Slope) -> Array | None:
    """log(pi* / pi_ref) for Z = 0, MOD's eq. 6 as printed; None where Z = 0 has no inverse.

    `u` is sum_i w_i (f' - c)(d_i) + tilt, so f' - c of the answer is u + c (sum w - 1).
    """
    y = u + slope.supremum * (weight_sum - 1.0)
    if not np.isfinite(float32_range(y.max())) or not y.max() < slope.top - LEAST_TAU:
        return None
    return slope.inverse(y)


def _read_values(
    values: Any, value_ids: Any, value_weights: Any, vocab: int
) -> tuple[list[Array], Array] | None:
    """The terms v_j V_j [V] of the tilt and the tokens [V] that they leave; None if invalid."""
    terms: list[Array] = []
    if values is None:
        return terms, np.ones(vocab, dtype=bool)
    scores = to_float64(values)
    v = _coefficients(value_weights if value_weights is not None else np.ones(len(scores)))
    at = np.arange(vocab)
    if value_ids is not None:
        at = to_float64(value_ids).astype(np.int64)
        if (at < -1).any() or (at >= vocab).any():
            return None
        scores, at = scores[:, at >= 0], at[at >= 0]
    left = np.zeros(vocab, dtype=bool)
    left[at] = True
    for weight, score in zip(v, scores, strict=True):
        if weight == 0.0:
            continue  # ignored entirely
        if not np.isfinite(weight) or np.isnan(score).any() or (score == np.inf).any():
            return None
        finite = score > -np.inf
        left[at[~finite]] = False
        terms.append(np.zeros(vocab))
        terms[-1][at[finite]] = weight * score[finite]
    return terms, left


def _log_linear(
    coefficients: list[float], rows: list[Array], terms: list[Array], size: int
) -> Array | None:
    """Reverse KL's sum of coefficients times logits and of the terms of values, over the support.

    -inf where float32 overflows to -inf, None where it overflows to +inf. The result is summed from
    differences to each row's largest logit: it is up to a constant."""
    total = np.zeros(size)
    for term in [c * row for c, row in zip(coefficients, rows, strict=True)] + terms:
        total = float32_range(total + term)
    if not (total < np.inf).all():
        return None
    terms = terms + [c * (row - row.max()) for c, row in zip(coefficients, rows, strict=True)]
    return np.where(total > -np.inf, sum(terms, np.zeros(size)), -np.inf)


def log_probs_row(
    ref_logits: Any,
    policy_logits: Any,
    weights: Any,
    *,
    divergence: Any = "reverse_kl",
    normalizer: str = "exact",
    values: Any = None,
    value_ids: Any = None,
    value_weights: Any = None,
    prefix_logprobs: Any = None,
    mixture_prefix_logprobs: Any = None,
    logit_scales: Any = None,
    vocab_size: int | None = None,
    plausibility: float | None = None,
    plausibility_tensor: int = 0,
    solution: dict[str, Any] | None = None,
) -> Array:
    """log pi* of one row, float64 [V]; -inf outside the support, all NaN for an invalid row.

    Arguments are one row of those of `mod_fused.log_probs`: `ref_logits` [V0] or None,
    `policy_logits` M vectors [V_i], `weights` [M], `values` [J, V] or [J, K] with `value_ids` [K],
    `value_weights` [J], `prefix_logprobs` and `logit_scales` [M+1] (reference first),
    `mixture_prefix_logprobs` a number.
    `solution` takes what was solved on the way, and why a row is invalid.
    """
    solution = {} if solution is None else solution
    slope = slope_of(divergence, mixture_prefix_logprobs is not None)
    w = _coefficients(weights)
    rows = ([] if ref_logits is None else [to_float64(ref_logits)]) + [
        to_float64(p) for p in policy_logits
    ]
    vocab = vocab_size if vocab_size is not None else min(len(row) for row in rows)
    scales = to_float64(logit_scales) if logit_scales is not None else np.ones(len(rows))
    rows = [float32_range(row[:vocab] * x) for row, x in zip(rows, scales, strict=True)]
    if ref_logits is None:
        if slope is not None:
            raise ValueError("a divergence other than reverse_kl needs a reference")
        rows = [np.zeros(vocab), *rows]  # a placeholder of no weight, so that index i is policy i

    def invalid(reason: str) -> Array:
        solution["reason"] = reason
        return np.full(vocab, np.nan)

    # A tensor of weight zero is not looked at, unless plausibility names it.
    used = [i for i in range(1, len(rows)) if w[i - 1] != 0.0]
    own = 0.0 if ref_logits is None else _own_coefficient(weights)
    if slope is not None or own != 0.0:
        used = [0, *used]
    share = float(plausibility or 0.0)
    if not 0.0 <= share <= 1.0:
        return invalid("plausibility is not in [0, 1]")
    read = {*used, plausibility_tensor} if share else set(used)
    read_values = _read_values(values, value_ids, value_weights, vocab)
    if read_values is None:
        return invalid("a value is NaN or +inf, its weight is not finite, or an id is out of range")
    if not np.isfinite(w).all() or not (scales > 0).all():
        return invalid("a weight or a scale is not a finite float32")
    if any(np.isnan(rows[k]).any() or (rows[k] == np.inf).any() for k in read):
        return invalid("a logit that counts is NaN or +inf")
    solution["norms"] = np.array([_log_sum_exp(row) for row in rows[int(ref_logits is None) :]])

    terms, support = read_values
    for k in used:
        support &= rows[k] > -np.inf
    if share:
        named = rows[plausibility_tensor]
        support &= (named >= named.max() + np.log(share)) & (named > -np.inf)
    if not support.any():
        return invalid("no token is left in the support")
    peaks = 0.0  # what the score is less than the weighted sum
    if slope is None:
        coefficients = [w[k - 1] if k else own for k in used]
        if not np.isfinite(float32_range(np.array(coefficients))).all():
            return invalid("a coefficient is not a finite float32")
        at = np.flatnonzero(support)
        terms = [term[at] for term in terms]
        peaks = sum(c * rows[k][at].max() for c, k in zip(coefficients, used, strict=True))
        score = _log_linear(coefficients, [rows[k][at] for k in used], terms, len(at))
    else:
        logs = {k: float32_range(log_softmax(rows[k])) for k in used}
        shift = np.zeros(len(rows))  # prefix_i - prefix_ref
        log_mass = None
        if prefix_logprobs is not None:
            prefix = to_float64(prefix_logprobs)
            if not np.isfinite(prefix[used]).all():
                return invalid("a prefix that counts is not finite")
            shift = prefix - prefix[0]
            if mixture_prefix_logprobs is not None:
                log_mass = float(mixture_prefix_logprobs) - prefix[0]
                if not np.isfinite(log_mass):
                    return invalid("a prefix that counts is not finite")
                shift = shift.astype(np.longdouble)
            elif slope.floors and used[1:]:
                shift = shift + max(0.0, PREFIX_FLOOR - shift[used[1:]].min())
        support &= logs[0] >= LOG_REF_FLOOR
        for k in used:
            support &= logs[k] > -np.inf
        tilt = sum(terms, np.zeros(vocab))
        at, score = _general(slope, logs, w, shift, log_mass, support, tilt, normalizer, solution)
    if score is None or not (score > -np.inf).any():
        return invalid("no token is left, a sum overflows float32, or Z = 0 has no inverse")
    solution["normalizer"] = _log_sum_exp(score) + peaks
    result = np.full(vocab, -np.inf)
    result[at] = float32_range(log_softmax(score))
    return result


def _general(
    slope: Slope, logs: dict[int, Array], w: Array, shift: Array, log_mass: float | None,
    support: Array, tilt: Array, normalizer: str, solution: dict[str, Any],
) -> tuple[Array, Array | None]:  # fmt: skip
    """For all divergences but reverse KL: the support that is left, and log pi* there; None if the
    row is invalid.

    `logs` [V] are log pi of the models that count, `shift` the differences of their prefixes,
    `log_mass` that of the mixture's own prefix, None without it.
    """
    at = np.flatnonzero(support)
    own_mass = log_mass is not None
    negative_q = np.zeros(len(at), dtype=shift.dtype)  # sum w (f' - c)
    log_ratios: dict[int, Array] = {}  # d by model
    for k in sorted(logs.keys() - {0}):
        d = logs[k][at] - logs[0][at] + shift[k]
        d = np.maximum(d, LOG_RATIO_FLOOR) if slope.floors and not own_mass else d
        log_ratios[k] = d
        negative_q = negative_q + w[k - 1] * slope.slope(d)
        negative_q = negative_q if own_mass else float32_range(negative_q)
    u = negative_q + tilt[at]
    least_u = -np.inf if own_mass else -LARGEST_DEFICIT
    inside = (negative_q > least_u) & (u > least_u)
    at, u = at[inside], u[inside]
    log_ratios = {k: d[inside] for k, d in log_ratios.items()}
    lr = logs[0][at]
    if not len(at) or not u.max() < -least_u:
        return at, None
    ratios: Array | None
    if normalizer == "exact":
        ratios = solve_log_ratios(lr, u, slope, log_mass or 0.0)
    else:
        ratios = log_ratios_at_zero(u, w.sum(), slope)
    if ratios is None:
        return at, None
    _record(
        solution, slope, log_ratios, shift, at, lr - (log_mass or 0.0), u, ratios, float(w.sum())
    )
    return at, lr + (ratios - (log_mass or 0.0)).astype(np.float64)


def _record(
    solution: dict[str, Any], slope: Slope, log_ratios: dict[int, Array], shift: Array, at: Array,
    lr: Array, u: Array, ratios: Array, weight_sum: float,
) -> None:  # fmt: skip
    """What `explain` shows of a solution: tau, its bracket, Z, and by token d and Q; `lr` less the
    logarithm of the own mass."""
    best = int(np.argmax(u))
    tau, least = -float(slope.slope(ratios[best])), -float(u[best])
    ends = np.array([-lr[best], -_log_sum_exp(lr)], dtype=u.dtype)
    lower, upper = (-slope.slope(ends)).tolist()
    solution.update(
        shifts=shift[1:].astype(np.float64), tau=tau, lower=lower, upper=upper, least=least,
        z=tau - least - slope.supremum * (1.0 - weight_sum),
        at=at, deficit=-u, log_ratios=log_ratios,
        deficits={k: -slope.slope(d) for k, d in log_ratios.items()},
    )  # fmt: skip


def log_probs(
    ref_logits: Any, policy_logits: Any, weights: Any, *, divergence: Any = "reverse_kl",
    normalizer: str = "exact", values: Any = None, value_ids: Any = None,
    value_weights: Any = None, prefix_logprobs: Any = None, mixture_prefix_logprobs: Any = None,
    logit_scales: Any = None, vocab_size: int | None = None, plausibility: Any = None,
    plausibility_tensor: int = 0,
) -> Array:  # fmt: skip
    """log pi* of a batch, float64 [B, V]: `log_probs_row` on each row.

    Takes the arguments of `mod_fused.log_probs` with the same shapes (`ref_logits` [B, V0],
    `weights` [M] or [B, M], `values` [J, B, V or K], `prefix_logprobs` [B, M+1], ...).
    """
    policies = [to_float64(p) for p in policy_logits]
    ref = None if ref_logits is None else to_float64(ref_logits)
    batch = len(policies[0] if ref is None else ref)

    def row(x: Any, b: int, full_ndim: int) -> Any:
        """Row b of an argument whose per-row form has `full_ndim` dimensions."""
        return None if x is None else x[b] if x.ndim == full_ndim else x

    w = weights.detach().cpu().numpy() if hasattr(weights, "detach") else to_float64(weights)
    v = None if value_weights is None else to_float64(value_weights)
    scores = None if values is None else to_float64(values)
    ids = None if value_ids is None else to_float64(value_ids)
    prefix = None if prefix_logprobs is None else to_float64(prefix_logprobs)
    own = None if mixture_prefix_logprobs is None else to_float64(mixture_prefix_logprobs)
    shares = np.zeros(()) if plausibility is None else to_float64(plausibility)
    return np.stack(
        [
            log_probs_row(
                None if ref is None else ref[b],
                [p[b] for p in policies],
                row(w, b, 2),
                divergence=divergence,
                normalizer=normalizer,
                values=None if scores is None else scores[:, b],
                value_ids=row(ids, b, 2),
                value_weights=row(v, b, 2),
                prefix_logprobs=row(prefix, b, 2),
                mixture_prefix_logprobs=row(own, b, 1),
                logit_scales=logit_scales,
                vocab_size=vocab_size,
                plausibility=row(shares, b, 1),
                plausibility_tensor=plausibility_tensor,
            )
            for b in range(batch)
        ]
    )
