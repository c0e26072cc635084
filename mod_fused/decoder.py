"""Text from several models at once: `generate` draws every token of a batch from pi*."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import check_shared
from .check_helpers import check_tensor
from .divergence import Divergence, get_divergence
from .ensemble import Ensemble
from .ops import sample
from .philox import continuation_seeds, split_mix
from .rows import placed, repeated
from .streaming import streaming
from .values import ValueFunction, ValueGuide, value_count, value_source

# Why a row ended, by code; a row still running when the tokens run out ended by length.
FINISH_REASONS = ("length", "eos", "stop", "invalid")
_RUNNING, _EOS, _STOP, _INVALID = range(4)


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns. T is the length of the longest response; with num_return_sequences
    B counts responses, those of one prompt next to each other.

    Attributes:
        sequences: int64 [B, n + T], the prompts of the first model, left-padded, then the
            responses.
        tokens: int64 [B, T], the responses alone, with pad_token_id behind their ends.
        lengths: int64 [B], tokens in each response, its end-of-sequence token included.
        finish_reasons: B strings: "eos", "stop" (a stop string), "length", or "invalid" (see
            valid).
        texts: B decoded responses without special tokens, a stop string included; None without a
            tokenizer.
        logprobs: float32 [B, T], log pi*(token), before temperature and filters. 0 behind the end
            of a response, so that a sum over T is the log-probability of the response.
        model_logprobs: float32 [B, T, M+1], log-probability of the token under each model (its
            logits times its scale), reference first; M columns without a reference. 0 behind the
            end. None unless asked for.
        valid: bool [B]. False: at some step the op had nothing to draw from (NaN logits, everything
            masked); the response ends before that step, whose log-probabilities are NaN.
    """

    sequences: Tensor
    tokens: Tensor
    lengths: Tensor
    finish_reasons: list[str]
    texts: list[str] | None
    logprobs: Tensor
    model_logprobs: Tensor | None
    valid: Tensor


