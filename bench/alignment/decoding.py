"""Decodes answers to prompts and measures rewards and KL, with the same noise for all methods."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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


def batches(rows: Sequence[str], size: int = BATCH) -> Iterator[tuple[list[str], list[int]]]:
    """Rows with their seeds: row r has SplitMix64(DECODE_SEED + r) with every method."""
    noise = split_mix(DECODE_SEED, len(rows), torch.device("cpu")).tolist()
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size]), noise[start : start + size]


def decode(
    models: Sequence[Any],
    weights: Sequence[float],
    prompts: Sequence[str],
    samples: int = 1,
    **options: Any,
) -> dict[str, Array]:
    """Rewards [S, N, 3], kl [S, N] (log pi* - log pi_ref of whole answers), length, ended, valid;
    log_ratios [S, N, M], log pi_i - log pi_ref of whole answers.

    `models`: the reference (or None), then the policies. Rows count sample by sample.
    """
    ensemble = Ensemble(list(models), reference()[1])
    # No cut unless it is asked for: the mixture itself is measured.
    always = {"max_new_tokens": train.MAX_NEW_TOKENS, "return_model_logprobs": True}
    options = {"plausibility": None} | options | always
    parts: list[dict[str, Array]] = []
    for part, seeds in batches(list(prompts) * samples):
        out = generate(ensemble, part, weights=list(weights), seed=seeds, **options)
        assert out.model_logprobs is not None
        totals = out.model_logprobs.double().sum(1)  # [B, M+1], whole answers
        parts.append(
            {
                "rewards": scores(part, out.texts or ()),
                "kl": (out.logprobs.double().sum(1) - totals[:, 0]).numpy(),
                "log_ratios": (totals[:, 1:] - totals[:, :1]).numpy(),
                "length": out.lengths.numpy(),
                "ended": np.array([reason == "eos" for reason in out.finish_reasons]),
                "valid": out.valid.numpy(),
            }
        )
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return {name: x.reshape(samples, len(prompts), *x.shape[1:]) for name, x in joined.items()}
