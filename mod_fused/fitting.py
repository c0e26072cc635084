"""Token sequences with their responses, and the loop that fits a model to them."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def shuffled(n: int, count: int, seed: int) -> torch.Tensor:
    """`count` of the indices 0..n-1, int64: all of them in random order, then all of them again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(count / n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])[:count]


def fit(
    model: Any,
    steps: int,
    peak_lr: float,
    loss_at: Callable[[int], torch.Tensor],
    label: str | None,
) -> list[float]:
    """AdamW with warm-up and cosine decay; returns the loss of every step.

    Prints the mean loss of every 200 steps under `label`; None prints nothing.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        decay = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if label is not None and step % 200 == 199:
            recent = sum(losses[-200:]) / 200
            print(f"  {label} step {step + 1}/{steps}, loss {recent:.3f}", flush=True)
    model.eval()
    return losses