# no_grad, not inference_mode: tensors made in inference mode could not enter a loss later.
@torch.no_grad()
def generate(
    ensemble: Ensemble,
    prompts: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    input_ids: Tensor | Sequence[Tensor] | None = None,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    divergence: str | Divergence = "reverse_kl",
    normalizer: str = "exact",
    sequence_history: bool = False,
    logit_scales: Sequence[float] | None = None,
    vocab_size: int | None = None,
    plausibility: float | None = None,
    plausibility_tensor: int = 0,
    value_fn: ValueFunction | ValueGuide | None = None,
    value_weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
    mask_fn: Callable[[int, Tensor], Tensor] | None = None,
    resample_fn: Callable[[int, Tensor, Tensor, Tensor], Tensor | None] | None = None,
    max_new_tokens: int = 20,
    num_return_sequences: int = 1,
    do_sample: bool = True,
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_k: int | Sequence[int] | Tensor | None = None,
    top_p: float | Sequence[float] | Tensor | None = None,
    min_p: float | Sequence[float] | Tensor | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    streamer: Any = None,
    use_cache: bool = True,
    return_model_logprobs: bool = True,
    backend: str | None = None,
) -> GenerateOutput:
    """Draw responses from the policy that is optimal for a weighted sum of objectives.

    At each step pi*(s) = pi_ref(s) (f')^-1(-Z + sum_i w_i f'(pi_i(s) / pi_ref(s))) (MOD, arXiv
    2406.18853), or its relatives of `mod_fused.sample`, which documents divergence, normalizer,
    logit_scales, vocab_size, plausibility, temperature, top_k, top_p, min_p and backend. weights,
    temperature, top_k, top_p, min_p and seed may differ from row to row. The models' own generation
    configs give end-of-sequence and padding ids, nothing else.

    Args:
        ensemble: the models; B rows are decoded together.
        prompts: one string, B strings for all models, or one list of B strings per model (no list
            for a reference that is None). Each model's tokenizer encodes its own.
        weights: [M] or [B, M].
        input_ids: instead of prompts: integer tensor [B, n] for all models, or a list with one per
            model.
        attention_mask: for input_ids, same form: 1 for tokens, 0 for padding, which stands on the
            left.
        sequence_history: weigh whole responses, not the next token alone: the log-ratio of the
            response so far is added to each token's. Changes nothing for reverse KL, where it
            cancels. With normalizer="zero" this is eq. 6 of the paper, and what to use with weights
            on the simplex: at weights [1, 0] pi* is then the first policy itself. With "exact", Z
            is solved for the next token anew at every step, so that off reverse KL pi* at [1, 0] is
            not that policy, and long responses may drift far from the reference. (Without history
            "exact" gives the policy, too.)
        value_fn: `value_fn(step, sequences)` returns values [J, B, V], or (values [J, B, K],
            value_ids [B, K]); sequences int64 [B, n + step] are the first model's prompts and the
            responses so far. Or a `mod_fused.guidance.Guidance`: trained scorers with their caches,
            which read the first model's prompts (or any other `mod_fused.values.ValueGuide`).
        value_weights: [J] or [B, J], for value_fn.
        mask_fn: `mask_fn(step, sequences)` returns the tokens allowed next: bool [B, V], or packed
            int32 [B, ceil(V/32)].
        resample_fn: `resample_fn(step, sequences, lengths, reasons)`, called after each step, with
            sequences int64 [B, n + step + 1], lengths int64 [B] of the responses, and reasons int64
            [B], indices into FINISH_REASONS, 0 for rows that go on. It returns the rows to go on
            with, int64 [B], any of them any number of times, or None for all of them. Seeds and
            other parameters stay in their places. See `mod_fused.guidance.blockwise_best_of_k`.
        max_new_tokens: the most tokens to draw per row.
        num_return_sequences: K responses to each prompt, which is read once: B K rows, response k
            to prompt b in row b K + k. Parameters have one entry per prompt, functions are given
            all rows. Response 0 has the prompt's seed, response k SplitMix64(SplitMix64(seed) + k).
        do_sample: False is temperature 0, the most likely token of pi*.
        seed: int, or one int64 per row (list or tensor), or None for seeds from torch's generator.
            With one per row, a row's tokens depend on its own seed and prompt, not on its place or
            its company.
        eos_token_id: id or ids that end a row; None: those of all models; an empty list: none.
        pad_token_id: what follows an ended row; None: the tokenizer's, else an end-of-sequence id.
        stop_strings: end a row when its decoded response holds one of them. Needs a tokenizer.
        streamer: `streamer(step, tokens)`, called after each step with the tokens int64 [B] on the
            CPU (pad_token_id for ended rows); or a transformers streamer, for one row.
        use_cache: False recomputes the whole sequence at each step: for models without a KV cache.
        return_model_logprobs: return log pi_ref and log pi_i of each token.

    Returns:
        GenerateOutput. One host synchronisation per step tells whether all rows have ended. (In a
        batch with padding transformers adds its own, for its attention masks.)

    Raises:
        TypeError, ValueError: before any model runs, for arguments that do not fit; see
            `mod_fused.sample`. (What depends on the width of a plain callable's logits: after its
            first call.) TypeError for several responses or resample_fn with a callable that keeps
            its own state, which cannot be copied: pass use_cache=False.
    """
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"ensemble must be a mod_fused.Ensemble, got {type(ensemble).__name__}")
    check_shared({**ensemble.places, **getattr(value_fn, "places", {})})
    max_new_tokens = _count("max_new_tokens", max_new_tokens, 1)
    copies = _count("num_return_sequences", num_return_sequences, 1)
    stops = _stop_strings(stop_strings, ensemble.tokenizer)
    eos_ids = _eos_ids(eos_token_id, ensemble)
    pad = ensemble.pad_token_id if pad_token_id is None else pad_token_id
    pad = _count("pad_token_id", pad, 0, ensemble.vocab_size)
    _check_vocab_size(vocab_size, ensemble)
    if value_fn is None and value_weights is not None:
        raise ValueError("value_weights were given without value_fn")
    if resample_fn is not None and streamer is not None:
        raise ValueError("a streamer cannot take back the tokens that resample_fn drops")

    ids, masks = ensemble.encode(
        prompts, input_ids=input_ids, attention_mask=attention_mask, pad_token_id=pad
    )
    batch, width, device = *ids[0].shape, ids[0].device
    stream = streaming(streamer, batch * copies)
    if seed is None:
        # Once, not per step: position tells the steps apart.
        seed = torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device=device)
    options: dict[str, Any] = {
        "weights": weights,
        "value_weights": value_weights,
        "divergence": divergence,
        "normalizer": normalizer,
        "logit_scales": logit_scales,
        "plausibility": plausibility,
        "plausibility_tensor": plausibility_tensor,
        "temperature": temperature if do_sample else 0.0,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "backend": backend,
    }
    _rehearse(ensemble, batch, device, options, value_count(value_fn, value_weights))
    options = {name: placed(name, value, device) for name, value in options.items()}
    options["vocab_size"] = vocab_size
    if copies > 1:
        if not isinstance(seeds := options["seed"], Tensor):
            seeds = split_mix(seeds, batch, device)
        options = {name: repeated(name, value, copies) for name, value in options.items()}
        options["seed"] = continuation_seeds(seeds, copies)
    starts = ids[0].repeat_interleave(copies, dim=0)
    batch = len(starts)
    history = None
    if sequence_history and get_divergence(divergence).name != "reverse_kl":
        # Starts at the response: both models were given the prompt.
        history = torch.zeros(batch, len(ensemble.models), dtype=torch.float64, device=device)

    running: dict[str, Any] = {"max_new_tokens": max_new_tokens, "use_cache": use_cache}
    state = ensemble.start(ids, masks, **running)
    has_reference = ensemble.models[0] is not None
    values = value_source(value_fn, ids[0], masks[0], vocab_size, has_reference, **running)
    if copies > 1 or resample_fn is not None:
        state.fork(copies)
        values.fork(copies)
    columns = len(ids)  # models that are there
    sequences = torch.cat([starts, starts.new_full((batch, max_new_tokens), pad)], dim=1)
    logprobs = torch.zeros(batch, max_new_tokens, device=device)
    model_logprobs = torch.zeros(batch, max_new_tokens, columns, device=device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=device)
    reason = torch.full((batch,), _RUNNING, dtype=torch.int64, device=device)
    eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
    responses: list[list[int]] = [[] for _ in range(batch)]
    tokens = parents = None
    stream.begin(starts)

    for step in range(max_new_tokens):
        if parents is not None:
            state.select(parents)
            values.select(parents)
        reference, policies = state.step(tokens)
        so_far = sequences[:, : width + step]
        drawn = sample(
            reference,
            policies,
            **options,
            **values.step(step, so_far, tokens, reference, policies),
            mask=None if mask_fn is None else mask_fn(step, so_far),
            prefix_logprobs=history,
            position=step,
            return_model_logprobs=return_model_logprobs or history is not None,
        )
        active = reason == _RUNNING
        kept = active & drawn.valid
        tokens = torch.where(kept, drawn.tokens, pad)
        sequences[:, width + step] = tokens
        lengths += kept
        logprobs[:, step] = torch.where(active, drawn.logprobs, 0.0)
        if drawn.model_logprobs is not None:
            of_models = torch.where(active[:, None], drawn.model_logprobs, 0.0)
            model_logprobs[:, step] = of_models
            if history is not None:
                history += of_models
        reason = torch.where(active & ~drawn.valid, _INVALID, reason)
        reason = torch.where(kept & torch.isin(tokens, eos), _EOS, reason)

        if stops or stream.active:
            # One transfer serves stop strings, streaming and the stop check.
            host_tokens, host_kept, host_reason = torch.stack([tokens, kept.long(), reason]).cpu()
            stream.put(step, host_tokens)
            for row, text_ids in enumerate(responses if stops else ()):
                if host_kept[row]:
                    text_ids.append(int(host_tokens[row]))
                    if host_reason[row] == _RUNNING and _ends(text_ids, stops, ensemble.tokenizer):
                        host_reason[row] = _STOP
            reason = host_reason.to(device)
            done = bool((host_reason != _RUNNING).all())
        else:
            done = bool((reason != _RUNNING).all())
        if resample_fn is not None:
            parents = resample_fn(step, sequences[:, : width + step + 1], lengths, reason)
        if parents is not None:
            check_tensor("rows of resample_fn", parents, (torch.int64,), device, {"[B]": [batch]})
            record = (tokens, sequences, lengths, logprobs, model_logprobs, reason)
            tokens, sequences, lengths, logprobs, model_logprobs, reason = (
                x[parents] for x in record
            )
            history = None if history is None else history[parents]
            if stops:
                responses = [list(responses[row]) for row in parents.tolist()]
            done = bool((reason != _RUNNING).all())
        if done:
            break

    stream.end()
    # Rows that resample_fn dropped may have been longer; an invalid step counts.
    steps = int((lengths + (reason == _INVALID)).max())
    return GenerateOutput(
        sequences=sequences[:, : width + steps],
        tokens=sequences[:, width : width + steps],
        lengths=lengths,
        finish_reasons=[FINISH_REASONS[code] for code in reason.tolist()],
        texts=_decode(ensemble.tokenizer, sequences[:, width:], lengths),
        logprobs=logprobs[:, :steps],
        model_logprobs=model_logprobs[:, :steps] if return_model_logprobs else None,
        valid=reason != _INVALID,
    )


