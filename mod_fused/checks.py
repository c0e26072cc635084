"""Validation of the public functions' arguments: everything the host can see, before any kernel
runs.

Contents of tensors are the device's business and show up in `valid`; shapes, dtypes, devices, names
and Python numbers are checked here, and each error says what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import DrawArguments, MixtureArguments
from .check_helpers import (
    FLOATS,
    LOGIT_DTYPES,
    check_logits,
    check_tensor,
    number,
    row_parameter,
    shape_of,
    weights_of,
)
from .divergence import Divergence, ReverseKL, get_divergence

MAX_POLICIES = 8
NORMALIZERS = ("exact", "zero")
_POLICY_NAMES = tuple(f"policy_logits[{i}]" for i in range(MAX_POLICIES))


def check_mixture(
    ref_logits: Tensor | None,
    policy_logits: Sequence[Tensor] | Tensor,
    weights: object,
    divergence: str | Divergence,
    normalizer: str,
    values: Tensor | None,
    value_ids: Tensor | None,
    value_weights: object,
    prefix_logprobs: Tensor | None,
    logit_scales: object,
    vocab_size: int | None,
    plausibility: float | None,
    plausibility_tensor: int,
) -> MixtureArguments:
    """The first part of the arguments of `mod_fused.sample`, checked; see there for their
    meaning."""
    kind = get_divergence(divergence)
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {NORMALIZERS}, got {normalizer!r}")
    batch, device, widths = None, None, []
    if ref_logits is not None:
        ref_logits, (batch, width) = check_logits("ref_logits", ref_logits, None, None)
        device = ref_logits.device
        widths.append(width)
    elif not isinstance(kind, ReverseKL):
        raise ValueError(f"ref_logits=None is possible for reverse_kl only, got {kind.name}")

    if isinstance(policy_logits, Tensor):
        if policy_logits.dim() != 3:
            raise ValueError(
                "policy_logits must be a list of tensors [B, V] or one tensor [M, B, V], "
                f"got shape {shape_of(policy_logits)}"
            )
        policy_logits = policy_logits.unbind(0)
    elif not isinstance(policy_logits, (list, tuple)):
        raise TypeError(
            "policy_logits must be a list of tensors [B, V] or one tensor [M, B, V], "
            f"got {type(policy_logits).__name__}"
        )
    if len(policy_logits) > MAX_POLICIES:
        raise ValueError(
            f"policy_logits must hold at most {MAX_POLICIES} policies, got {len(policy_logits)}"
        )
    policies: list[Tensor] = []
    for name, logits in zip(_POLICY_NAMES, policy_logits, strict=False):
        logits, (batch, width) = check_logits(name, logits, batch, device)
        device = logits.device if device is None else device
        policies.append(logits)
        widths.append(width)
    if batch is None or device is None:
        raise ValueError("expected ref_logits or at least one policy, got neither")
    if not policies and values is None:
        raise ValueError("expected at least one policy or values, got neither")

    models, narrowest = len(widths), min(widths)
    if vocab_size is None:
        vocab_size = narrowest
    else:
        vocab_size = number("vocab_size", vocab_size, int)
        if not 1 <= vocab_size <= narrowest:
            raise ValueError(
                f"vocab_size must be between 1 and the narrowest logits' {narrowest} columns, "
                f"got {vocab_size}"
            )

    if weights is None and not policies:
        weights = []
    host_weights, weights_tensor = weights_of("weights", weights, len(policies), batch, device)

    host_value_weights: list[float] = []
    value_weights_tensor = None
    if values is not None:
        values, value_ids = _check_values(values, value_ids, batch, vocab_size, device)
        count = values.shape[0]
        if value_weights is None:
            host_value_weights = [1.0] * count
        else:
            host_value_weights, value_weights_tensor = weights_of(
                "value_weights", value_weights, count, batch, device
            )
    elif value_ids is not None:
        raise ValueError("value_ids needs values, got values=None")
    elif value_weights is not None:
        raise ValueError("value_weights needs values, got values=None")

    if prefix_logprobs is not None:
        prefix_logprobs = check_tensor(
            "prefix_logprobs",
            prefix_logprobs,
            FLOATS,
            device,
            {"[B, models]": [batch, models]},
        )
    scales: list[float] = []
    if logit_scales is not None:
        if not isinstance(logit_scales, (list, tuple)):
            raise TypeError(
                f"logit_scales must be a list of {models} numbers, "
                f"got {type(logit_scales).__name__}"
            )
        if len(logit_scales) != models:
            raise ValueError(
                f"logit_scales must have one number per model ({models}), got {len(logit_scales)}"
            )
        scales = [number("logit_scales", x) for x in logit_scales]
        for x in scales:
            if not torch.finfo(torch.float32).tiny <= x <= torch.finfo(torch.float32).max:
                raise ValueError(
                    f"logit_scales must be positive normal float32 numbers (from 2^-126), got {x}"
                )

    return MixtureArguments(
        ref_logits,
        policies,
        host_weights,
        weights_tensor,
        kind.name,
        normalizer,
        values,
        value_ids,
        host_value_weights,
        value_weights_tensor,
        prefix_logprobs,
        scales,
        vocab_size,
        *_check_plausibility(plausibility, plausibility_tensor, ref_logits is None, len(policies)),
    )


def _check_values(
    values: object, value_ids: object, batch: int, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor, got {type(values).__name__}")
    if values.dim() != 3 or values.shape[0] < 1:
        raise ValueError(
            "values must have shape [J, B, V], or [J, B, K] with value_ids [B, K], J >= 1, "
            f"got {shape_of(values)}"
        )
    count = values.shape[0]
    width = vocab_size if value_ids is None else values.shape[2]
    symbols = "[J, B, V]" if value_ids is None else "[J, B, K]"
    values = check_tensor("values", values, LOGIT_DTYPES, device, {symbols: [count, batch, width]})
    if width > 1 and values.stride(2) != 1:
        raise ValueError(
            "values must be contiguous in the last dimension (stride 1), "
            f"got stride {values.stride(2)}"
        )
    if value_ids is None:
        return values, None
    if width < 1:
        raise ValueError("values must have at least one candidate (K >= 1), got K = 0")
    ids = check_tensor("value_ids", value_ids, (torch.int64,), device, {"[B, K]": [batch, width]})
    return values, ids


def _check_plausibility(
    plausibility: float | None, tensor: int, no_reference: bool, policies: int
) -> tuple[float, int]:
    if plausibility is None:
        return 0.0, 0
    plausibility = number("plausibility", plausibility)
    if not 0.0 < plausibility <= 1.0:
        raise ValueError(f"plausibility must be in (0, 1], got {plausibility}")
    tensor = number("plausibility_tensor", tensor, int)
    lowest = 1 if no_reference else 0
    if not lowest <= tensor <= policies:
        raise ValueError(
            f"plausibility_tensor must be between {lowest} and {policies} "
            f"(0 is the reference, i is policy i), got {tensor}"
        )
    return plausibility, tensor


def check_draw(
    mixing: MixtureArguments,
    temperature: object,
    top_k: object,
    top_p: object,
    min_p: object,
    mask: Tensor | None,
    seed: object,
    position: object,
    return_model_logprobs: bool,
) -> DrawArguments:
    """The second part of the arguments of `mod_fused.sample`, checked; see there for their
    meaning."""
    like = mixing.batch_tensor()
    batch, device = like.shape[0], like.device
    if mask is not None:
        words = (mixing.vocab_size + 31) // 32
        if isinstance(mask, Tensor) and mask.dtype == torch.int32:
            shapes = {"[B, ceil(V / 32)]": [batch, words]}
        else:
            shapes = {"[B, V]": [batch, mixing.vocab_size]}
        mask = check_tensor("mask", mask, (torch.bool, torch.int32), device, shapes)

    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device=device)
    elif isinstance(seed, (list, tuple)):
        if len(seed) != batch:
            raise ValueError(f"seed must be one integer or B = {batch} of them, got {len(seed)}")
        seeds = [_seed(x) for x in seed]
        seed = torch.tensor(seeds, dtype=torch.int64, device=device)
    seed_tensor, seed_number = None, 0
    if isinstance(seed, Tensor):
        seed_tensor = check_tensor("seed", seed, (torch.int64,), device, {"[B]": [batch]})
    else:
        seed_number = _seed(seed)

    if isinstance(position, Tensor) and position.dtype != torch.int64:
        raise TypeError(f"position must be int64, got {position.dtype}")
    if position is None:
        raise TypeError("position must be an integer or int64 [B], got None")
    temperatures = row_parameter(
        "temperature", temperature, 1.0, batch, device, _is_temperature, "in [0, 3.4e38]"
    )
    top_ks, top_k_tensor = row_parameter("top_k", top_k, 0, batch, device, _is_top_k, ">= 0", int)
    if top_k is not None:
        top_ks = [min(k, mixing.vocab_size) for k in top_ks]  # any integer, however large, is fine
    positions = row_parameter(
        "position", position, 0, batch, device, _is_position, "in [0, 2^63)", int
    )
    return DrawArguments(
        *temperatures,
        top_ks,
        top_k_tensor,
        *row_parameter("top_p", top_p, 1.0, batch, device, _is_top_p, "in (0, 1]"),
        *row_parameter("min_p", min_p, 0.0, batch, device, _is_min_p, "in [0, 1]"),
        mask,
        seed_number,
        seed_tensor,
        *positions,
        bool(return_model_logprobs),
    )


def _is_temperature(x: float) -> bool:
    return 0.0 <= x <= 3.4e38  # it travels as float32


def _is_top_k(x: int) -> bool:
    return x >= 0


def _is_top_p(x: float) -> bool:
    return 0.0 < x <= 1.0


def _is_min_p(x: float) -> bool:
    return 0.0 <= x <= 1.0


def _is_position(x: int) -> bool:
    return 0 <= x < 2**63


def _seed(seed: object) -> int:
    """An integer seed as the int64 of the same 64 bits."""
    bits = number("seed", seed, int)
    if not -(2**63) <= bits < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {bits}")
    return bits - 2**64 if bits >= 2**63 else bits
