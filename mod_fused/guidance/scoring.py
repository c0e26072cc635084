"""Scores of responses for `blockwise_best_of_k` and `best_of_n`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..architectures import embedded_ids
from ..fitting import Sequences
from ..prompts import encode_text
from ..text import Decoder
from .blockwise import ScoreFunction
from .scorers import Scorer
from .trainer import Reward, prefix_values

_VALUES = 2**28  # a dense scorer says one for each token of the vocabulary: 1 GiB at a time


def prefix_score(scorers: Sequence[Any], strengths: Sequence[float] | None = None) -> ScoreFunction:
    """sum_j v_j V_j(x, y^t) of the prefixes y^t themselves (Controlled Decoding, arXiv 2310.17022).

    Args:
        scorers: J models or `Scorer`s, dense or scalar; no callables, whose prefixes are not known.
        strengths: v, [J]; None means ones.

    Returns:
        A score_fn: sequences and mask int64 [N, L] to float32 [N]. It reads whole sequences anew.

    Raises:
        TypeError: a scorer is a callable.
        ValueError: not one strength per scorer.
    """
    known = [s if isinstance(s, Scorer) else Scorer(s) for s in scorers]
    for scorer in known:
        if not hasattr(scorer.model, "config"):
            raise TypeError(f"a prefix score needs a model, got {type(scorer.model).__name__}")
    weights = [1.0] * len(known) if strengths is None else list(strengths)
    if len(weights) != len(known):
        raise ValueError(f"strengths must be {len(known)} numbers, got {len(weights)}")

    @torch.no_grad()
    def score(sequences: Tensor, mask: Tensor) -> Tensor:
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = (columns * mask).argmax(1, keepdim=True)  # of the prefix; padding may follow
        total = torch.zeros(len(sequences), dtype=torch.float32, device=sequences.device)
        for weight, scorer in zip(weights, known, strict=True):
            width = embedded_ids(scorer.model) if scorer.dense else 1
            rows = max(1, _VALUES // (width * mask.shape[1]))
            for start in range(0, len(sequences), rows):
                part = slice(start, start + rows)
                batch = Sequences(sequences[part], mask[part], mask[part])
                values = scorer.finish(prefix_values(scorer.model, batch))
                total[part] += weight * values.gather(1, last[part] - 1)[:, 0]
        return total

    return score


def response_score(reward: Reward, tokenizer: Any, prompts: Sequence[str]) -> ScoreFunction:
    """The reward of the responses as text; for `best_of_n`, where they are complete.

    Args:
        reward: reward(prompt, response), any float; the response as in `GenerateOutput.texts`.
        tokenizer: of the first model.
        prompts: the B prompts that are decoded; rows b K to (b + 1) K - 1 answer prompt b.
    """
    starts = [len(encode_text(prompt, tokenizer)) for prompt in prompts]
    decoder = Decoder(tokenizer)

    def score(sequences: Tensor, mask: Tensor) -> Tensor:
        copies = len(sequences) // len(prompts)
        rewards = []
        for row, (ids, kept) in enumerate(zip(sequences, mask.bool(), strict=True)):
            prompt = row // copies
            text = decoder(ids[kept][starts[prompt] :].tolist())
            rewards.append(float(reward(prompts[prompt], text)))
        return torch.tensor(rewards, dtype=torch.float64, device="cpu")

    return score
