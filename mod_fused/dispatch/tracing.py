"""Numbers that change from call to call of compiled code.

torch.compile makes such a number a symbol. A symbol in an op's list of numbers becomes a constant
of the graph: every new value needs a new graph, and torch.compile allows eight. Therefore symbols
are passed as tensors where the op has a slot for one, and logits are multiplied by their scales
before the op. Alpha remains a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.fields import any_symbol, tensor_of
from ..torch_kernels.philox import mix


def mixture_without_symbols(mixing: MixtureArguments) -> MixtureArguments:
    """The same distribution, with tensors in place of symbols."""
    device, scales = mixing.batch_tensor().device, mixing.logit_scales
    ref, policies = mixing.ref_logits, mixing.policy_logits
    if any_symbol(scales):
        scaled = [x.float() * scale for x, scale in zip(mixing.tensors(), scales, strict=True)]
        ref, policies = (None, scaled) if ref is None else (scaled[0], scaled[1:])
        scales = ()

    def weights(given: tuple[float, ...] | Tensor) -> tuple[float, ...] | Tensor:
        if isinstance(given, Tensor) or not any_symbol(given):
            return given
        return tensor_of(given, torch.float64, device)

    return mixing._replace(
        ref_logits=ref,
        policy_logits=policies,
        weights=weights(mixing.weights),
        value_weights=weights(mixing.value_weights),
        logit_scales=scales,
        plausibility=_rows(mixing.plausibility, 0.0, torch.float64, mixing.batch_tensor()),
    )


def _rows(given: Any, off: float, dtype: torch.dtype, like: Tensor) -> Any:
    """A number, or a symbol as a tensor [B]."""
    # A cut or filter that is off stays a number: a tensor would switch its kernel on.
    if isinstance(given, Tensor) or not any_symbol([given]) or given == off:
        return given
    return torch.ones(like.shape[:1], dtype=dtype, device=like.device) * given


def draw_without_symbols(drawing: DrawArguments, like: Tensor) -> DrawArguments:
    """The same draw with tensors in place of symbols, for the batch and device of `like`."""
    count, device = like.shape[0], like.device
    seed = drawing.seed
    if not isinstance(seed, Tensor) and any_symbol([seed]):
        # SplitMix64 of each row's number, as `philox.split_mix` has it.
        seed = mix(torch.arange(count, device=device) + tensor_of([seed], torch.int64, device))
    return drawing._replace(
        temperature=_rows(drawing.temperature, 1.0, torch.float64, like),
        top_k=_rows(drawing.top_k, 0, torch.int64, like),
        top_p=_rows(drawing.top_p, 1.0, torch.float64, like),
        min_p=_rows(drawing.min_p, 0.0, torch.float64, like),
        seed=seed,
        position=_rows(drawing.position, -1, torch.int64, like),
    )
