"""Which models a decode runs: those that its distributions depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..divergence import ReverseKL, get_divergence
from ..torch_kernels.mixture import normal, own_coefficient
from .options import plain, support_cut
from .values import ValueGuide


def models_to_run(
    models: Sequence[Any],
    weights: Any,
    divergence: Any,
    *,
    plausibility: Any,
    plausibility_tensor: Any,
    value_fn: Any,
    all_models: bool,
) -> list[int]:
    """The indices of the models that must run, in order. The op does not look at the others: their
    coefficient is 0 in every row, by its own rule of what is rounding.

    Args:
        models: [reference or None, policy 1, ..., policy M].
        weights: as in `mod_fused.generate`, not checked yet; so are the next four. With a tensor on
            a GPU this is one synchronisation. Where they do not fit, all models run, and the checks
            of the call refuse it.
        divergence: under reverse KL the reference has the coefficient 1 - sum w, else 1.
        plausibility: where it is on, the model that it is measured on runs.
        plausibility_tensor: that model.
        value_fn: a guide that reads the reference's logits makes it run.
        all_models: the caller reads every model's log-probabilities.
    """
    present = [i for i, model in enumerate(models) if model is not None]
    w = _rows(weights, len(models) - 1)
    if all_models or w is None:
        return present
    needed = [True, *(w != 0).any(0).tolist()]
    if type(get_divergence(divergence)) is ReverseKL:
        needed[0] = bool(reads_reference(value_fn) or (own_coefficient(weights, w) != 0).any())
    if cuts_support(plausibility, divergence):
        at = plain(plausibility_tensor)
        needed = [runs or i == at for i, runs in enumerate(needed)]
    # Where no model counts pi* is uniform, but its vocabulary is still the models'.
    return [i for i in present if needed[i]] or present


def reads_reference(value_fn: Any) -> bool:
    """Whether a guide reads the reference's logits."""
    return isinstance(value_fn, ValueGuide) and getattr(value_fn, "reads_reference", True)


def cuts_support(plausibility: Any, divergence: Any) -> bool:
    """Whether plausibility is on."""
    cut = plain(support_cut(plausibility, divergence))
    return cut is not None and (isinstance(cut, (Tensor, list)) or cut != 0)


def log_linear_coefficients(models: Sequence[Any], weights: Any, copies: int) -> Tensor | None:
    """What each model's logits count under reverse KL, float64 on the CPU: [1, M+1] for all rows,
    or [B K, M+1] for K adjacent copies of each. The reference's 1 - sum w stands first, 0 for None.
    None where the weights do not fit."""
    w = _rows(weights, len(models) - 1)
    if w is None:
        return None
    own = w.new_zeros(len(w)) if models[0] is None else own_coefficient(weights, w)
    each = torch.cat([own[:, None], w], dim=1)
    return each if len(each) == 1 else each.repeat_interleave(copies, dim=0)


def _rows(weights: Any, count: int) -> Tensor | None:
    """Weights [count] or [B, count] as the op takes them, float64 [rows, count] on the CPU; None
    where they are something else."""
    given = plain([] if weights is None else weights)
    if not isinstance(given, Tensor):
        try:
            given = torch.tensor(given, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            return None
    if given.ndim not in (1, 2) or given.shape[-1] != count or not given.is_floating_point():
        return None
    return normal(torch.atleast_2d(given).to("cpu", torch.float64))
