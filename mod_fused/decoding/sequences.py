"""Token sequences with their responses."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch


class Sequences(NamedTuple):
    """Prompts with their responses; every tensor is [N, L], int64."""

    ids: torch.Tensor
    attention_mask: torch.Tensor  # 1 on the prompt and the response, EOS included
    response_mask: torch.Tensor  # 1 on the response, EOS included


class Rollouts(NamedTuple):
    """Sequences drawn from a policy; every tensor is [N, L]."""

    ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    log_ratios: torch.Tensor  # float32: log pi - log pi_ref of each token, 0 outside the response


Rows = TypeVar("Rows", Sequences, Rollouts)


def encode(tokenizer: Any, pairs: list[tuple[str, str]]) -> Sequences:
    """(prompt, response) strings to token ids, padded on the right."""
    heads = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    tails = tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"]
    width = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)) + 1
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    attention = torch.zeros_like(ids)
    response = torch.zeros_like(ids)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        end = len(head) + len(tail) + 1
        ids[row, :end] = torch.tensor([*head, *tail, tokenizer.eos_token_id])
        attention[row, :end] = 1
        response[row, len(head) : end] = 1
    return Sequences(ids, attention, response)


def take(batch: Rows, index: torch.Tensor) -> Rows:
    """The rows `index`, without columns that are padding in all of them."""
    rows = type(batch)(*(tensor[index] for tensor in batch))
    used = rows.attention_mask.any(0).nonzero().squeeze(1)
    return type(batch)(*(tensor[:, used[0] : used[-1] + 1] for tensor in rows))