def _rehearse(
    ensemble: Ensemble,
    batch: int,
    device: torch.device,
    options: dict[str, Any],
    num_values: int,
) -> None:
    """Draw from two-token logits, so that the op refuses bad options before any model runs."""
    logits = torch.zeros(batch, 2, device=device)
    values = logits.expand(num_values, batch, 2) if num_values else None
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    reference = None if ensemble.models[0] is None else logits
    sample(reference, [logits] * ensemble.num_policies, values=values, **options)


def _count(name: str, value: Any, least: int, limit: int | None = None) -> int:
    """An integer of any kind (Python, NumPy, a tensor of one) as an int, in [least, limit)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if limit is not None and number >= limit:
        raise ValueError(f"{name} must be below the models' {limit} token ids, got {number}")
    return number


def _check_vocab_size(vocab_size: int | None, ensemble: Ensemble) -> None:
    if vocab_size is None:
        return
    number, limit = _count("vocab_size", vocab_size, 1), ensemble.vocab_size
    # How many logits a plain callable gives is not known before it runs: the op checks those.
    if limit is not None and number > limit:
        raise ValueError(f"vocab_size must be at most the models' {limit} tokens, got {number}")


def _eos_ids(eos_token_id: int | Sequence[int] | Tensor | None, ensemble: Ensemble) -> list[int]:
    if eos_token_id is None:
        return ensemble.eos_token_ids
    # A tensor without dimensions has __iter__, but cannot be iterated over.
    if not isinstance(eos_token_id, Iterable) or getattr(eos_token_id, "ndim", 1) == 0:
        eos_token_id = [_count("eos_token_id", eos_token_id, 0)]
    return [_count("eos_token_id", token, 0) for token in eos_token_id]


def _stop_strings(stop_strings: str | Sequence[str] | None, tokenizer: Any) -> list[str]:
    if stop_strings is None:
        return []
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if not all(isinstance(stop, str) for stop in stops):
        raise TypeError(f"stop_strings must be a string or a list of strings, got {stop_strings!r}")
    if not all(stops):
        raise ValueError(
            "stop_strings must not hold an empty string: it would end every row at once"
        )
    if stops and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer: pass tokenizers to Ensemble")
    return stops


def _ends(token_ids: list[int], stops: list[str], tokenizer: Any) -> bool:
    """Whether a stop string is in the response, decoded whole: a token's text needs the others."""
    text = tokenizer.decode(token_ids)
    return any(stop in text for stop in stops)


def _decode(tokenizer: Any, tokens: Tensor, lengths: Tensor) -> list[str] | None:
    if tokenizer is None:
        return None
    rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return [tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in rows]
