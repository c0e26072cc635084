"""`mod_fused.warmup`."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mod_fused
from mod_fused.divergence import get_divergence, number_of

NAMES = {number_of(get_divergence(name)): name for name in ("jsd", "reverse_kl")}


class Calls(TorchDispatchMode):
    """What reached this package's ops: (op, rows, columns, dtype, models, divergence)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mod_fused":
            logits, _, integers, _ = args
            x, divergence = logits[0], NAMES[integers[4]]
            self.seen.append((func.__name__, *x.shape, x.dtype, len(logits), divergence))
        return func(*args, **(kwargs or {}))


def test_every_combination_runs_once(op):
    with Calls() as calls:
        mod_fused.warmup(
            40,
            3,
            batch_sizes=(1, 5),
            dtype=torch.float16,
            device=op.device,
            divergences=("jsd", "kl"),
            backend=op.backend,
            with_log_probs=True,
            top_k=7,
        )
    assert calls.seen == [
        (f"{function}_{op.backend}.default", batch, 40, torch.float16, 4, divergence)
        for batch in (1, 5)
        for divergence in ("jsd", "reverse_kl")
        for function in ("sample", "log_probs")
    ]


def test_without_a_reference_and_with_wrong_options(op):
    with Calls() as calls:
        mod_fused.warmup(9, 2, batch_sizes=(2,), reference=False, backend=op.backend)
    assert [call[4] for call in calls.seen] == [2]
    with pytest.raises(ValueError, match="top_p"):
        mod_fused.warmup(9, backend=op.backend, top_p=2.0)
