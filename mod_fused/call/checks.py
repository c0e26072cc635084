"""Validation of the public functions' arguments: everything the host can see, before any kernel
runs.

Shapes, dtypes, devices, names and Python numbers are checked here, and each error says what was
expected and what came. The backend checks the contents of tensors and reports them in `valid`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..divergence import Divergence, ReverseKL, get_divergence, is_built_in
from .arguments import DrawArguments, MixtureArguments
from .bias import check_bias
from .fields import (
    FLOATS,
    LOGIT_DTYPES,
    check_logits,
    check_tensor,
    number,
    on_device,
    row_parameter,
    shape_of,
    weights_of,
)

MAX_POLICIES = 8
NORMALIZERS = ("exact", "zero")
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-126, torch.finfo(torch.float32).max
_POLICY_NAMES = tuple(f"policy_logits[{i}]" for i in range(MAX_POLICIES))


def check_mixture(
    ref_logits: Tensor | None,
    policy_logits: Sequence[Tensor] | Tensor,
    weights: object,
    divergence: str | Divergence = "reverse_kl",
    normalizer: str = "exact",
    values: Tensor | None = None,
    value_ids: Tensor | None = None,
    value_weights: object = None,
    prefix_logprobs: Tensor | None = None,
    mixture_prefix_logprobs: Tensor | None = None,
    logit_scales: object = None,
    vocab_size: int | None = None,
    plausibility: object = None,
    plausibility_tensor: int = 0,
) -> MixtureArguments:
    """The arguments of `mod_fused.sample` that define the distribution, checked."""
    kind = get_divergence(divergence)
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {NORMALIZERS}, got {normalizer!r}")
    if ref_logits is None and type(kind) is not ReverseKL:
        raise ValueError(f"ref_logits=None is possible for reverse_kl only, got {kind.name}")
    ref_logits, policies, widths = _check_logits(ref_logits, policy_logits)
    if not policies and values is None:
        raise ValueError("expected at least one policy or values, got neither")
    like = policies[0] if ref_logits is None else ref_logits
    batch, device, models = like.shape[0], like.device, len(widths)
    vocab_size = _check_vocab_size(vocab_size, min(widths))

    if weights is None and not policies:
        weights = []
    weights = weights_of("weights", weights, len(policies), batch, device)
    if values is not None:
        values, value_ids = _check_values(values, value_ids, batch, vocab_size, device)
        count = values.shape[0]
        value_weights = [1.0] * count if value_weights is None else value_weights
        value_weights = weights_of("value_weights", value_weights, count, batch, device)
    elif value_ids is not None:
        raise ValueError("value_ids needs values, got values=None")
    elif value_weights is not None:
        raise ValueError("value_weights needs values, got values=None")
    if prefix_logprobs is not None:
        shapes = {"[B, models]": [batch, models]}
        prefix_logprobs = check_tensor("prefix_logprobs", prefix_logprobs, FLOATS, device, shapes)
    if mixture_prefix_logprobs is not None:
        mixture_prefix_logprobs = check_tensor(
            "mixture_prefix_logprobs", mixture_prefix_logprobs, FLOATS, device, {"[B]": [batch]}
        )
        _check_own_mass(kind, normalizer, prefix_logprobs)

    return MixtureArguments(
        ref_logits,
        policies,
        weights,
        kind,
        normalizer,
        values,
        value_ids,
        () if value_weights is None else value_weights,
        prefix_logprobs,
        mixture_prefix_logprobs,
        () if logit_scales is None else _check_scales(logit_scales, models),
        vocab_size,
        row_parameter("plausibility", plausibility, 0.0, batch, device, _is_share, "in [0, 1]"),
        _check_named(plausibility, plausibility_tensor, ref_logits is None, len(policies)),
    )


def _check_own_mass(kind: Divergence, normalizer: str, prefix_logprobs: Tensor | None) -> None:
    """Refuse what the mixture's own mass cannot go with."""
    name = "mixture_prefix_logprobs"
    if prefix_logprobs is None:
        raise ValueError(f"{name} needs prefix_logprobs, got None")
    if normalizer != "exact":
        raise ValueError(f"{name} needs normalizer 'exact', got {normalizer!r}: Z = 0 has no mass")
    if not is_built_in(kind):
        raise ValueError(f"{name} is possible for the built-in divergences only, got {kind.name}")


def _check_logits(
    ref_logits: Tensor | None, policy_logits: object
) -> tuple[Tensor | None, list[Tensor], list[int]]:
    """The reference, the policies, and the widths of all of them."""
    batch, device, widths = None, None, []
    if ref_logits is not None:
        ref_logits, (batch, width) = check_logits("ref_logits", ref_logits, None, None)
        device = ref_logits.device
        widths.append(width)
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
    if not widths:
        raise ValueError("expected ref_logits or at least one policy, got neither")
    return ref_logits, policies, widths


