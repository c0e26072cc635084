"""A launch of a kernel: the compiler's options, and a cache of compiled kernels that takes little
time on the host."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch

_AMD = torch.version.hip is not None
#: Compiled kernels by what they were compiled for: Triton's own look-up takes three times as long.
_compiled: dict[Any, Any] = {}
#: The most registers of a thread on NVIDIA, so that four programs of 128 threads fit a
#: multiprocessor. The kernels with roots spill then: three programs fit.
MOST_REGISTERS, MOST_WITH_ROOTS = 128, 168
_REGISTERS = 65536  # registers of a multiprocessor
#: The cache is cleared at so many kernels, more than a process has; Triton's own keeps them.
_MOST = 4096


def specialization(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The properties of arguments that a kernel is compiled for, besides its variant. They are at
    least as fine as Triton's own: whether a number is 1 or a multiple of 16, whether a pointer is
    aligned to 16 bytes and, on AMD, whether a tensor has less than 2 GB."""
    found: list[Any] = []
    for x in arguments:
        kind = type(x)
        if x is None:
            found.append(None)
        elif kind is int:
            found.append(x == 1 or (x % 16 == 0, -(2**31) <= x < 2**31))
        elif kind is float:
            found.append(float)
        elif isinstance(x, tuple):
            found.append(specialization(x))
        else:
            large = _AMD and x.untyped_storage().nbytes() >= 2**31
            found.append((x.dtype, x.data_ptr() % 16 == 0, large))
    return tuple(found)


class Launch(NamedTuple):
    """One launch of a kernel, for `run` here or for compilation in `ahead_of_time.py`."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    variant: Any  # `Variant` of launch.py
    threads: int

    def options(self, amd: bool, warp_size: int) -> dict[str, Any]:
        """The compiler's options."""
        options = {"variant": self.variant, "num_warps": self.threads // warp_size}
        options["enable_fp_fusion"] = True  # the newest Triton asks for it
        if self.variant.general and not amd:
            most = MOST_WITH_ROOTS if self.variant.root else MOST_REGISTERS
            options["maxnreg"] = min(most, _REGISTERS // self.threads)
        return options

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of `device`, which holds the arguments."""
        with _current(device):
            options = self.options(_AMD, 64 if _AMD else 32)
            # Constants enter the key by value. The interpreter's kernels have no parameters.
            parameters = zip(self.arguments, getattr(self.kernel, "params", ()), strict=False)
            constants = tuple([x for x, p in parameters if p.is_constexpr])
            own = specialization(self.arguments)
            key = (self.kernel, *options.items(), constants, device, own)
            compiled = _compiled.get(key)
            if compiled is not None:
                compiled[self.grid[0], 1, 1](*self.arguments, self.variant)
                return
            compiled = self.kernel[self.grid](*self.arguments, **options)
            if compiled is not None:  # the interpreter compiles nothing
                if len(_compiled) >= _MOST:
                    _compiled.clear()
                _compiled[key] = compiled


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches on that, not on the tensors' device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
