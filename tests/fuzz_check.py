"""What the fuzzer checks of one call: invariants that hold for any input, agreement with the torch
backend, and where the two differ, who is right by the float64 oracle.

Float32 cannot do every case well: where the oracle itself moves when its inputs are perturbed by
their rounding, a result may be off by as much.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch

from mod_fused import backends, log_probs, reference, sample

Array = np.ndarray
MAX_TV = 5e-5
ULP = 2.0**-23
#: Compared with the C++ backend.
OTHERS = ("torch", "triton") if backends()["triton"] == "available" else ("torch",)
DRAW_FILTERS = ("temperature", "top_k", "top_p", "min_p", "mask", "bias")
#: Asked of every draw.
ASKED = {"return_model_logprobs": True, "return_proposal_logprobs": True}


def check(
    args: tuple[Any, ...], mixture: dict[str, Any], draw: dict[str, Any], *, wild: bool
) -> Counter[str]:
    """Run the call on all backends; AssertionError says what is wrong. Returns counts of what
    happened. `wild` numbers are judged by the oracle alone, and only the validity of draws."""
    events = Counter(calls=1)
    log_p, drawn = _both_thread_counts(args, mixture, draw)
    draw_of_oracle = {**draw, "bias": _dense_bias(draw, *log_p.shape)}
    _check_invariants(log_p, drawn, draw_of_oracle, not wild, _unit(args, mixture))
    if wild:
        events += _judge_rows(args, mixture, "cpu", log_p)
    for backend in OTHERS:
        log_q = log_probs(*args, **mixture, backend=backend)
        other = sample(*args, **mixture, **draw, **ASKED, backend=backend)
        if wild:
            events += _judge_rows(args, mixture, backend, log_q)
            both = ~(log_p.isnan().any(1) | log_q.isnan().any(1))
            assert torch.equal(drawn.valid & both, other.valid & both), f"{backend}: other draws"
            continue
        events += _compare_log_probs(args, mixture, log_p, log_q)
        events += _compare_draws(args, mixture, draw_of_oracle, log_p, log_q, drawn, other)
    return events


def _dense_bias(draw: Any, rows: int, vocab: int) -> torch.Tensor | None:
    """The bias [rows, vocab] token by token; NaN for a row whose ids are bad."""
    if "bias" not in draw:
        return None
    if "bias_ids" not in draw:
        return draw["bias"].float().expand(rows, vocab)
    dense = torch.zeros(rows, vocab)
    for b, ids in enumerate(draw["bias_ids"].tolist()):
        listed = [token for token in ids if token != -1]
        if len(set(listed)) < len(listed) or not all(0 <= token < vocab for token in listed):
            dense[b] = math.nan
            continue
        for token, x in zip(ids, draw["bias"][b].tolist(), strict=True):
            if token != -1:
                dense[b, token] = x
    return dense


def _judge_rows(args: Any, mixture: Any, backend: str, got: torch.Tensor) -> Counter[str]:
    for b, row in enumerate(reference.to_float64(got)):
        _judge(args, mixture, b, row, row, backend)
    return Counter({f"wild rows of {backend}": len(got), "invalid": int(got.isnan().any(1).sum())})


def _both_thread_counts(args: Any, mixture: Any, draw: Any) -> tuple[torch.Tensor, Any]:
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            log_p = log_probs(*args, **mixture, backend="cpu")
            drawn = sample(*args, **mixture, **draw, **ASKED, backend="cpu")
        finally:
            torch.set_num_threads(before)
        results.append((log_p, drawn))
    for x, y in zip(*[(log_p, *drawn) for log_p, drawn in results], strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.numpy().tobytes() == y.numpy().tobytes(), "depends on the number of threads"
    return results[0]


def _unit(args: Any, mixture: Any) -> Array:
    """[B]: rounding of the log-linear sum in float32, from the largest summands."""
    ref, policies, weights = args
    w = np.abs(reference.to_float64(weights))
    total = (1.0 + w.sum(-1)) * np.ones(len(policies[0] if ref is None else ref))

    def largest(x: Any) -> Array:
        x = reference.to_float64(x)
        return np.where(np.isfinite(x), np.abs(x), 0.0).max(-1, initial=0.0)

    rows = [largest(x[:, : mixture["vocab_size"]]) for x in ([] if ref is None else [ref])]
    rows += [largest(x[:, : mixture["vocab_size"]]) for x in policies]
    with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite
        unit = np.max(rows, axis=0) * total * max(mixture.get("logit_scales", [1.0]))
        if "values" in mixture:
            v = np.abs(reference.to_float64(mixture.get("value_weights", 1.0))).max(initial=0.0)
            unit = unit + v * largest(mixture["values"]).sum(0)
        return 4.0 * ULP * np.where(np.isfinite(unit), unit, 0.0)


def _check_invariants(
    log_p: torch.Tensor, drawn: Any, draw: Any, compare: bool, unit: Array
) -> None:
    rows = log_p.isnan()
    assert torch.equal(rows.any(1), rows.all(1)), "NaN inside a row"
    invalid = rows.any(1)
    vocab = log_p.shape[1]
    assert ((drawn.tokens >= 0) & (drawn.tokens < vocab)).all(), drawn.tokens
    bad = ~drawn.valid
    assert (drawn.tokens[bad] == 0).all() and drawn.logprobs[bad].isnan().all()
    assert drawn.model_logprobs[bad].isnan().all() and drawn.proposal_logprobs[bad].isnan().all()
    proposal = drawn.proposal_logprobs[drawn.valid]
    assert (proposal.isfinite() & (proposal <= 0.0)).all(), proposal
    assert bad[invalid].all(), "a token from a row without log-probabilities"
    assert drawn.logprobs[drawn.valid].isfinite().all(), drawn.logprobs
    mask, bias = draw["mask"], draw["bias"]
    if bias is not None:
        readable = (bias < math.inf).all(1)
        assert bad[~readable].all(), "a token from a bias with NaN or +inf"
    for b in torch.nonzero(drawn.valid).flatten().tolist():
        token = drawn.tokens[b].item()
        if bias is not None:
            assert bias[b, token] > -math.inf, f"row {b}: the bias excludes token {token}"
        assert log_p[b, token] > -math.inf, f"row {b}: token {token} is off the support"
        if mask is not None:
            allowed = reference.unpack_mask(mask[b], vocab)
            assert allowed[token], f"row {b}: token {token} is masked"
        if compare:
            near = 1e-4 + 1e-5 * abs(log_p[b, token].item()) + unit[b]
            got, expected = drawn.logprobs[b].item(), log_p[b, token].item()
            assert abs(got - expected) <= near, f"row {b}: logprob {got}, log_probs {expected}"
    if compare:
        sums = np.exp(reference.to_float64(log_p[~invalid])).sum(1)
        error = np.abs(sums - 1.0) - 2.0 * unit[~invalid.numpy()]
        assert error.max(initial=0.0) <= 1e-5, f"sums to one within {error.max():.3g} only"


def _compare_log_probs(args: Any, mixture: Any, got: Any, other: Any) -> Counter[str]:
    """Per row: equal to torch's, or else as good as the oracle's conditioning allows, or as
    torch's."""
    events: Counter[str] = Counter()
    x, y = reference.to_float64(got), reference.to_float64(other)
    for b in range(len(x)):
        events["rows"] += 1
        if np.isnan(x[b]).any() and np.isnan(y[b]).any():
            events["invalid rows"] += 1
            continue
        if not np.isnan(x[b] + y[b]).any() and _distance(x[b], y[b]) <= 1.0:
            continue
        events["rows judged by the oracle"] += 1
        _judge(args, mixture, b, x[b], y[b])
    return events


