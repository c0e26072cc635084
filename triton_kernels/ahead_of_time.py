"""Compiles launches for any GPU without having one, and reads the machine code: registers, spills,
stack, and the widths of loads from global memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from .compiled import Launch

#: By the names of their architectures.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class MachineCode:
    """The resources of a compiled kernel, per thread, and its loads."""

    registers: int  # vector registers on AMD
    spills: int  # instructions on NVIDIA, registers on AMD
    stack: int  # bytes
    shared: int  # bytes per program
    loads: Counter[int]  # loads from global memory by their bytes; on AMD those of blocks


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The kernel that Triton would compile for this launch on `target`."""
    backend = make_backend(target)
    kernel = launch.kernel
    # Specialise the arguments as the JIT does, but for `target` instead of the current device.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = launch.options(target.backend == "hip", target.warp_size)
    bound, specialization, options = bind(*launch.arguments, **keywords)
    packed = kernel._pack_args(backend, keywords, bound, specialization, options)
    options, signature, constexprs, attributes = packed
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and assembly of an NVIDIA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run(
                [_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )  # type: ignore[return-value]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"expected {pattern!r} in the compiler's output, got {text[:2000]!r}")
    return int(match[1])


def machine_code(compiled: Any) -> MachineCode:
    """The resources and loads in the machine code of a compiled kernel."""
    loads: Counter[int] = Counter()
    if "cubin" in compiled.asm:
        usage, assembly = disassembled(compiled.asm["cubin"])
        for modifiers in re.findall(r"\bLDG\.E((?:\.\w+)*)", assembly):
            width = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
            loads[int(width[1]) // 8 if width else 4] += 1
        return MachineCode(
            registers=_number(r"REG:(\d+)", usage),
            spills=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
            stack=_number(r"STACK:(\d+)", usage),
            shared=compiled.metadata.shared,
            loads=loads,
        )
    assembly = compiled.asm["amdgcn"]
    # Buffer loads read blocks. All other loads read scalars, several of them joined into one.
    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "short": 2, "dword": 4}
    for name, count in re.findall(r"\bbuffer_load_([a-wyz]+)(x\d)?", assembly):
        loads[widths[name] * int(count[1:] or 1)] += 1
    return MachineCode(
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        # Spilled scalar registers need no count: they go to vector registers or to the stack.
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        stack=_number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        shared=compiled.metadata.shared,
        loads=loads,
    )
