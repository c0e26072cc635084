"""The training loop of all models: AdamW, and the order of the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def shuffled(n: int, count: int, seed: int) -> torch.Tensor:
    """`count` indices below n, int64: all n in random order, then all n in another order, ..."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(count / n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])[:count]


def fit(
    model: Any,
    steps: int,
    peak_lr: float,
    loss_at: Callable[[int], torch.Tensor],
    label: str | None,
    stop_after: Callable[[int], bool] | None = None,
) -> list[float]:
    """AdamW with warm-up and cosine decay; returns the loss of every step.

    Prints the mean loss of every 200 steps under `label`; None prints nothing. Training ends before
    `steps` when stop_after(number of steps so far) is true.
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
        if stop_after is not None and stop_after(step + 1):
            break
    model.eval()
    return losses
