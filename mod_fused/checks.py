"""Validation of the public functions' arguments: everything the host can see, before any kernel
runs.

Contents of tensors are the device's business and show up in `valid`; shapes, dtypes, devices, names
and Python numbers are checked here, and each error says what was expected and what came.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import DrawArguments, MixtureArguments
from .divergence import Divergence, ReverseKL, get_divergence

MAX_POLICIES = 8
LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMALIZERS = ("exact", "zero")
_FLOATS = (torch.float32, torch.float64)
_INTS = (torch.int64, torch.int32)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _check_tensor(
    name: str,
    tensor: object,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    shapes: Sequence[Sequence[int]],
    described: str,
) -> Tensor:
    """The tensor without its gradient, after dtype, device and shape have been checked."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the logits, got {tensor.device}")
    if not any(tensor.shape == torch.Size(s) for s in shapes):
        raise ValueError(f"{name} must have shape {described}, got {_shape(tensor)}")
    return tensor.detach() if tensor.requires_grad else tensor


def _check_logits(name: str, logits: object, first: Tensor | None) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be {_names(LOGIT_DTYPES)}, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"{name} must have shape [B, V] with V >= 1, got {_shape(logits)}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got stride "
            f"{logits.stride(1)}"
        )
    if first is not None:
        if logits.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} must have as many rows as the other logits ({first.shape[0]}), "
                f"got {logits.shape[0]}"
            )
        if logits.device != first.device:
            raise ValueError(
                f"{name} must be on {first.device} like the other logits, got {logits.device}"
            )
    return logits.detach() if logits.requires_grad else logits


