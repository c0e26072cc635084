"""What a call of the op launches on a GPU, without one."""

from __future__ import annotations

from typing import Any

import torch
from mod_fused.triton_kernels import launch

from mod_fused.call.checks import check_draw, check_mixture
from mod_fused.call.outputs import new_outputs

DRAW = (
    "temperature", "top_k", "top_p", "min_p", "mask", "bias", "return_model_logprobs",
    "return_proposal_logprobs",
)  # fmt: skip


def launches(
    op: str = "sample",
    vocab: int = 128256,
    policies: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1,
    **arguments: Any,
) -> list[launch.Launch]:
    """What a call launches."""
    logits = torch.empty((rows, vocab), dtype=dtype, device="meta")
    mixture = {k: x for k, x in arguments.items() if k not in DRAW}
    draw = {k: x for k, x in arguments.items() if k in DRAW} | {"seed": 5, "position": 3}
    weights = [0.9 / policies] * policies
    mixing = check_mixture(logits, [logits] * policies, weights, **mixture)
    if op == "log_probs":
        out = logits.new_empty((rows, vocab), dtype=torch.float32)
        return launch.log_probs_launches(mixing, out)
    drawing = check_draw(mixing, **draw)
    return launch.sample_launches(mixing, drawing, new_outputs(mixing, drawing))
