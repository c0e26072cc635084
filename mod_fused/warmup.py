"""`warmup`: it compiles the kernels that a server will need, before the first request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .divergence import Divergence
from .ops import log_probs, sample


def warmup(
    vocab_size: int,
    policies: int = 2,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    divergences: Sequence[str | Divergence] = ("reverse_kl",),
    reference: bool = True,
    backend: str | None = None,
    with_log_probs: bool = False,
    **options: Any,
) -> None:
    """Run once each kernel that calls of these shapes will use, so that none is compiled while a
    request waits.

    GPU kernels are compiled per number of policies, dtypes, divergence, set of options in use, and
    vocabulary size (more exactly: whether it and the row strides are multiples of 16). Triton keeps
    them in its cache on disk.

    Args:
        vocab_size: V, the width of the logits.
        policies: M.
        batch_sizes: a small B and a large one, where both will come: the kernels cut a few rows
            into finer pieces than many.
        dtype: of all logits.
        device: None for the current GPU, or the CPU where there is none.
        divergences: names or objects.
        reference: whether there is a reference model.
        backend: as in `sample`.
        with_log_probs: also compile what `log_probs` needs.
        **options: further arguments of `sample` as the server will give them, such as
            `temperature=0.7`, `top_p=0.9`, `return_model_logprobs=True`. Tensors [B, ...] need one
            batch size.

    Raises:
        ValueError, TypeError: as `sample`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [1.0 / max(policies, 1)] * policies
    for batch in batch_sizes:
        logits = [
            torch.zeros(batch, vocab_size, dtype=dtype, device=device) for _ in range(policies + 1)
        ]
        ref = logits[0] if reference else None
        for divergence in divergences:
            arguments = (ref, logits[1:], weights)
            sample(*arguments, divergence=divergence, backend=backend, **{"seed": 0, **options})
            if with_log_probs:
                log_probs(*arguments, divergence=divergence, backend=backend)