def _distance(x: Array, y: Array) -> float:
    """How far log-probabilities are apart, in units of what is tolerated; inf: other support."""
    if ((x == -np.inf) != (y == -np.inf)).any():
        return math.inf
    at = y > -1e6  # JSD of the C++ backend tells apart down to -9e6
    tv = 0.5 * np.abs(np.exp(x) - np.exp(y)).sum()
    pointwise = np.abs(x[at] - y[at]) / (1e-3 + 1e-4 * np.abs(y[at]))
    return max(tv / MAX_TV, pointwise.max(initial=0.0))


def _judge(args: Any, mixture: Any, b: int, got: Array, other: Array, backend: str = "cpu") -> None:
    """`got` against the oracle on the inputs and on inputs perturbed by their rounding."""
    expected = [_oracle(args, mixture, b, n) for n in range(7)]
    valid = [not np.isnan(e).any() for e in expected]
    if np.isnan(got).any():
        assert not all(valid), f"row {b} is invalid on the {backend} backend alone"
        return
    assert any(valid), f"row {b} is valid on the {backend} backend alone"
    expected = [e for e, ok in zip(expected, valid, strict=True) if ok]
    first, rest = expected[0], expected[1:]
    # A token at the border of the support may be in or out.
    border = np.zeros(len(first), dtype=bool)
    for e in rest:
        border |= (e == -np.inf) != (first == -np.inf)
    border |= _near_floor(args, mixture, b)
    keep = ~border
    same = (got == -np.inf) == (first == -np.inf)
    assert same[keep].all(), f"row {b}, {backend}: other support"
    moved = max([_distance(e[keep], first[keep]) for e in rest], default=0.0)
    far, torch_far = (_distance(x[keep], first[keep]) for x in (got, other))
    assert far <= 1.0 + 8.0 * moved, (
        f"row {b}, {backend}: {far:.3g} tolerances from the oracle, other {torch_far:.3g}, "
        f"the oracle itself moves by {moved:.3g}"
    )