def _check_vocab_size(vocab_size: int | None, narrowest: int) -> int:
    if vocab_size is None:
        return narrowest
    vocab_size = number("vocab_size", vocab_size, int)
    if not 1 <= vocab_size <= narrowest:
        raise ValueError(
            f"vocab_size must be between 1 and the narrowest logits' {narrowest} columns, "
            f"got {vocab_size}"
        )
    return vocab_size


def _check_scales(scales: object, models: int) -> tuple[float, ...]:
    scales = scales.tolist() if isinstance(scales, np.ndarray) else scales
    if not isinstance(scales, (list, tuple)):
        raise TypeError(
            f"logit_scales must be a list of {models} numbers, got {type(scales).__name__}"
        )
    if len(scales) != models:
        raise ValueError(
            f"logit_scales must have one number per model ({models}), got {len(scales)}"
        )
    checked = tuple([number("logit_scales", x) for x in scales])
    for x in checked:
        if not _SMALLEST_SCALE <= x <= _LARGEST_SCALE:
            raise ValueError(
                f"logit_scales must be positive normal float32 numbers (from 2^-126), got {x}"
            )
    return checked


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


def _check_named(plausibility: object, tensor: int, no_reference: bool, policies: int) -> int:
    """plausibility_tensor, checked."""
    if plausibility is None and tensor == 0:
        return 0
    index: int = number("plausibility_tensor", tensor, int)
    lowest = 1 if no_reference else 0
    if not lowest <= index <= policies:
        raise ValueError(
            f"plausibility_tensor must be between {lowest} and {policies} "
            f"(0 is the reference, i is policy i), got {index}"
        )
    return index


def check_draw(
    mixing: MixtureArguments,
    temperature: object = 1.0,
    top_k: object = None,
    top_p: object = None,
    min_p: object = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    bias_ids: Tensor | None = None,
    seed: object = None,
    position: object = 0,
    return_model_logprobs: bool = False,
    return_proposal_logprobs: bool = False,
) -> DrawArguments:
    """The arguments of `mod_fused.sample` that say how a token is drawn, checked."""
    like = mixing.batch_tensor()
    batch, device = like.shape[0], like.device
    if mask is not None:
        words = (mixing.vocab_size + 31) // 32
        if isinstance(mask, Tensor) and mask.dtype == torch.int32:
            shapes = {"[B, ceil(V / 32)]": [batch, words]}
        else:
            shapes = {"[B, V]": [batch, mixing.vocab_size]}
        mask = check_tensor("mask", mask, (torch.bool, torch.int32), device, shapes)
    if isinstance(position, Tensor) and position.dtype != torch.int64:
        raise TypeError(f"position must be int64, got {position.dtype}")
    if position is None:
        raise TypeError("position must be an integer or int64 [B], got None")
    ks = row_parameter("top_k", top_k, 0, batch, device, _is_top_k, ">= 0", int)
    return DrawArguments(
        row_parameter(
            "temperature", temperature, 1.0, batch, device, _is_temperature, "in [0, 3.4e38]"
        ),
        ks if isinstance(ks, Tensor) else min(ks, 2**63 - 1),
        row_parameter("top_p", top_p, 1.0, batch, device, _is_top_p, "in (0, 1]"),
        row_parameter("min_p", min_p, 0.0, batch, device, _is_share, "in [0, 1]"),
        mask,
        None
        if bias is None and bias_ids is None
        else check_bias(bias, bias_ids, batch, mixing.vocab_size, device),
        _check_seed(seed, batch, device),
        row_parameter("position", position, 0, batch, device, _is_position, "in [0, 2^63)", int),
        bool(return_model_logprobs),
        bool(return_proposal_logprobs),
    )


def _check_seed(seed: object, batch: int, device: torch.device) -> int | Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return check_tensor("seed", seed, (torch.int64,), device, {"[B]": [batch]})
    seed = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if not isinstance(seed, (list, tuple)):
        return seed_number(seed)
    if len(seed) != batch:
        raise ValueError(f"seed must be one integer or B = {batch} of them, got {len(seed)}")
    return on_device("seed", [seed_number(x) for x in seed], torch.int64, device)


def _is_temperature(x: float) -> bool:
    return 0.0 <= x <= 3.4e38  # it travels as float32


def _is_top_k(x: int) -> bool:
    return x >= 0


def _is_top_p(x: float) -> bool:
    return 0.0 < x <= 1.0


def _is_share(x: float) -> bool:
    return 0.0 <= x <= 1.0


def _is_position(x: int) -> bool:
    return 0 <= x < 2**63


def position_number(position: object) -> int:
    """A position that is one integer, checked."""
    if not _is_position(count := number("position", position, int)):
        raise ValueError(f"position must be in [0, 2^63), got {count}")
    return count


def seed_number(seed: object) -> int:
    """An integer seed as the int64 of the same 64 bits."""
    bits = number("seed", seed, int)
    if not -(2**63) <= bits < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {bits}")
    return bits - 2**64 if bits >= 2**63 else bits
