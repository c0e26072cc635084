"""The decoding loops of the case `decoder`: `mod_fused.generate`, and loops over several models as
they are usually written. All decode the same prompts for the same number of tokens; no token ends a
sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import mod_fused
from mod_fused.decoding import steps as decoder

from . import eager

#: Wraps the function that draws a token, to time it or to keep its arguments.
Around = Callable[[Callable[..., Any]], Callable[..., Any]]
Drawn = tuple[Tensor, Tensor]  # tokens [B, T], log-probabilities [B, T]


SEED = 1  # for the loops that draw with the op


class Task(NamedTuple):
    """The models, the prompts and the mixture to decode."""

    ensemble: mod_fused.Ensemble
    prompts: Tensor  # int64 [B, n], the same length for all rows
    tokens: int  # T, to draw
    divergence: str
    weights: tuple[float, ...]


def generate(task: Task, around: Around, backend: str | None) -> Drawn:
    """`mod_fused.generate` with the op on a backend."""
    with mock.patch.object(decoder, "sample", around(decoder.sample)):
        out = mod_fused.generate(
            task.ensemble,
            input_ids=task.prompts,
            weights=list(task.weights),
            divergence=task.divergence,
            max_new_tokens=task.tokens,
            eos_token_id=[],
            seed=SEED,
            backend=backend,
        )
    return out.tokens, out.logprobs


@torch.no_grad()
def plain(task: Task, around: Around, draw: Callable[..., Drawn]) -> Drawn:
    """A bare loop: at each step the models run one after another, each with its cache, then
    `draw(logits, weights, step)`."""
    draw = around(draw)
    caches: list[Any] = [None] * len(task.ensemble.models)
    inputs, tokens, logprobs = task.prompts, [], []
    for step in range(task.tokens):
        logits = []
        for i, model in enumerate(task.ensemble.models):
            out = model(input_ids=inputs, past_key_values=caches[i], use_cache=True)
            caches[i] = out.past_key_values
            logits.append(out.logits[:, -1])
        token, logprob = draw(logits, task.weights, step)
        tokens.append(token)
        logprobs.append(logprob)
        inputs = token[:, None]
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


def weighted_log_probs(logits: list[Tensor], weights: tuple[float, ...], step: int) -> Drawn:
    """Reverse KL as released decoders compute it: the softmax of each model, the weighted sum of
    their logarithms, softmax, multinomial."""
    parts = [1.0 - sum(weights), *weights]
    total = sum(
        w * torch.log(torch.softmax(x.float(), -1)) for w, x in zip(parts, logits, strict=True)
    )
    probs = torch.softmax(total, -1)
    token = torch.multinomial(probs, 1)
    return token.squeeze(1), probs.gather(1, token).log().squeeze(1)


def contestants(divergence: str) -> dict[str, Callable[[Task, Around], Drawn]]:
    """The loops by name, ours first; `release` exists for reverse KL only."""

    def op(logits: list[Tensor], weights: tuple[float, ...], step: int) -> Drawn:
        out = mod_fused.sample(
            logits[0], logits[1:], list(weights), divergence=divergence, seed=SEED, position=step
        )
        return out.tokens, out.logprobs

    out: dict[str, Callable[[Task, Around], Drawn]] = {
        "generate": functools.partial(generate, backend=None),
        "generate_torch": functools.partial(generate, backend="torch"),
        "op": functools.partial(plain, draw=op),
        "eager": functools.partial(plain, draw=lambda x, w, _: eager.sample(x, w, divergence)),
    }
    if divergence == "reverse_kl":
        out["release"] = functools.partial(plain, draw=weighted_log_probs)
    return out