def _near_floor(args: Any, mixture: Any, b: int) -> Array:
    """Tokens whose log pi_ref is within rounding of the -80 at which they leave the support."""
    ref, vocab = args[0], mixture["vocab_size"]
    if ref is None or mixture["divergence"] == "reverse_kl":
        return np.zeros(vocab, dtype=bool)
    row = reference.to_float64(ref[b, :vocab]) * mixture.get("logit_scales", [1.0])[0]
    with np.errstate(invalid="ignore"):
        lr = reference.log_softmax(row)
        largest = np.where(np.isfinite(row), np.abs(row), 0.0).max()
        return np.abs(lr + 80.0) <= 1e-4 + 4.0 * ULP * largest


def _oracle(args: Any, mixture: Any, b: int, n: int) -> Array:
    """The oracle's row b; for n > 0 with every input moved by up to one unit in the last place of
    the largest of its row."""
    rng = np.random.default_rng(n)

    def moved(x: Any) -> Array:
        x = reference.to_float64(x).copy()
        if n:
            size = np.where(np.isfinite(x), np.abs(x), 0.0).max(-1, initial=0.0, keepdims=True)
            x += ULP * size * rng.uniform(-1.0, 1.0, size=x.shape)
        return x

    def scaled(x: Any) -> Array:
        x = reference.to_float64(x)
        return x * (1.0 + ULP * rng.uniform(-1.0, 1.0, size=x.shape)) if n else x

    ref, policies, weights = args
    vocab = mixture["vocab_size"]
    row: dict[str, Any] = dict(mixture)
    for name in ("value_ids", "prefix_logprobs", "mixture_prefix_logprobs", "plausibility"):
        if name in row:
            row[name] = _of_row(row[name], b)
    for name, x in (("weights", weights), ("value_weights", row.get("value_weights"))):
        if x is not None:
            x = reference.to_float64(x)
            row[name] = scaled(x[b] if x.ndim == 2 else x)
    if "values" in row:
        row["values"] = moved(row["values"][:, b])
    logits = [None if ref is None else moved(ref[b, :vocab])]
    logits += [moved(x[b, :vocab]) for x in policies]
    if n and row["divergence"] != "reverse_kl":
        # One error for all tokens, as a rounded normaliser makes, or one for each.
        size = vocab if n % 2 else 1
        _tilt(row, ULP * rng.uniform(-1.0, 1.0, size=size) * _summands(logits, row))
    with np.errstate(all="ignore"):
        return reference.log_probs_row(logits[0], logits[1:], **row)


