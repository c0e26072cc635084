"""The log-probability of given responses under the mixture, read in one pass of each model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.fields import check_tensor
from ..divergence import Divergence
from ..ops import log_probs
from .adapters import check_shared
from .ensemble import Ensemble
from .options import (
    check_limits,
    check_vocab_size,
    count,
    first_history,
    plain,
    ready_options,
)
from .prompts import Prompts, encode_text
from .skipping import models_to_run
from .values import (
    ValueFunction,
    ValueGuide,
    ValueWeighting,
    value_count,
    value_source,
    weighed,
)

Responses = Sequence[str] | Sequence[Sequence[int]] | Tensor


class Likelihood(NamedTuple):
    """What `loglikelihood` returns. T is the length of the longest response.

    Attributes:
        logprobs: float32 [B, T], log pi* of each token in nats; -inf where pi* excludes it, NaN
            where a step is invalid (see `mod_fused.sample`), 0 behind the end.
        totals: float64 [B], the sum of a response's logprobs; -inf if pi* excludes one of them.
        greedy: bool [B, T], whether the token is pi*'s most likely one, the lowest id among equals;
            True behind the end.
        lengths: int64 [B], tokens in each response.
        model_logprobs: float32 [B, T, M+1], log-probability of each token under each model,
            reference first (M columns without one), 0 behind the end. None unless asked for.
    """

    logprobs: Tensor
    totals: Tensor
    greedy: Tensor
    lengths: Tensor
    model_logprobs: Tensor | None


@torch.no_grad()
def loglikelihood(
    ensemble: Ensemble,
    prompts: Prompts | None = None,
    responses: Responses = (),
    *,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None,
    lengths: Sequence[int] | Tensor | None = None,
    input_ids: Tensor | Sequence[Tensor] | None = None,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    add_special_tokens: bool | None = None,
    divergence: str | Divergence = "reverse_kl",
    normalizer: str = "exact",
    sequence_history: bool = False,
    prefix_logprobs: Tensor | Sequence[Sequence[float]] | None = None,
    mixture_prefix_logprobs: Tensor | Sequence[float] | None = None,
    logit_scales: Sequence[float] | None = None,
    plausibility: float | Sequence[float] | Tensor | None = None,
    plausibility_tensor: int = 0,
    value_fn: ValueFunction | ValueGuide | None = None,
    value_weights: Sequence[float]
    | Sequence[Sequence[float]]
    | Tensor
    | ValueWeighting
    | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    return_model_logprobs: bool = False,
    backend: str | None = None,
) -> Likelihood:
    """log pi* of given responses, token by token, as `generate` would have drawn them.

    A language model reads prompt and response in one pass, whose logits [B, T, V] are all held. A
    plain callable is called for each token, as in `generate`; so are models of which one pass would
    give other logits (LongRoPE and dynamic rotary positions beyond their switch, CPM-Ant) or those
    of the last token alone (Bamba, Falcon-H1, Nemotron-H, XLNet, Zamba). Values are asked token by
    token.

    Args:
        ensemble: the models; B prompts are read together.
        prompts, input_ids, attention_mask, add_special_tokens: as in `generate`.
        responses: a list of B strings, which the first tokenizer reads as the continuation of a
            text, without special tokens; or B lists of token ids; or int64 [B, T]. The
            end-of-sequence token counts where it is given.
        lengths: [B], how many tokens of int64 [B, T] belong to each response; None: all. With the
            output of `generate`: responses=out.tokens, lengths=out.lengths.
        plausibility: as in `mod_fused.sample`: nothing is excluded unless asked. `generate` does so
            by default off reverse KL; pass both the same number to compare them.
        others: as in `generate`.

    Returns:
        `Likelihood`. With the same explicit options its logprobs are those that `generate` returned
        for its own responses, up to the rounding of the models' passes.

    Raises:
        TypeError, ValueError: before any model runs, as in `generate`, and for responses that are
            empty, hold ids outside the vocabulary, or are not one for each prompt. (What depends on
            the width of a plain callable's logits is checked after its first call.)
    """
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"ensemble must be a mod_fused.Ensemble, got {type(ensemble).__name__}")
    check_shared({**ensemble.places, **getattr(value_fn, "places", {})})
    vocab_size = check_vocab_size(vocab_size, ensemble)
    if value_fn is None and value_weights is not None:
        raise ValueError("value_weights were given without value_fn")
    limits = check_limits(ensemble, 1, 1, None, [], pad_token_id, None)
    running = models_to_run(
        ensemble.models,
        weights,
        divergence,
        plausibility=plausibility,
        plausibility_tensor=plausibility_tensor,
        value_fn=value_fn,
        all_models=return_model_logprobs,
    )
    ids, masks = ensemble.encode(
        prompts,
        input_ids=input_ids,
        attention_mask=attention_mask,
        pad_token_id=limits.pad_token_id,
        add_special_tokens=add_special_tokens,
        models={ensemble.first, *running},
    )
    batch, device = len(ids[0]), ids[0].device
    known = ensemble.vocab_size if vocab_size is None else vocab_size
    tokens, counts = _tokens(responses, lengths, batch, ensemble.tokenizer, limits.pad_token_id)
    _check_ids(tokens, known)
    tokens, counts = tokens.to(device), counts.to(device)
    weighting = value_weights if isinstance(value_weights, ValueWeighting) else None
    num_values = partial(value_count, value_fn)
    if weighting is not None:
        weighting.check(divergence, num_values(None))
    options: dict[str, Any] = {
        "weights": weights,
        "value_weights": None if weighting is not None else value_weights,
        "divergence": divergence,
        "normalizer": normalizer,
        "logit_scales": logit_scales,
        "plausibility": plausibility,
        "plausibility_tensor": plausibility_tensor,
        "backend": backend,
    }
    drawing = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    drawing |= {"seed": 0, "position": 0}
    options = ready_options(ensemble, options | drawing, num_values, limits, batch, device)
    options = {name: x for name, x in options.items() if name not in drawing}
    options["vocab_size"] = vocab_size
    given_weights = options.pop("value_weights")
    history, own = first_history(
        prefix_logprobs, mixture_prefix_logprobs, sequence_history, options,
        (batch, len(ensemble.present)), 1, device,
    )  # fmt: skip

    room: dict[str, Any] = {"max_new_tokens": tokens.shape[1], "use_cache": use_cache}
    own_prompts = slice(-len(running), None)  # the first model's come first, also if it rests
    state = ensemble.start(ids[own_prompts], masks[own_prompts], models=running, **room)
    has_reference = ensemble.models[0] is not None
    values = value_source(value_fn, ids[0], masks[0], vocab_size, has_reference, **room)
    sequences = torch.cat([ids[0], tokens], dim=1)
    found: list[list[Tensor]] = []
    for step, (reference, policies) in enumerate(state.read(tokens)):
        previous = None if step == 0 else tokens[:, step - 1]
        so_far = sequences[:, : ids[0].shape[1] + step]
        given = values.step(step, so_far, previous, reference, policies)
        if weighting is None:
            given["value_weights"] = given_weights
        else:
            given |= weighed(weighting, reference, policies, given, options)
        given |= {"prefix_logprobs": history, "mixture_prefix_logprobs": own}
        log_p = log_probs(reference, policies, **options, **given)
        if known is None and step == 0:
            _check_ids(tokens, log_p.shape[1])
        token, inside = tokens[:, step], step < counts
        here = torch.where(inside, _picked(log_p, token), 0.0)
        greedy = (log_p.argmax(-1) == token) & ~here.isnan() | ~inside
        columns = [here, greedy]
        if return_model_logprobs or history is not None:
            models = [*([] if reference is None else [reference]), *policies]
            each = _of_models(models, logit_scales, log_p.shape[1], token)
            each = torch.where(inside[:, None], each, 0.0)
            columns.append(each)
            history = None if history is None else history + each
        if own is not None:
            own = own + here
        found.append(columns)
    logprobs, greedy, *of_models = (torch.stack(x, 1) for x in zip(*found, strict=True))
    excluded = (logprobs == -torch.inf).any(1)
    totals = torch.where(excluded, -torch.inf, logprobs.double().sum(1))
    wanted = of_models[0] if return_model_logprobs else None
    return Likelihood(logprobs, totals, greedy, counts, wanted)


def _picked(log_p: Tensor, tokens: Tensor) -> Tensor:
    """The entries [B] of [B, V] at tokens [B]."""
    return log_p.gather(1, tokens[:, None])[:, 0]


def _of_models(
    logits: Sequence[Tensor], scales: Sequence[float] | None, vocab: int, tokens: Tensor
) -> Tensor:
    """Log-probability of the tokens [B] under each model, float32 [B, models]."""
    scales = [1.0] * len(logits) if scales is None else scales
    rows = (x[:, :vocab].float() * scale for x, scale in zip(logits, scales, strict=True))
    return torch.stack([_picked(x.log_softmax(-1), tokens) for x in rows], 1)


def _tokens(
    responses: Responses, lengths: Any, batch: int, tokenizer: Any, pad: int
) -> tuple[Tensor, Tensor]:
    """The responses as int64 [B, T], with `pad` behind their ends, and their lengths int64 [B]."""
    if isinstance(responses, str):
        raise TypeError(f"responses must be a list of B = {batch} responses, got one string")
    if isinstance(responses, Tensor):
        shapes = {"[B, T]": [batch, responses.shape[-1] if responses.ndim else 0]}
        tokens = check_tensor("responses", responses, (torch.int64,), responses.device, shapes)
        room = tokens.shape[1]
        counts = [room] * batch if lengths is None else plain(lengths)
        counts = counts.tolist() if isinstance(counts, Tensor) else counts
        if not isinstance(counts, list) or len(counts) != batch:
            raise ValueError(f"lengths must be B = {batch} whole numbers, got {lengths!r}")
        counts = [count("lengths", n, 0) for n in counts]
        if max(counts) > room:
            raise ValueError(f"lengths must be at most T = {room}, got {max(counts)}")
        rows = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
    else:
        if lengths is not None:
            raise ValueError("lengths go with responses int64 [B, T]; a list has its own")
        rows = [_ids(response, tokenizer) for response in responses]
    if len(rows) != batch:
        raise ValueError(f"responses must be B = {batch}, one for each prompt, got {len(rows)}")
    if [] in rows:
        raise ValueError(f"responses[{rows.index([])}] has no token")
    filled = torch.full((batch, max(map(len, rows))), pad, dtype=torch.int64, device="cpu")
    for filling, row in zip(filled, rows, strict=True):
        filling[: len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
    return filled, torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")


def _check_ids(tokens: Tensor, vocab_size: int | None) -> None:
    low, high = (int(x) for x in torch.aminmax(tokens))
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        bad = low if low < 0 else high
        expected = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
        raise ValueError(f"responses hold the id {bad}, expected {expected}")


def _ids(response: Any, tokenizer: Any) -> list[int]:
    """The token ids of a response, a string or the ids themselves."""
    if isinstance(response, str):
        if tokenizer is None:
            raise ValueError("responses of text need a tokenizer: pass tokenizers to Ensemble")
        return encode_text(response, tokenizer, add_special_tokens=False)
    ids = plain(response)
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    if not isinstance(ids, list):
        raise TypeError(
            f"a response must be a string or a list of token ids, got {type(response).__name__}"
        )
    return [count("a token id of responses", token, 0) for token in ids]