def _number(name: str, x: object, kind: type = float) -> Any:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if kind is int:
        if not isinstance(x, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {type(x).__name__} {x}")
        return int(x)
    return float(x)


def _row_parameter(
    name: str,
    given: object,
    off: float | int,
    batch: int,
    device: torch.device,
    good: Callable[[Any], bool],
    expected: str,
    kind: type = float,
) -> tuple[list[Any], Tensor | None]:
    """A number, B numbers or a tensor [B] as the schema's pair (numbers, tensor)."""
    if given is None:
        return [off], None
    if isinstance(given, Tensor):
        dtypes = _FLOATS if kind is float else _INTS
        return [off], _check_tensor(name, given, dtypes, device, [[batch]], f"[B] = [{batch}]")
    if isinstance(given, (list, tuple)):
        if len(given) != batch:
            raise ValueError(f"{name} must be one number or B = {batch} of them, got {len(given)}")
        host = [_number(f"{name}[{i}]", x, kind) for i, x in enumerate(given)] or [off]
    else:
        host = [_number(name, given, kind)]
    for x in host:
        if not good(x):
            raise ValueError(f"{name} must be {expected}, got {x}")
    return host, None


def _weights(
    name: str, given: object, count: int, batch: int, device: torch.device
) -> tuple[list[float], Tensor | None]:
    """Weights [count] or [B, count] as the schema's pair (flat numbers, tensor)."""
    described = f"[{count}] or [B, {count}] = [{batch}, {count}]"
    if isinstance(given, Tensor):
        shapes = [[count], [batch, count]]
        return [], _check_tensor(name, given, _FLOATS, device, shapes, described)
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{name} must be a list of numbers or a tensor of shape {described}, "
            f"got {type(given).__name__}"
        )
    if given and all(isinstance(row, (list, tuple)) for row in given):
        if len(given) != batch or any(len(row) != count for row in given):
            lengths = sorted({len(row) for row in given})
            raise ValueError(
                f"{name} must have shape {described}, got {len(given)} rows of {lengths} numbers"
            )
        flat = [x for row in given for x in row]
    elif len(given) == count:
        flat = list(given)
    else:
        raise ValueError(f"{name} must have shape {described}, got {len(given)} numbers")
    host = [_number(name, x) for x in flat]
    for x in host:
        if not math.isfinite(x):
            raise ValueError(f"{name} must be finite, got {x}")
    return host, None


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
    first = None
    if ref_logits is not None:
        first = ref_logits = _check_logits("ref_logits", ref_logits, None)
    elif not isinstance(kind, ReverseKL):
        raise ValueError(f"ref_logits=None is possible for reverse_kl only, got {kind.name}")

    if isinstance(policy_logits, Tensor):
        if policy_logits.dim() != 3:
            raise ValueError(
                "policy_logits must be a list of tensors [B, V] or one tensor [M, B, V], "
                f"got shape {_shape(policy_logits)}"
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
    for i, logits in enumerate(policy_logits):
        policies.append(_check_logits(f"policy_logits[{i}]", logits, first))
        first = policies[0] if first is None else first
    if first is None:
        raise ValueError("expected ref_logits or at least one policy, got neither")
    if not policies and values is None:
        raise ValueError("expected at least one policy or values, got neither")

    batch, device = first.shape[0], first.device
    models = len(policies) + (ref_logits is not None)
    narrowest = min(x.shape[1] for x in ([] if ref_logits is None else [ref_logits]) + policies)
    if vocab_size is None:
        vocab_size = narrowest
    else:
        vocab_size = _number("vocab_size", vocab_size, int)
        if not 1 <= vocab_size <= narrowest:
            raise ValueError(
                f"vocab_size must be between 1 and the narrowest logits' {narrowest} columns, "
                f"got {vocab_size}"
            )

    if weights is None and not policies:
        weights = []
    host_weights, weights_tensor = _weights("weights", weights, len(policies), batch, device)

    host_value_weights: list[float] = []
    value_weights_tensor = None
    if values is not None:
        values, value_ids = _check_values(values, value_ids, batch, vocab_size, device)
        count = values.shape[0]
        if value_weights is None:
            host_value_weights = [1.0] * count
        else:
            host_value_weights, value_weights_tensor = _weights(
                "value_weights", value_weights, count, batch, device
            )
    else:
        for name, x in (("value_ids", value_ids), ("value_weights", value_weights)):
            if x is not None:
                raise ValueError(f"{name} needs values, got values=None")

    if prefix_logprobs is not None:
        prefix_logprobs = _check_tensor(
            "prefix_logprobs",
            prefix_logprobs,
            _FLOATS,
            device,
            [[batch, models]],
            f"[B, models] = [{batch}, {models}]",
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
        scales = [_number("logit_scales", x) for x in logit_scales]
        for x in scales:
            if not (math.isfinite(x) and x > 0):
                raise ValueError(f"logit_scales must be positive and finite, got {x}")

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
            f"got {_shape(values)}"
        )
    count = values.shape[0]
    width = vocab_size if value_ids is None else values.shape[2]
    described = (
        f"[J, B, V] = [{count}, {batch}, {vocab_size}]"
        if value_ids is None
        else f"[J, B, K] = [{count}, {batch}, K]"
    )
    values = _check_tensor(
        "values", values, LOGIT_DTYPES, device, [[count, batch, width]], described
    )
    if width > 1 and values.stride(2) != 1:
        raise ValueError(
            "values must be contiguous in the last dimension (stride 1), "
            f"got stride {values.stride(2)}"
        )
    if value_ids is None:
        return values, None
    if width < 1:
        raise ValueError("values must have at least one candidate (K >= 1), got K = 0")
    return values, _check_tensor(
        "value_ids",
        value_ids,
        (torch.int64,),
        device,
        [[batch, width]],
        f"[B, K] = [{batch}, {width}]",
    )


def _check_plausibility(
    plausibility: float | None, tensor: int, no_reference: bool, policies: int
) -> tuple[float, int]:
    if plausibility is None:
        return 0.0, 0
    plausibility = _number("plausibility", plausibility)
    if not 0.0 < plausibility <= 1.0:
        raise ValueError(f"plausibility must be in (0, 1], got {plausibility}")
    tensor = _number("plausibility_tensor", tensor, int)
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
            shape, described = [batch, words], f"[B, ceil(V / 32)] = [{batch}, {words}]"
        else:
            shape = [batch, mixing.vocab_size]
            described = f"[B, V] = [{batch}, {mixing.vocab_size}]"
        mask = _check_tensor("mask", mask, (torch.bool, torch.int32), device, [shape], described)

    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device=device)
    elif isinstance(seed, (list, tuple)):
        if len(seed) != batch:
            raise ValueError(f"seed must be one integer or B = {batch} of them, got {len(seed)}")
        seeds = [_seed(x) for x in seed]
        seed = torch.tensor(seeds, dtype=torch.int64, device=device)
    seed_tensor, seed_number = None, 0
    if isinstance(seed, Tensor):
        seed_tensor = _check_tensor(
            "seed", seed, (torch.int64,), device, [[batch]], f"[B] = [{batch}]"
        )
    else:
        seed_number = _seed(seed)

    if isinstance(position, Tensor) and position.dtype != torch.int64:
        raise TypeError(f"position must be int64, got {position.dtype}")
    if position is None:
        raise TypeError("position must be an integer or int64 [B], got None")
    return DrawArguments(
        *_row_parameter(
            "temperature",
            temperature,
            1.0,
            batch,
            device,
            lambda x: 0.0 <= x < math.inf,
            "finite and >= 0",
        ),
        *_row_parameter("top_k", top_k, 0, batch, device, lambda x: x >= 0, ">= 0", int),
        *_row_parameter("top_p", top_p, 1.0, batch, device, lambda x: 0.0 < x <= 1.0, "in (0, 1]"),
        *_row_parameter("min_p", min_p, 0.0, batch, device, lambda x: 0.0 <= x <= 1.0, "in [0, 1]"),
        mask,
        seed_number,
        seed_tensor,
        *_row_parameter(
            "position",
            position,
            0,
            batch,
            device,
            lambda x: 0 <= x < 2**63,
            "between 0 and 2^63 - 1",
            int,
        ),
        bool(return_model_logprobs),
    )


def _seed(seed: object) -> int:
    """An integer seed as the int64 of the same 64 bits."""
    number = _number("seed", seed, int)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {number}")
    return number - 2**64 if number >= 2**63 else number
