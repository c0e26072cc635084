"""The C++ CPU backend: loads the extension, whose kernels serve the ops that `ops.py` defines."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .dispatch import AVAILABLE

#: In the order of csrc/cpu/binding.cpp.
_INSTRUCTION_SETS = ("baseline", "neon", "avx2", "avx512")


def _load() -> str:
    """`AVAILABLE`, or why the extension cannot be used."""
    try:
        from . import _cpu  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        note = Path(__file__).parent / "_cpu_error.txt"
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
    """The instruction set that the loops use: avx512, avx2, neon or baseline."""
    return _INSTRUCTION_SETS[torch.ops.mod_fused.instruction_set_cpu()]


_status = ""


def status() -> str:
    """`AVAILABLE`, or why this backend cannot run; the extension is loaded at the first call."""
    global _status
    _status = _status or _load()
    return _status