def _summands(logits: list[Array], row: dict[str, Any]) -> Array:
    """[V]: what Q = sum w_i q_i(d_i) inherits of rounding, in units in the last place: |w_i q_i|
    itself, and how far q_i moves when d_i = log pi_i + prefix_i - log pi_ref - prefix_ref is off by
    the rounding of its terms. Perturbed logits show neither: log-ratios below -80 are all clamped
    to the same, and small logits may have large log-softmaxes and prefixes."""
    scales = row.get("logit_scales", [1.0] * len(logits))
    own_mass = "mixture_prefix_logprobs" in row
    slope, floor = reference.slope_of(row["divergence"], own_mass), reference.LOG_RATIO_FLOOR
    total = np.zeros(len(logits[0]))
    with np.errstate(all="ignore"):
        ref, *policies = (reference.log_softmax(x * s) for x, s in zip(logits, scales, strict=True))
        shift = np.zeros(len(logits))
        if "prefix_logprobs" in row:
            prefix = reference.to_float64(row["prefix_logprobs"])
            shift = prefix - prefix[0]
            if own_mass:
                shift, floor = shift.astype(np.longdouble), -np.inf
            else:
                shift = np.maximum(shift, reference.PREFIX_FLOOR)
        for weight, policy, extra in zip(row["weights"], policies, shift[1:], strict=True):
            d = np.maximum(policy - ref + extra, floor)
            terms = np.abs(policy) + np.abs(ref) + abs(extra)
            drift = slope.slope(d - ULP * terms) - slope.slope(d)
            total += np.abs(weight) * (np.abs(slope.slope(d)) + np.abs(drift) / ULP)
    return np.where(np.isfinite(total), total, 0.0)


def _tilt(row: dict[str, Any], tilt: Array) -> None:
    """Add a value tensor of weight 1 to the oracle's arguments."""
    if "value_ids" in row:
        ids = np.clip(reference.to_float64(row["value_ids"]), 0, len(tilt) - 1)
        tilt = tilt[ids.astype(np.int64)]
    values = row.get("values", np.zeros((0, len(tilt))))
    v = row.get("value_weights")
    v = np.ones(len(values)) if v is None else v
    row["values"], row["value_weights"] = np.vstack([values, tilt]), np.append(v, 1.0)


def _compare_draws(
    args: Any, mixture: Any, draw: Any, log_p: Any, log_p_torch: Any, got: Any, other: Any
) -> Counter[str]:
    events: Counter[str] = Counter()
    both_rows = ~(log_p.isnan().any(1) | log_p_torch.isnan().any(1))  # the rest has been judged
    seeds, positions = _row_noise(args, draw)
    x, y = reference.to_float64(log_p), reference.to_float64(log_p_torch)
    for b in torch.nonzero(both_rows).flatten().tolist():
        assert got.valid[b] == other.valid[b], f"row {b}: valid is {got.valid[b].item()}"
        if not got.valid[b]:
            continue
        events["tokens"] += 1
        if got.tokens[b] != other.tokens[b]:
            events["other tokens"] += 1
            token, noise = got.tokens[b].item(), (seeds[b], positions[b])
            filters = {name: _of_row(draw[name], b) for name in DRAW_FILTERS}
            at = np.isfinite(x[b]) & np.isfinite(y[b])
            slack = 1e-4 + 4.0 * np.abs(x[b] - y[b])[at].max(initial=0.0)
            if filters["bias"] is not None:  # the biased keys, too, are rounded, from the largest
                slack += 8.0 * ULP * np.ptp(x[b][at]) if at.any() else 0.0
            assert _could_win(token, [x[b], y[b]], filters, noise, slack), (
                f"row {b}: token {token}, torch draws {other.tokens[b].item()}"
            )
            continue
        unit = 1e-3 + 4.0 * ULP * _largest(args, mixture, b)
        for i, p in enumerate(got.model_logprobs[b].tolist()):
            q = other.model_logprobs[b, i].item()
            same = (math.isnan(p) and math.isnan(q)) or p == q or abs(p - q) <= unit
            assert same or _is_broken(args, mixture, b, i), f"row {b}: model {i}: {p}, torch {q}"
    return events


