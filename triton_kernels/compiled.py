"""A launch of a compiled kernel: the compiler's options, and how the kernel is found again with
little work on the host."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch

_AMD = torch.version.hip is not None
#: Compiled kernels by what they were compiled for: Triton's own look-up costs three times as much.
_compiled: dict[Any, Any] = {}
#: Of a thread on NVIDIA: three programs of 128 threads fit a multiprocessor. Allowed 255, kernels
#: take up to 217 and issue as much; with 128, or no limit, they spill (all with Triton 3.6).
MOST_REGISTERS = 168
_REGISTERS = 65536  # of a multiprocessor
#: More kernels than a process has. Old ones are in Triton's own cache still.
_MOST = 4096


def specialization(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a kernel is compiled for besides its variant. At least as fine as Triton's own: 1
    becomes a constant, multiples of 16 are known as such, and on AMD tensors of less than 2 GB."""
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
    """One launch of a kernel; `ahead_of_time.py` compiles from it what `run` launches."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    variant: Any  # `Variant` of launch.py
    threads: int

    def options(self, amd: bool, warp_size: int) -> dict[str, Any]:
        """The compiler's options."""
        options = {"variant": self.variant, "num_warps": self.threads // warp_size}
        if self.variant.general and not amd:
            options["maxnreg"] = min(MOST_REGISTERS, _REGISTERS // self.threads)
        return options

    def run(self, device: torch.device) -> None:
        """On the current stream of `device`, where the arguments are."""
        with _current(device):
            options = self.options(_AMD, 64 if _AMD else 32)
            # What is a constant there counts as it is; the interpreter's kernels have no such list.
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
    """Makes a GPU the current one: Triton launches there, whatever the tensors' device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
