"""Decodes answers to prompts and measures rewards and KL, with the same noise for all methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mod_fused import Ensemble, generate, world
from mod_fused.torch_kernels.philox import split_mix
from mod_fused.training import embedded_policies as train

Array = np.ndarray
BATCH = 256
SEED = 0  # of the trainings and of the answers to train on
DECODE_SEED = 1  # of the held-out prompts, and of drawing the answers


@functools.cache
def reference() -> tuple[Any, Any]:
    """The embedded reference and its tokenizer."""
    ensemble = Ensemble.embedded([], dtype=torch.float32)
    return ensemble.models[0], ensemble.tokenizer


def scores(prompts: Sequence[str], responses: Sequence[str]) -> Array:
    """[N, 3] float32 rewards in the order of `world.OBJECTIVES`."""
    columns = [train.score(name, list(prompts), list(responses)) for name in world.OBJECTIVES]
    return torch.stack(columns, dim=1).numpy()


def batches(
    rows: Sequence[Any], size: int = BATCH, seed: int = DECODE_SEED
) -> Iterator[tuple[list[Any], list[int]]]:
    """Rows with their seeds: row r has SplitMix64(seed + r) with every method."""
    noise = split_mix(seed, len(rows), torch.device("cpu")).tolist()
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size]), noise[start : start + size]


def decode(
    models: Sequence[Any],
    weights: Sequence[float],
    prompts: Sequence[str],
    samples: int = 1,
    **options: Any,
) -> dict[str, Array]:
    """`answers` of embedded models: the reference (or None), then the policies."""
    ensemble = Ensemble(list(models), reference()[1])
    options["max_new_tokens"] = train.MAX_NEW_TOKENS
    return answers(ensemble, weights, prompts, scores, samples, **options)


def answers(
    ensemble: Ensemble,
    weights: Sequence[float],
    prompts: Sequence[Any],
    score: Callable[[Sequence[Any], Sequence[str]], Array],
    samples: int = 1,
    batch: int = BATCH,
    seed: int = DECODE_SEED,
    **options: Any,
) -> dict[str, Array]:
    """Decodes S answers to each of N prompts: their texts [S, N] and rewards [S, N, R], those of
    `score(prompts, texts)`; kl [S, N] (log pi* - log pi_ref of whole answers), length, ended,
    valid; ref_logprobs [S, N] and log_ratios [S, N, M], log pi_i - log pi_ref of whole answers.

    S is `samples`, times num_return_sequences, which read a prompt once. Rows count sample by
    sample. Without a reference the first policy stands in its place.
    """
    # No cut unless it is asked for: the mixture itself is measured.
    options = {"plausibility": None} | options | {"return_model_logprobs": True}
    copies = options.get("num_return_sequences", 1)
    parts: list[dict[str, Array]] = []
    for part, seeds in batches(list(prompts) * samples, batch, seed):
        out = generate(ensemble, part, weights=list(weights), seed=seeds, **options)
        assert out.model_logprobs is not None
        totals = out.model_logprobs.double().sum(1)  # [B, M+1], whole answers
        texts = list(out.texts or ())
        parts.append(
            {
                "texts": np.array(texts, dtype=object),
                "rewards": score([prompt for prompt in part for _ in range(copies)], texts),
                "kl": (out.logprobs.double().sum(1) - totals[:, 0]).numpy(),
                "ref_logprobs": totals[:, 0].numpy(),
                "log_ratios": (totals[:, 1:] - totals[:, :1]).numpy(),
                "length": out.lengths.numpy(),
                "ended": np.array([reason == "eos" for reason in out.finish_reasons]),
                "valid": out.valid.numpy(),
            }
        )
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    out = {}
    for name, x in joined.items():
        apart = x.reshape(samples, len(prompts), copies, *x.shape[1:])
        out[name] = np.moveaxis(apart, 2, 0).reshape(samples * copies, len(prompts), *x.shape[1:])
    return out
