"""Roll-outs: responses drawn from a policy to learn from, one to a prompt or a tree of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.ensemble import Ensemble
from ..decoding.generate import generate
from ..decoding.sequences import Rollouts
from ..decoding.text import Decoder
from ..guidance.blockwise import Reward
from ..torch_kernels.philox import continuation_seeds, split_mix


def alone(model: Any, tokenizer: Any) -> Ensemble:
    """The model by itself, as an ensemble to draw from with weights [1]."""
    return Ensemble([None, model], [None, tokenizer])


def roll_out(
    ensemble: Ensemble,
    prompts: Sequence[str],
    *,
    weights: Any,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 512,
    branches: int = 1,
    block_length: int | None = None,
    **options: Any,
) -> tuple[Rollouts, list[str]]:
    """Responses to each of the N prompts, drawn with `mod_fused.generate`: one, or a tree of them.

    In a tree every response that goes on after a block of tokens does so in several ways, so that
    the value of a prefix is seen with several outcomes. A response that has ended is repeated, so
    that all rows count alike: their mean is an unbiased estimate of the policy's.

    Args:
        ensemble, weights, max_new_tokens, **options: for `generate`.
        prompts: N strings.
        seed: prompt n has the row seed SplitMix64(seed + n), whatever batch_size is.
        batch_size: responses drawn at the same time.
        branches: continuations after each block; 1 draws one response to a prompt.
        block_length: tokens in a block; the last may be shorter. None: max_new_tokens.

    Returns:
        The sequences, left-padded, with the log-ratios of their tokens to the ensemble's first
        model, and the responses as text. There are N branches^(blocks - 1) rows, those of a prompt
        in a row; the first of them is the response that is drawn without branches.

    Raises:
        ValueError: a step of a response was invalid, branches or block_length is below 1, or
            branches are asked of `sequence_history`, which would lose the response so far.
    """
    block_length = max_new_tokens if block_length is None else block_length
    if branches < 1 or block_length < 1:
        raise ValueError(
            f"branches and block_length must be at least 1, got {branches} and {block_length}"
        )
    if block_length < max_new_tokens and options.get("sequence_history"):
        raise ValueError("blocks do not go with sequence_history, which starts anew in each")
    (ids, *_), (mask, *_) = ensemble.encode(list(prompts))
    mask = torch.ones_like(ids) if mask is None else mask
    rows = Rollouts(ids, mask, torch.zeros_like(ids), torch.zeros(ids.shape, device=ids.device))
    seeds = split_mix(seed, len(ids), ids.device)
    going_on = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for begin in range(0, max_new_tokens, block_length):
        if begin:
            rows = Rollouts(*(tensor.repeat_interleave(branches, 0) for tensor in rows))
            going_on = going_on.repeat_interleave(branches)
            seeds = continuation_seeds(seeds, branches)
        rows, going_on = _with_block(
            rows,
            going_on,
            ensemble,
            batch_size=batch_size,
            weights=weights,
            max_new_tokens=min(block_length, max_new_tokens - begin),
            seed=seeds,
            position=begin,
            **options,
        )
    text, width = Decoder(ensemble.tokenizer), ids.shape[1]
    said = zip(rows.ids[:, width:].tolist(), rows.response_mask.sum(1).tolist(), strict=True)
    return rows, [text(tokens[:length]) for tokens, length in said]


def _with_block(
    rows: Rollouts,
    going_on: Tensor,
    ensemble: Ensemble,
    *,
    batch_size: int,
    max_new_tokens: int,
    seed: Tensor,
    **options: Any,
) -> tuple[Rollouts, Tensor]:
    """The rows [N, L] with one more block of tokens, those that are not `going_on` with padding;
    and which go on after it, bool [N]."""
    width = rows.ids.shape[1]
    ids = F.pad(rows.ids, (0, max_new_tokens), value=ensemble.pad_token_id)
    response = F.pad(rows.response_mask, (0, max_new_tokens))
    log_ratios = F.pad(rows.log_ratios, (0, max_new_tokens))
    still = torch.zeros_like(going_on)
    for index in going_on.nonzero()[:, 0].split(batch_size):
        if not len(index):  # all have ended
            break
        out = generate(
            ensemble,
            input_ids=rows.ids[index],
            attention_mask=rows.attention_mask[index],
            max_new_tokens=max_new_tokens,
            seed=seed[index],
            return_model_logprobs=True,
            **options,
        )
        if not out.valid.all():
            bad = int(index[~out.valid][0])
            raise ValueError(f"response {bad} has an invalid step")
        assert out.model_logprobs is not None
        count = out.tokens.shape[1]
        drawn = slice(width, width + count)
        place = torch.arange(count, device=ids.device)
        ids[index, drawn] = out.tokens
        response[index, drawn] = (place < out.lengths[:, None]).long()
        log_ratios[index, drawn] = out.logprobs - out.model_logprobs[..., 0]
        still[index] = torch.tensor(
            [reason == "length" for reason in out.finish_reasons], device=ids.device
        )
    attention = torch.cat([rows.attention_mask, response[:, width:]], dim=1)
    return Rollouts(ids, attention, response, log_ratios), still


def rewards_of(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """reward(prompt, response) of every pair, float32 [N]."""
    pairs = zip(prompts, responses, strict=True)
    rewards = [float(reward(prompt, response)) for prompt, response in pairs]
    return torch.tensor(rewards, dtype=torch.float32, device="cpu")
