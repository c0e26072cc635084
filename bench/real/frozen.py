"""The layers below the tuned ones are frozen: they run once for a whole training."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mod_fused.decoding.model_state import positions_of
from mod_fused.decoding.sequences import Sequences


class Below(NamedTuple):
    """Sequences [N, L], and what the layers below the tuned ones make of them."""

    ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    hidden: Tensor  # [N, L, D]


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The layers of a model.

    Raises:
        ValueError: they are not where Llama and most others have them.
    """
    stack = getattr(getattr(model, "model", None), "layers", None)
    if stack is None:
        raise ValueError(f"{type(model).__name__} has no list model.layers, which the study needs")
    return stack


def first_tuned(model: Any, count: int) -> int:
    """The place of the first of the last `count` layers."""
    return max(0, len(layers_of(model)) - count)


def _with(module: Any, **children: Any) -> Any:
    """A copy of a module that shares its parameters and has other children."""
    out = copy.copy(module)
    out._modules = module._modules | children
    return out


def above(model: Any, first: int) -> Any:
    """The model from layer `first` on, which reads hidden states as `inputs_embeds`."""
    stack = torch.nn.ModuleList(list(layers_of(model))[first:])
    return _with(model, model=_with(model.model, layers=stack))


@torch.no_grad()
def run_below(model: Any, first: int, batch: Sequences, rows: int) -> Below:
    """The layers before `first` on a batch, `rows` at a time."""
    stack = torch.nn.ModuleList(list(layers_of(model))[:first])
    lower = _with(model.model, layers=stack, norm=torch.nn.Identity())
    hidden = [
        lower(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
        .last_hidden_state
        for ids, mask in zip(*(x.split(rows) for x in batch[:2]), strict=True)
    ]  # fmt: skip
    return Below(*batch, torch.cat(hidden))
