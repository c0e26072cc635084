"""Calls of the public functions in which every option appears in each of its forms."""

from __future__ import annotations

from typing import Any

import torch
from cases import logits, normal
from torch.utils._python_dispatch import TorchDispatchMode

from mod_fused import Sample

B, V = 3, 1100
REF, POLICIES = logits(71, B, V, 2, kind="typical")
WEIGHTS = [0.5, 0.25]
IDS = torch.tensor([[1, 5, 1099, -1]] * B)


def per_row(x: float) -> torch.Tensor:
    return torch.full((B,), x)


# Arguments of the public functions, such that every option appears, each form of it.
MIXTURES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "lists": ((REF, POLICIES, WEIGHTS), {}),
    "stacked": ((REF, torch.stack(POLICIES), torch.tensor(WEIGHTS)), {"divergence": "forward_kl"}),
    "weights_per_row": ((REF, POLICIES, normal(5, B, 2).abs()), {"divergence": "jsd"}),
    "half": ((REF.half(), [POLICIES[0].bfloat16()], [[0.5]] * B), {"divergence": "alpha:0.5"}),
    "no_reference": ((None, POLICIES, WEIGHTS), {"vocab_size": 900, "logit_scales": [1.0, 2.0]}),
    "no_policy": ((REF, [], []), {"divergence": "jeffrey", "values": normal(1, 2, B, V)}),
    "everything_dense": (
        (REF[:, :1090], POLICIES, WEIGHTS),
        {
            "divergence": "jeffrey",
            "values": normal(2, 1, B, 1000),
            "value_weights": normal(6, B, 1).abs(),
            "prefix_logprobs": normal(3, B, 3).double(),
            "logit_scales": [0.5, 1.0, 2.0],
            "vocab_size": 1000,
            "plausibility": 1e-4,
            "plausibility_tensor": 1,
        },
    ),
    "own_mass": (
        (REF, POLICIES, WEIGHTS),
        {
            "divergence": "jsd",
            "prefix_logprobs": normal(3, B, 3),
            "mixture_prefix_logprobs": normal(7, B).double(),
            "plausibility": torch.tensor([0.0, 1e-3, 0.05])[torch.arange(B) % 3],
        },
    ),
    "sparse_zero": (
        (REF, POLICIES, WEIGHTS),
        {
            "divergence": "jsd",
            "normalizer": "zero",
            "values": -normal(4, 2, B, 4).abs(),  # so that Z = 0 has an inverse
            "value_ids": IDS,
            "value_weights": [0.5, 1.0],
        },
    ),
}
DRAWS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1},
    "numbers": {
        "seed": 1, "position": 7, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01,
        "return_model_logprobs": True,
    },
    "tensors": {
        "seed": torch.arange(B), "position": torch.arange(B), "temperature": per_row(0.7),
        "top_k": per_row(20).long(), "top_p": per_row(0.9), "min_p": per_row(0.01),
        "mask": torch.ones(B, V, dtype=torch.bool),
    },
    "packed": {"seed": [1, 2, 3], "mask": torch.full((B, 35), -1, dtype=torch.int32)},
    "greedy": {"seed": 1, "temperature": 0.0, "return_proposal_logprobs": True},
    "bias": {"seed": 1, "bias": normal(8, B, V), "return_proposal_logprobs": True},
    "sparse_bias": {"seed": 1, "bias": normal(9, 4).half(), "bias_ids": IDS[0], "top_k": 20},
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Records the calls of this package's ops that pass through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mod_fused":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def poisoned(rows: int, models: int | None, device: str, proposal: bool = False) -> Sample:
    """A `Sample` that looks like no result."""
    return Sample(
        torch.full((rows,), -7, device=device),
        torch.full((rows,), 7.0, device=device),
        torch.arange(rows, device=device) % 2 == 0,
        None if models is None else torch.full((rows, models), 7.0, device=device),
        torch.full((rows,), 7.0, device=device) if proposal else None,
    )
