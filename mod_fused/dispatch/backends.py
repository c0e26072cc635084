"""The table of backends: which are available, or why not, and which one runs a call."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..divergence import Divergence, is_built_in, number_of


def _interpreted() -> bool:
    """Whether Triton interprets its kernels. Triton reads TRITON_INTERPRET in its own way, so it is
    asked; it is imported only where the answer may be yes."""
    told = "TRITON_INTERPRET" in os.environ or "triton" in sys.modules
    if not told or importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs  # type: ignore[import-untyped]

    return bool(knobs.runtime.interpret)


#: Triton's interpreter runs the kernels on CPU tensors, for tests.
INTERPRETED = _interpreted()
TRITON_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

#: What `backends()` says of a backend that can be used.
AVAILABLE = "available"


class Backend(NamedTuple):
    """One implementation of the ops `mod_fused::sample_NAME` and `mod_fused::log_probs_NAME`."""

    name: str
    device_types: tuple[str, ...] | None  # None: any device
    status: Callable[[], str]  # AVAILABLE, or why not


#: In the order of `instruction_set_cpu` in csrc/cpu/binding.cpp.
_INSTRUCTION_SETS = ("baseline", "neon", "avx2", "avx512")


_loaded = ""  # the status once loaded; not functools.cache, which torch.compile cannot trace


def _cpu_status() -> str:
    global _loaded
    _loaded = _loaded or _load()
    return _loaded


def _load() -> str:
    # On import the extension registers its kernels for the ops that registration.py defines.
    try:
        from .. import _cpu  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        note = Path(__file__).parents[1] / "_cpu_error.txt"
        if note.exists():
            return f"the C++ extension was not built: {note.read_text().strip()}"
        return f"the C++ extension cannot be imported: {error}"
    wanted, got = os.environ.get("MOD_FUSED_CPU_ISA"), instruction_set()
    if wanted and wanted != got:
        return (
            f"MOD_FUSED_CPU_ISA must name an instruction set of this machine out of "
            f"{', '.join(_INSTRUCTION_SETS)}, got {wanted!r}"
        )
    return AVAILABLE


def instruction_set() -> str:
    """The instruction set of the C++ loops: avx512, avx2, neon or baseline."""
    return _INSTRUCTION_SETS[torch.ops.mod_fused.instruction_set_cpu()]


def triton_status() -> str:
    """`AVAILABLE`, or why the Triton kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return AVAILABLE


#: The fastest first: the first that is available and knows the device is chosen.
BACKENDS: tuple[Backend, ...] = (
    Backend("triton", TRITON_DEVICES, triton_status),
    Backend("cpu", ("cpu",), _cpu_status),
    Backend("torch", None, lambda: AVAILABLE),
)


def backends() -> dict[str, str]:
    """The backends of the op: for each of torch, cpu and triton "available", or the reason
    why not."""
    status = {backend.name: backend.status() for backend in BACKENDS}
    return {name: status[name] for name in ("torch", "cpu", "triton")}


_chosen: dict[tuple[str | None, torch.device, int], str] = {}


def _knows(backend: str, divergence: Divergence) -> bool:
    """Whether a backend can run a divergence. For a registered one triton needs the device
    functions that its owner supplies."""
    if backend == "torch" or is_built_in(divergence):
        return True
    return backend == "triton" and divergence.triton is not None


def choose(name: str | None, device: torch.device, divergence: Divergence) -> str:
    """The name of the backend to run on a device: the one asked for, or the fastest available that
    knows the divergence.

    Raises:
        ValueError: if the backend is unknown, not available, does not run on the device, or does
            not know the divergence.
    """
    if not isinstance(name, (str, type(None))):
        return _choose(name, device, divergence)  # raises: no backend has such a name
    key = (name, device, number_of(divergence))
    if key not in _chosen:  # what can run here does not change while the process lives
        _chosen[key] = _choose(name, device, divergence)
    return _chosen[key]


def _choose(name: str | None, device: torch.device, divergence: Divergence) -> str:
    if name is None:
        return next(
            b.name
            for b in BACKENDS
            if (b.device_types is None or device.type in b.device_types)
            and b.status() == AVAILABLE
            and _knows(b.name, divergence)
        )
    for backend in BACKENDS:
        if backend.name == name:
            if backend.status() != AVAILABLE:
                raise ValueError(f"backend {name!r} is not available: {backend.status()}")
            if backend.device_types is not None and device.type not in backend.device_types:
                raise ValueError(
                    f"backend {name!r} runs on {' and '.join(backend.device_types)} tensors, "
                    f"got tensors on {device}"
                )
            if not _knows(name, divergence):
                raise ValueError(
                    f"backend {name!r} does not know the registered divergence "
                    f"{divergence.name!r}; torch runs any, triton those with device functions"
                )
            return backend.name
    raise ValueError(f"backend must be None or one of {[b.name for b in BACKENDS]}, got {name!r}")