def _models(args: Any) -> list[torch.Tensor]:
    ref, policies, _ = args
    return [*([] if ref is None else [ref]), *policies]


def _largest(args: Any, mixture: Any, b: int) -> float:
    scale = max(mixture.get("logit_scales", [1.0]))
    rows = [reference.to_float64(x[b, : mixture["vocab_size"]]) for x in _models(args)]
    return scale * max(np.abs(row[np.isfinite(row)]).max(initial=0.0) for row in rows)


def _is_broken(args: Any, mixture: Any, b: int, model: int) -> bool:
    """Whether a tensor of weight 0 holds what has no softmax."""
    row = _models(args)[model][b, : mixture["vocab_size"]]
    return bool(row.isnan().any() or (row == math.inf).any())


def _row_noise(args: Any, draw: Any) -> tuple[list[int], list[int]]:
    count = len(_models(args)[0])
    seed, position = draw["seed"], draw["position"]
    if isinstance(seed, torch.Tensor):
        return seed.tolist(), position.tolist()
    return reference.row_seeds(seed, count), [position] * count


def _of_row(x: Any, b: int) -> Any:
    if isinstance(x, torch.Tensor):
        return x[b] if x.dim() > 1 else x[b].item()
    return x[b] if isinstance(x, list) else x


def _could_win(
    token: int, log_ps: list[Array], filters: dict[str, Any], noise: Any, slack: float
) -> bool:
    """Whether `token` wins, or almost, under one of the two distributions when the cuts of the
    filters are moved by rounding."""
    temperature = float(np.float32(filters["temperature"]))
    for log_p in log_ps:
        if temperature == 0.0:
            final = reference.filtered_log_probs(log_p, mask=filters["mask"], bias=filters["bias"])
            if final[token] >= final.max() - slack - 1e-6 * abs(final.max()):
                return True
            continue
        for change in (0.0, 1e-5, -1e-5):
            moved = _moved_cuts(log_p, filters, change, slack)
            final = np.exp(reference.filtered_log_probs(log_p, **moved))
            if final[token] > 0.0 and _nearly_wins(token, final, noise, slack / temperature):
                return True
    return False


def _moved_cuts(log_p: Array, filters: dict[str, Any], change: float, slack: float) -> Any:
    """The filters with each cut a little lower (change > 0), or higher."""
    moved = dict(filters)
    if change:
        moved["top_p"] = min(1.0, filters["top_p"] * (1.0 + change))
        moved["min_p"] = min(1.0, filters["min_p"] * (1.0 - change))
        top_k = int(filters["top_k"])
        if top_k:
            given = {name: filters[name] for name in ("mask", "bias")}
            allowed = reference.filtered_log_probs(log_p, **given)
            kth = np.sort(allowed)[-min(top_k, len(log_p))]
            cut = kth - math.copysign(slack, change) if np.isfinite(kth) else kth
            moved["top_k"] = max(1, int((allowed >= cut).sum()))
    return moved


def _nearly_wins(token: int, final: Array, noise: tuple[int, int], slack: float) -> bool:
    """Whether the token's tile and then the token arrive first, or later by a factor 1 + slack."""
    tile, width = token // reference.TILE, reference.TILE
    tile_times, _ = reference.arrivals(final, *noise)
    if tile_times[tile] > tile_times.min() * (1.0 + slack):
        return False
    ids = np.arange(tile * width, min((tile + 1) * width, len(final)))
    with np.errstate(divide="ignore"):
        times = reference.exponentials(noise[0], noise[1], ids, stream=1) / final[ids]
    return bool(times[token - tile * width] <= times.min() * (1.0 + slack))
