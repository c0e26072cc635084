"""The torch ops of every backend.

Backend NAME has `mod_fused::log_probs_NAME` and `mod_fused::sample_NAME`, and `log_probs_NAME_out`
and `sample_NAME_out`, which write to given tensors. The schemas are the same for all backends
(packing.py). A backend in Python is a module with two functions, `log_probs_out` and `sample_out`;
this file adds the allocating ops. The C++ backend implements all four ops itself. The fake
implementations, which tell torch.compile the shapes, are here for all.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..call.outputs import new_log_probs, new_outputs
from ..torch_kernels import launch as torch_launch
from .backends import TRITON_DEVICES, backends
from .packing import (
    LOG_PROBS_OUT_SCHEMA,
    LOG_PROBS_SCHEMA,
    SAMPLE_OUT_SCHEMA,
    SAMPLE_SCHEMA,
    unpack,
)

# `define` and `impl` cost a third of the dispatch time of torch.library.custom_op.
_library = torch.library.Library("mod_fused", "DEF")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

# The ops by backend, kept: looking one up in torch.ops takes longer than a small call.
log_probs: dict[str, OpOverload] = {}
log_probs_out: dict[str, OpOverload] = {}
sample: dict[str, OpOverload] = {}
sample_out: dict[str, OpOverload] = {}

_OPS = (
    ("log_probs", "", LOG_PROBS_SCHEMA, log_probs),
    ("log_probs", "_out", LOG_PROBS_OUT_SCHEMA, log_probs_out),
    ("sample", "", SAMPLE_SCHEMA, sample),
    ("sample", "_out", SAMPLE_OUT_SCHEMA, sample_out),
)


def _fake_log_probs(*packed: Any) -> Tensor:
    mixing, _ = unpack(*packed)
    return new_log_probs(mixing)


def _fake_sample(*packed: Any) -> tuple[Tensor | None, ...]:
    mixing, drawing = unpack(*packed)
    assert drawing is not None
    return new_outputs(mixing, drawing)[:4]


def _fake_out(*args: Any) -> None:
    """An `_out` op returns nothing, so its fake has no shape to tell."""


_FAKES = (_fake_log_probs, _fake_out, _fake_sample, _fake_out)


def _implementations(kernels: Callable[[], ModuleType]) -> tuple[Callable[..., Any], ...]:
    """The four ops of a backend in the order of `_OPS`; `kernels` imports its module."""

    def new_log_probs_of(*packed: Any) -> Tensor:
        mixing, _ = unpack(*packed)
        out = new_log_probs(mixing)
        kernels().log_probs_out(mixing, out)
        return out

    def fill_log_probs(*arguments: Any) -> None:
        *packed, out, workspace = arguments
        mixing, _ = unpack(*packed)
        kernels().log_probs_out(mixing, out, workspace)

    def new_sample_of(*packed: Any) -> tuple[Tensor | None, ...]:
        mixing, drawing = unpack(*packed)
        assert drawing is not None
        outputs = new_outputs(mixing, drawing)
        kernels().sample_out(mixing, drawing, outputs)
        return outputs[:4]

    def fill_sample(*arguments: Any) -> None:
        packed, (*outputs, workspace) = arguments[:4], arguments[4:]
        mixing, drawing = unpack(*packed)
        assert drawing is not None
        kernels().sample_out(mixing, drawing, tuple(outputs), workspace)

    return new_log_probs_of, fill_log_probs, new_sample_of, fill_sample


def _define(
    backend: str, kernels: Callable[[], ModuleType] | None = None, keys: tuple[str, ...] = ()
) -> None:
    """Define a backend's four ops with their fakes, and implement them for the dispatch keys
    `keys`."""
    kinds = (None,) * len(_OPS) if kernels is None else _implementations(kernels)
    for (name, suffix, schema, overloads), fake, kind in zip(_OPS, _FAKES, kinds, strict=True):
        op = f"{name}_{backend}{suffix}"
        _library.define(op + schema, tags=_TAGS)
        torch.library.register_fake(f"mod_fused::{op}", fake, lib=_library)
        for key in keys:
            _library.impl(op, kind, key)
        overloads[backend] = getattr(torch.ops.mod_fused, op).default


def _triton_launch() -> ModuleType:
    # Imported when it runs: triton may be absent.
    from ..triton_kernels import launch

    return launch


_define("torch", lambda: torch_launch, ("CompositeExplicitAutograd",))
_define("triton", _triton_launch, tuple(device.upper() for device in TRITON_DEVICES))
_define("cpu")  # kernels: csrc/cpu/binding.cpp
_library.define("divergence_cpu(int divergence, float alpha, int function, Tensor x) -> Tensor")
_library.define("instruction_set_cpu() -> int")
backends()  # loads the extension now: torch.compile cannot trace the import
