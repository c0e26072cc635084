"""The public functions `sample` and `log_probs`: they check, choose a backend and call its op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call.checks import check_draw, check_mixture
from .call.outputs import Sample, as_sample, check_log_probs_out, new_log_probs
from .dispatch import registration, vocabulary_parallel
from .dispatch.backends import backends, choose
from .dispatch.packing import pack
from .dispatch.tracing import draw_without_symbols, mixture_without_symbols
from .dispatch.workspace import (
    check_memory,
    check_workspace,
    reset_workspace,
    workspace_size,
)
from .divergence import Divergence

__all__ = ["Sample", "backends", "log_probs", "reset_workspace", "sample", "workspace_size"]


def log_probs(
    ref_logits: Tensor | None,
    policy_logits: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None,
    *,
    divergence: str | Divergence = "reverse_kl",
    normalizer: str = "exact",
    values: Tensor | None = None,
    value_ids: Tensor | None = None,
    value_weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
    prefix_logprobs: Tensor | None = None,
    mixture_prefix_logprobs: Tensor | None = None,
    logit_scales: Sequence[float] | None = None,
    vocab_size: int | None = None,
    plausibility: float | Sequence[float] | Tensor | None = None,
    plausibility_tensor: int = 0,
    backend: str | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """log pi*, the log-probabilities of the mixture.

    The arguments are those of `sample`, but `out` is a contiguous float32 [B, V].

    Returns:
        float32 [B, V] in nats, which is `out` where that is given: -inf for excluded tokens, NaN
        throughout an invalid row. With `group` the columns of this rank, -inf for padding.

    Raises:
        ValueError: wrong shapes, devices, names, or numbers out of range.
        TypeError: wrong types or dtypes.
    """
    if group is not None:
        return vocabulary_parallel.log_probs(**locals())
    mixing = check_mixture(
        ref_logits,
        policy_logits,
        weights,
        divergence,
        normalizer,
        values,
        value_ids,
        value_weights,
        prefix_logprobs,
        mixture_prefix_logprobs,
        logit_scales,
        vocab_size,
        plausibility,
        plausibility_tensor,
    )
    if torch.compiler.is_compiling():
        mixing = mixture_without_symbols(mixing)
    name = choose(backend, mixing.batch_tensor().device, mixing.divergence)
    if out is None and workspace is None:
        return registration.log_probs[name](*pack(mixing))
    if workspace is not None:
        workspace = check_workspace(mixing, False, workspace)
    result = new_log_probs(mixing) if out is None else check_log_probs_out(mixing, out)
    registration.log_probs_out[name](*pack(mixing), result, workspace)
    return result if out is None else out


def sample(
    ref_logits: Tensor | None,
    policy_logits: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None,
    *,
    divergence: str | Divergence = "reverse_kl",
    normalizer: str = "exact",
    values: Tensor | None = None,
    value_ids: Tensor | None = None,
    value_weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
    prefix_logprobs: Tensor | None = None,
    mixture_prefix_logprobs: Tensor | None = None,
    logit_scales: Sequence[float] | None = None,
    vocab_size: int | None = None,
    plausibility: float | Sequence[float] | Tensor | None = None,
    plausibility_tensor: int = 0,
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_k: int | Sequence[int] | Tensor | None = None,
    top_p: float | Sequence[float] | Tensor | None = None,
    min_p: float | Sequence[float] | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    bias_ids: Tensor | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    position: int | Sequence[int] | Tensor = 0,
    return_model_logprobs: bool = False,
    return_proposal_logprobs: bool = False,
    backend: str | None = None,
    out: Sample | None = None,
    workspace: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Sample:
    """Draw the next token of each row from the multi-objective policy (MOD, arXiv 2406.18853, eq.
    6).

        u(s)   = sum_i w_i f'(pi_i(s) / pi_ref(s)) + sum_j v_j V_j(s)
        pi*(s) = pi_ref(s) (f')^-1(u(s) - Z),      Z such that sum_s pi*(s) = 1

    Then mask, bias, temperature, top-k, top-p and min-p apply in this order; each renormalises
    before the next. No gradient flows: inputs are detached. There are B rows, M policies (at most
    8), V = `vocab_size` token ids and J value tensors. Numbers and lists of numbers may be NumPy's.
    An argument that is scalar or [B], except the seed, may be a tensor [] too, which all rows
    share.

    Args:
        ref_logits: [B, V0] float32, float16 or bfloat16, contiguous in the last dimension. None
            (reverse KL only) leaves the reference out: pi* is proportional to prod pi_i^w_i.
        policy_logits: M tensors [B, V_i], or one tensor [M, B, V]; dtypes may differ. Empty with
            `values`: pure value guidance.
        weights: [M] or [B, M], any sign and sum: list (finite) or float32/float64 tensor. A tensor
            of weight 0 is ignored.
        divergence: name or `Divergence`: reverse_kl, forward_kl, jsd, alpha:A, jeffrey, or a
            registered one. A subclass of these has to be registered itself.
        normalizer: "exact" solves Z; "zero" is eq. 6 as printed, Z = 0 and rescaled to sum to one.
            Off reverse KL the two may differ even in their most likely token; a row for which Z = 0
            has no inverse is invalid.
        values: [J, B, V] scores V_j, or [J, B, K] with `value_ids`; -inf excludes a token. Added
            before Z is solved.
        value_ids: int64 [B, K], unique in a row, -1 for padding: the candidates; every other token
            is excluded.
        value_weights: v, [J] or [B, J]; None means ones.
        prefix_logprobs: float32 or float64 [B, M+1], log-probability in nats of the response so far
            under each model, reference first. Without it the formula sees one token only; reverse
            KL does not depend on it. Z still normalises to the reference's mass of the response,
            which at weights [1, 0] is not the policy itself: give the mixture's, too, or take
            normalizer="zero" on simplex weights.
        mixture_prefix_logprobs: float32 or float64 [B], log pi* in nats of the response so far: the
            sum of this op's own log pi* of its tokens. With prefix_logprobs, the exact normaliser
            and a built-in divergence, Z then normalises to the mixture's own mass of the response,
            m = pi*(y_<t) / pi_ref(y_<t):

                f'(m pi*(s) / pi_ref(s)) = u(s) - Z,    u of the ratios of whole responses
        logit_scales: M+1 positive numbers; each tensor is multiplied by its own before its softmax.
        vocab_size: V; None means the narrowest tensor's width. Further columns are never looked at.
        plausibility: p in [0, 1], scalar or [B]: tokens less likely than p times the most likely
            token of `plausibility_tensor` are excluded; None or 0 is off.
        plausibility_tensor: 0 for the reference, i for policy i.
        temperature: >= 0, scalar or [B]; 0 takes the most likely token, the lowest id among equals.
        top_k: scalar or [B]; keeps the k most likely and what ties with the last of them; None or 0
            is off.
        top_p: in (0, 1], scalar or [B]; keeps the fewest tokens of at least that mass and what ties
            with the last of them.
        min_p: in [0, 1], scalar or [B]; drops tokens less likely than min_p times the most likely
            one.
        mask: bool [B, V], True = allowed, or packed int32 [B, ceil(V/32)], bit s % 32 of word s //
            32.
        bias: float32, float16 or bfloat16 [B, V], or [V] for all rows, contiguous in the last
            dimension: added to log pi*, in nats, for penalties and logit biases. It acts after Z
            and changes neither pi* nor `logprobs`. -inf excludes a token; no bias brings back a
            token that is excluded.
        bias_ids: int64 of the shape of `bias`, which is [B, K] or [K] then: the tokens that it is
            for, unique in a row, -1 for padding. Other tokens have a bias of 0.
        seed: an int (row b uses SplitMix64(seed + b)), int64 [B] (one each, independent of the
            batch), or None (drawn with torch.randint on the device).
        position: tokens of the response before this one, int or int64 [B]; equal (seed, position)
            draws equal noise.
        return_model_logprobs: also return each model's log-probability of the token.
        return_proposal_logprobs: also return the log of the probability with which the token was
            drawn, after mask, bias, temperature and filters: what importance weights divide by.
        backend: None for the fastest available; see `backends`.
        out: a `Sample` that the call fills and returns. Its tensors are contiguous, of the result's
            shapes and dtypes, on the logits' device, and share no memory with other arguments.
            `out.model_logprobs` and `out.proposal_logprobs` are None exactly if they are not asked
            for. None allocates a `Sample`.
        workspace: uint8 vector of at least `workspace_size(B, V, M)` bytes on the logits' device,
            aligned to 16 bytes. Its owner zeroes it once (`torch.zeros`). Every call leaves the
            zeros that the next one needs, whatever its shapes. Pass the same tensor each time, not
            another part of it. Launches that may overlap need two: one workspace per stream. If it
            was not zero, or a launch on it was stopped, no call waits for ever: the rows are
            invalid until `reset_workspace`. None allocates one for each call. The torch and cpu
            backends use no workspace and leave it as it is. A call on a GPU allocates nothing, and
            can be captured in a CUDA graph, when it is given `out`, `workspace`, and tensors or
            single numbers for everything that goes by row (weights for all rows may be a list).
            `bias_ids` allocates even then, and so do seed=None, which draws seeds, and lists per
            row, which are copied to the device. A list per row is refused while a graph is
            captured.
        group: a torch.distributed process group whose ranks hold the vocabulary in shards; None:
            all of it is here. Each rank passes its own columns of all logits, in the order of the
            ranks, and the same columns of dense `values`, `mask` (packed from its first column on)
            and `bias`; all else is the same on all ranks, ids count from the first rank's first
            column, and V is `vocab_size` or the columns of all ranks. Ids from V on are padding.
            Shards may have any widths. It runs on the torch backend, and not inside a graph (CUDA's
            or torch.compile's). Every rank returns the same `Sample`.

    Returns:
        `Sample`, which is `out` where that is given. A row is invalid if a tensor that counts holds
        NaN or +inf, if an id is out of range or twice among `bias_ids`, if support, mask and bias
        leave no token, or if a parameter in a tensor is bad. An invalid row disturbs no other.

    Raises:
        ValueError: wrong shapes, devices, names, or numbers out of range.
        TypeError: wrong types or dtypes.
    """
    if group is not None:
        return vocabulary_parallel.sample(**locals())
    mixing = check_mixture(
        ref_logits,
        policy_logits,
        weights,
        divergence,
        normalizer,
        values,
        value_ids,
        value_weights,
        prefix_logprobs,
        mixture_prefix_logprobs,
        logit_scales,
        vocab_size,
        plausibility,
        plausibility_tensor,
    )
    drawing = check_draw(
        mixing,
        temperature,
        top_k,
        top_p,
        min_p,
        mask,
        bias,
        bias_ids,
        seed,
        position,
        return_model_logprobs,
        return_proposal_logprobs,
    )
    if torch.compiler.is_compiling():
        mixing = mixture_without_symbols(mixing)
        drawing = draw_without_symbols(drawing, mixing.batch_tensor())
    name = choose(backend, mixing.batch_tensor().device, mixing.divergence)
    if out is None and workspace is None and not return_proposal_logprobs:
        outputs = *registration.sample[name](*pack(mixing, drawing)), None
    else:
        outputs, workspace = check_memory(mixing, drawing, out, workspace)
        registration.sample_out[name](*pack(mixing, drawing), *outputs, workspace)
    return as_sample(outputs, drawing) if out is None else out
