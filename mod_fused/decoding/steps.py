"""The steps of a decode: run the models, draw a token in every row, record it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..call.fields import check_tensor
from ..ops import sample
from .beams import Beams
from .masks import Masks
from .model_state import EnsembleState
from .penalties import Penalties
from .responses import Responses
from .streaming import Stream
from .totals import Resampler
from .values import ValueSource, ValueWeighting, weighed


def draw_all(
    max_new_tokens: int,
    state: EnsembleState,
    values: ValueSource,
    responses: Responses,
    options: dict[str, Any],
    stream: Stream,
    masks: Masks,
    penalties: Penalties,
    resample_fn: Callable[[int, Tensor, Tensor, Tensor], Tensor | None] | Resampler | None,
    beams: Beams | None,
    weighting: ValueWeighting | None,
) -> None:
    """Step by step run the models, draw and record, until all responses have ended; with beams,
    until their search has."""
    first_position = options.pop("position")
    weights = options.pop("value_weights")
    drawing = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    mixing = {name: x for name, x in options.items() if name not in drawing and name != "seed"}
    stream.begin(responses.sequences)
    parents = None
    for step in range(max_new_tokens):
        if parents is not None:
            state.select(parents)
            values.select(parents)
        tokens, so_far = responses.tokens, responses.sequences
        reference, policies = state.step(tokens)
        given = values.step(step, so_far, tokens, reference, policies)
        if weighting is None:
            given["value_weights"] = weights
        else:
            given |= weighed(weighting, reference, policies, given, mixing)
        given |= {
            "prefix_logprobs": responses.history,
            "mixture_prefix_logprobs": responses.own_history,
        }
        models = [*([] if reference is None else [reference]), *policies]
        read = responses.read
        given |= masks.step(step, so_far, models, "value_ids" in given, read)
        given["bias"] = penalties.step(read, reference, policies, mixing | given)
        if beams is not None:
            parents = beams.step(reference, policies, **mixing | given)
            responses = beams.responses
            if beams.done:
                break
            continue
        drawn = sample(
            reference,
            policies,
            **options | given,
            position=first_position + step,
            return_model_logprobs=responses.wants_model_logprobs,
            return_proposal_logprobs=responses.totals is not None,
        )
        excluding = {name: given.pop(name) for name in ("mask", "bias")}
        responses.scores.add(reference, policies, mixing | given, drawing | excluding)
        responses.add(drawn, stream, given)
        if resample_fn is not None:
            parents = responses.resample(resample_fn)
        if parents is not None:
            rows = len(so_far)
            check_tensor(
                "rows of resample_fn", parents, (torch.int64,), so_far.device, {"[B]": [rows]}
            )
            responses.select(parents)
        if responses.done:
            break
