"""The door to debug a wrong token: how one row was solved and drawn, beside the oracle."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import reference
from .call.arguments import DrawArguments, MixtureArguments
from .call.checks import check_draw, check_mixture
from .call.fields import number
from .call.outputs import new_log_probs, new_outputs
from .dispatch import registration
from .dispatch.backends import choose
from .dispatch.packing import pack
from .divergence import ReverseKL, is_built_in
from .explained_draw import (
    Contest,
    Filter,
    drawn,
    oracle_arrivals,
    oracle_kept,
    torch_arrivals,
    torch_kept,
)
from .torch_kernels import philox
from .torch_kernels.mixture import (
    dense_values,
    mix,
    normal,
    prefix_differences,
)
from .torch_kernels.normalizer import bracket
from .torch_kernels.parameters import row_vector
from .torch_kernels.vocabulary import Vocabulary


class Explanation(NamedTuple):
    """One row by name, in nats. What a row has not is None: an invalid row has no numbers, reverse
    KL neither tau nor Z, temperature 0 no race. See `explain`."""

    backend: str
    valid: bool
    reason: str | None = None  # why the oracle finds the row invalid
    norms: tuple[float, ...] | None = None  # log-sum-exp of each model's scaled logits
    shifts: tuple[float, ...] | None = None  # prefix_i - prefix_ref of each policy, as used
    tau: float | None = None
    lower: float | None = None  # the bracket that the search began with
    upper: float | None = None
    evaluations: int | None = None  # of G
    z: float | None = None
    log_ratios: tuple[float, ...] | None = None  # d of the token, by policy
    deficits: tuple[float, ...] | None = None  # q(d) of the token, by policy
    total_deficit: float | None = None  # Q of the token
    least_deficit: float | None = None  # min Q
    excess_deficit: float | None = None  # D = Q - min Q of the token
    normalizer: float | None = None  # log of the sum that was divided by at the end
    filters: dict[str, Filter] | None = None  # mask, top_k, top_p, min_p: those that are on
    tile: Contest | None = None
    race: Contest | None = None  # of the tokens of the winner tile
    winner: int | None = None  # the token that filters and race lead to
    token: int | None = None  # the token that was drawn
    bias: float | None = None  # of the winner
    logprob: float | None = None  # log pi* of the token, before bias, temperature and filters
    proposal_logprob: float | None = None  # the same after them
    oracle: Explanation | None = None

    def __str__(self) -> str:
        """One table: what, this backend, the oracle."""
        rows = [("what", self.backend, "oracle")]
        mine, other = _lines(self), {} if self.oracle is None else _lines(self.oracle)
        rows += [(name, mine.get(name, "-"), other.get(name, "-")) for name in {**mine, **other}]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _lines(explanation: Explanation) -> dict[str, str]:
    """The fields that are not None as text, a number a line."""
    lines: dict[str, str] = {}

    def add(name: str, x: Any) -> None:
        if x is None:
            return
        if isinstance(x, dict):
            for key, entry in x.items():
                add(key, entry)
        elif hasattr(x, "_asdict"):
            for key, entry in x._asdict().items():
                add(f"{name} {key.replace('_', ' ')}", entry)
        elif isinstance(x, tuple):
            for i, entry in enumerate(x):
                add(f"{name}[{i}]", entry)
        else:
            lines[name] = f"{x:.9g}" if isinstance(x, float) else str(x)

    for name, x in explanation._asdict().items():
        if name not in ("backend", "oracle"):
            add(name.replace("_", " "), x)
    return lines


def explain(
    ref_logits: Tensor | None,
    policy_logits: Any,
    weights: Any,
    *,
    divergence: Any = "reverse_kl",
    normalizer: str = "exact",
    values: Tensor | None = None,
    value_ids: Tensor | None = None,
    value_weights: Any = None,
    prefix_logprobs: Tensor | None = None,
    mixture_prefix_logprobs: Tensor | None = None,
    logit_scales: Any = None,
    vocab_size: int | None = None,
    plausibility: Any = None,
    plausibility_tensor: int = 0,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    bias_ids: Tensor | None = None,
    seed: Any = None,
    position: Any = 0,
    backend: str | None = None,
    row: int = 0,
) -> Explanation:
    """How one row of `mod_fused.sample` was solved and drawn, beside the float64 oracle.

    Arguments as in `sample`, and `row`, which row of the batch. For debugging: it runs the backend
    on the whole batch, copies the row to the CPU and waits for the device.

    `token`, `logprob`, `valid`, the models' norms and log pi* are the backend's own. tau, its
    bracket, Z and the deficits follow from these by the formulas of the divergence. The torch
    backend also hands out its own tau, min Q, bracket, evaluations and normaliser; triton, off
    reverse KL, its own norms, min Q, evaluations (without that of the deficits) and normaliser. The
    cpu backend hands out neither evaluations nor normaliser, which are None. One function computes
    thresholds and races from the log pi* of any backend: where its `winner` is not `token`, the
    backend's own filters or race differ.

    Returns:
        `Explanation`; its `oracle` is one more. `print` shows both in one table.

    Raises:
        ValueError: `row` outside [0, B), and as `sample`.
        TypeError: as `sample`.
    """
    mixing = check_mixture(
        ref_logits, policy_logits, weights, divergence, normalizer, values, value_ids,
        value_weights, prefix_logprobs, mixture_prefix_logprobs, logit_scales, vocab_size,
        plausibility, plausibility_tensor,
    )  # fmt: skip
    drawing = check_draw(
        mixing, temperature, top_k, top_p, min_p, mask, bias, bias_ids, seed, position, True, True
    )
    batch, row = mixing.batch_tensor().shape[0], number("row", row, int)
    if not 0 <= row < batch:
        raise ValueError(f"row must be in [0, {batch}), got {row}")
    name = choose(backend, mixing.batch_tensor().device, mixing.divergence)
    outputs = new_outputs(mixing, drawing)
    registration.sample_out[name](*pack(mixing, drawing), *outputs, None)
    log_pi = registration.log_probs[name](*pack(mixing))[row].cpu()
    token, logprob, valid, model_logprobs, proposal_logprob = (
        x[row].cpu() for x in outputs if x is not None
    )

    state = _triton_state(mixing, row) if name == "triton" and valid else {}
    mixing, drawing = _one_row(mixing, drawing, row, batch)
    # A registered divergence has no oracle.
    oracle = _of_oracle(mixing, drawing) if is_built_in(mixing.divergence) else None
    if not valid:
        reason = "a registered divergence has no oracle" if oracle is None else oracle.reason
        return Explanation(name, False, reason, oracle=oracle)
    fields = _solved(mixing, log_pi.double(), model_logprobs.double(), int(token))
    fields |= _recorded(mixing) if name == "torch" else state
    fields |= drawn(drawing, log_pi, torch_kept(drawing), torch_arrivals)
    fields["proposal_logprob"] = float(proposal_logprob)
    return Explanation(
        name, True, **fields, token=int(token), logprob=float(logprob), oracle=oracle
    )


def _one_row(
    mixing: MixtureArguments, drawing: DrawArguments, row: int, batch: int
) -> tuple[MixtureArguments, DrawArguments]:
    """The arguments of one row, on the CPU; the seed of the row expanded."""

    def cut(x: Any, batch_dim: int = 0) -> Any:
        return x.narrow(batch_dim, row, 1).cpu() if isinstance(x, Tensor) else x

    def weights(x: Any) -> Any:
        return x.cpu() if isinstance(x, Tensor) and x.dim() == 1 else cut(x)

    seed = drawing.seed
    if not isinstance(seed, Tensor):
        seed = philox.split_mix(seed, batch, torch.device("cpu"))
    one = mixing._replace(
        ref_logits=cut(mixing.ref_logits),
        policy_logits=[cut(x) for x in mixing.policy_logits],
        weights=weights(mixing.weights),
        values=cut(mixing.values, 1),
        value_ids=cut(mixing.value_ids),
        value_weights=weights(mixing.value_weights),
        prefix_logprobs=cut(mixing.prefix_logprobs),
        mixture_prefix_logprobs=cut(mixing.mixture_prefix_logprobs),
        plausibility=cut(mixing.plausibility),
    )
    return one, DrawArguments(*(cut(x) for x in drawing._replace(seed=seed)))


def _recorded(mixing: MixtureArguments) -> dict[str, Any]:
    """What the solver of the torch backend found on its way."""
    record: dict[str, Any] = {}
    mixture = mix(mixing, slice(0, 1), Vocabulary(mixing.vocab_size), record)
    fields: dict[str, Any] = {"normalizer": float(mixture.level.double() + mixture.log_norm)}
    if mixing.mixture_prefix_logprobs is not None and record:  # the rest has the row's scale
        return fields | {"evaluations": record["evaluations"]}
    if record:
        fields |= {"tau": float(record["tau"]), "least_deficit": float(record["least"])}
    if "lower" in record:
        fields |= {"lower": float(record["lower"]), "upper": float(record["upper"])}
        fields["evaluations"] = record["evaluations"]
    return fields


def _triton_state(mixing: MixtureArguments, row: int) -> dict[str, Any]:
    """What a launch of the Triton kernel leaves of a row in its workspace."""
    if type(mixing.divergence) is ReverseKL:
        return {}
    from .triton_kernels import workspace as fields  # triton may be absent

    batch, vocab, models = (
        mixing.batch_tensor().shape[0],
        mixing.vocab_size,
        mixing.model_count(),
    )
    out = new_log_probs(mixing)
    size = fields.workspace_bytes(batch, vocab, models, False)
    buffer = torch.zeros(size, dtype=torch.uint8, device=out.device)
    registration.log_probs_out["triton"](*pack(mixing), out, buffer)
    states = fields.make_workspace(out, batch, vocab, models, False, buffer).states
    state = states.view(batch, -1)[row].tolist()
    found: dict[str, Any] = {}
    if mixing.normalizer == "exact":
        if mixing.mixture_prefix_logprobs is None:  # else it has the row's scale
            found["least_deficit"] = state[fields.LEAST.value]
        found["evaluations"] = int(state[fields.STEPS.value])
    level, log_norm = state[fields.LEVEL.value], state[fields.MIX_LOG_NORM.value]
    first = fields.LOG_NORM.value
    return found | {"normalizer": level + log_norm, "norms": tuple(state[first : first + models])}


def _solved(
    mixing: MixtureArguments, log_pi: Tensor, model_logprobs: Tensor, token: int
) -> dict[str, Any]:
    """Norms, tau, Z and the token's deficits out of a backend's log pi* [V] and the models'
    log-probabilities of its token [M + 1]."""
    scales = mixing.logit_scales or (1.0,) * mixing.model_count()
    rows = [
        (x[0, : mixing.vocab_size].float() * s).double()
        for x, s in zip(mixing.tensors(), scales, strict=True)
    ]
    # The peaks are taken off: beside a level of 1e17 float64 would lose the log-sums.
    peaks = torch.stack([x.max() for x in rows])
    rows = [x - peak for x, peak in zip(rows, peaks, strict=True)]
    norms = torch.stack([x[token] for x in rows]) - model_logprobs
    fields: dict[str, Any] = {"norms": tuple((norms + peaks).tolist())}
    kind, one, cpu = mixing.divergence, slice(0, 1), torch.device("cpu")
    if type(kind) is ReverseKL:
        return fields
    w = normal(row_vector(mixing.weights, one, cpu))
    shifts, functions = prefix_differences(mixing, one, w != 0)
    log_mass = 0.0
    if mixing.mixture_prefix_logprobs is not None and mixing.prefix_logprobs is not None:
        # What is shown has no scale of the row.
        prefix = mixing.prefix_logprobs.double()
        shifts = prefix[:, 1:] - prefix[:, :1]
        log_mass = float(mixing.mixture_prefix_logprobs) - float(prefix[0, 0])
        d = model_logprobs[1:] - model_logprobs[0] + shifts[0]
    else:
        d = (model_logprobs[1:] - model_logprobs[0] + shifts[0]).float().double()
        d = torch.maximum(d, functions.least_log_ratio)
    q = kind.deficit(d)
    total = torch.where(w[0] == 0, 0.0, w[0] * q).sum()
    if mixing.values is not None:
        v = normal(row_vector(mixing.value_weights, one, cpu))[0]
        dense, *_ = dense_values(mixing, one, Vocabulary(mixing.vocab_size))
        scores = torch.stack([x.flatten()[token] for x in dense]).double()
        total = total - torch.where(v == 0, 0.0, v * scores).sum()

    offset = kind.supremum * (1.0 - w.sum())
    ratio = (log_pi - (rows[0] - norms[0]))[log_pi > -torch.inf]
    at_token = log_pi[token] - model_logprobs[0]
    log_sum = torch.tensor(log_mass, dtype=torch.float64)
    if mixing.normalizer == "zero":  # rescaled: log pi* = lr + log H(Q + offset) - log_sum
        log_sum = kind.log_ratio(total + offset) - at_token
    each = kind.deficit(ratio + log_sum)  # tau + D of each token
    tau, best = each.min(0)
    excess = kind.deficit(at_token + log_sum) - tau
    least = total - excess
    ends: dict[str, Any] = {}
    if mixing.normalizer == "exact":
        log_ref = (rows[0] - norms[0])[log_pi > -torch.inf]
        log_ref = log_ref - log_mass
        rest = (each - tau)[None, None]
        lower, upper = bracket(kind, log_ref[None, None], rest, log_ref[best][None])
        ends = {"lower": float(lower), "upper": float(upper)}
    return (
        fields
        | ends
        | {
            "shifts": tuple(shifts[0].tolist()),
            "tau": float(tau),
            "z": float(tau - least - offset),
            "log_ratios": tuple(d.tolist()),
            "deficits": tuple(q.tolist()),
            "total_deficit": float(total),
            "least_deficit": float(least),
            "excess_deficit": float(excess),
            "normalizer": float(log_sum) if mixing.normalizer == "zero" else None,
        }
    )


def _of_oracle(mixing: MixtureArguments, drawing: DrawArguments) -> Explanation:
    """The same row by the oracle."""
    solution: dict[str, Any] = {}

    def row(x: Any) -> Any:
        return x[0] if isinstance(x, Tensor) and x.dim() == 2 else x

    own_prefix = None
    if mixing.mixture_prefix_logprobs is not None:
        own_prefix = float(mixing.mixture_prefix_logprobs)
    log_pi = reference.log_probs_row(
        row(mixing.ref_logits), [row(x) for x in mixing.policy_logits], row(mixing.weights),
        divergence=mixing.divergence, normalizer=mixing.normalizer,
        values=None if mixing.values is None else mixing.values[:, 0],
        value_ids=row(mixing.value_ids),
        value_weights=None if mixing.values is None else row(mixing.value_weights),
        prefix_logprobs=row(mixing.prefix_logprobs),
        mixture_prefix_logprobs=own_prefix, logit_scales=mixing.logit_scales or None,
        vocab_size=mixing.vocab_size, plausibility=float(mixing.plausibility),
        plausibility_tensor=mixing.plausibility_tensor, solution=solution,
    )  # fmt: skip
    if "reason" in solution:
        return Explanation("oracle", False, solution["reason"])
    found = drawn(drawing, torch.from_numpy(log_pi), oracle_kept(drawing), oracle_arrivals)
    if not found:
        reason = "no token is left after mask and bias, or a parameter of the draw is out of range"
        return Explanation("oracle", False, reason)
    token = found["winner"]
    fields: dict[str, Any] = {"norms": tuple(solution["norms"].tolist())}
    fields["normalizer"] = float(solution["normalizer"])
    if "tau" in solution:
        at = int(np.searchsorted(solution["at"], token))
        policies = range(1, mixing.model_count())

        def of_token(each: dict[int, np.ndarray]) -> tuple[float, ...]:
            return tuple(float(each[k][at]) if k in each else float("nan") for k in policies)

        total, least = float(solution["deficit"][at]), solution["least"]
        fields |= {name: solution[name] for name in ("tau", "z")}
        if mixing.normalizer == "exact":
            fields |= {name: solution[name] for name in ("lower", "upper")}
        fields |= {
            "shifts": tuple(solution["shifts"].tolist()),
            "log_ratios": of_token(solution["log_ratios"]),
            "deficits": of_token(solution["deficits"]),
            "total_deficit": total,
            "least_deficit": least,
            "excess_deficit": total - least,
        }
    return Explanation("oracle", True, **fields, **found, token=token, logprob=float(log_pi[token]))
