"""A launch of a kernel: the compiler's options, and a cache of compiled kernels that takes little
time on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.driver import driver

_AMD = torch.version.hip is not None
#: Compiled kernels by what they were compiled for: Triton's own look-up takes three times as long.
_compiled: dict[Any, Any] = {}
#: The most registers of a thread on NVIDIA: so three programs of 128 threads fit a multiprocessor,
#: and four of the kernels that do not spill then, with Triton 3.6 and 3.9. Two with many logits of
#: a token in flight.
MOST_REGISTERS, MOST_OF_SMALL, MOST_OF_LARGE = 168, 128, 255
#: Triton 3.6 takes more registers for candidates.
_OLD_COMPILER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
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
        options["enable_fp_fusion"] = True  # from Triton 3.10 on it is off by default
        if not amd:
            v = self.variant
            form = v.excess is not None and not v.root
            small = form and v.models * v.parts <= 24 and v.chunk > 1
            spilling = v.candidates > 0 and _OLD_COMPILER
            most = MOST_REGISTERS
            if (small or not v.general) and not spilling:
                most = MOST_OF_SMALL
            elif v.general and (v.models * v.parts > 48 or spilling):
                most = MOST_OF_LARGE
            options["maxnreg"] = min(most, _REGISTERS // self.threads)
        return options

    def run(self, device: torch.device) -> Any:
        """Launch on the current stream of `device`, which holds the arguments. Returns the compiled
        kernel, or None in the interpreter."""
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
                return compiled
            compiled = self.kernel[self.grid](*self.arguments, **options)
            if compiled is not None:  # the interpreter compiles nothing
                if len(_compiled) >= _MOST:
                    _compiled.clear()
                _compiled[key] = compiled
            return compiled


class BoundLaunch:
    """A launch on the same tensors again and again, with other numbers for `seed` and `position`,
    for which no kernel is compiled anew.

    The compiled kernel is looked up once. It gets the tensors' addresses: Triton's launcher would
    ask each tensor for its own, and the driver what lies there.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        names = launch.kernel.arg_names
        self._numbered = "seed" in names  # then "position" comes behind it
        self._at = names.index("seed") if self._numbered else len(launch.arguments)
        self._rest = self._at + 2 * self._numbered
        arguments = _addresses(launch.arguments)
        self._before = arguments[: self._at]
        self._after = (*arguments[self._rest :], launch.variant)
        self._kernel: Any = None

    def run(self, device: torch.device, seed: int, position: int) -> None:
        """Launch on the current stream of `device`, the current one."""
        launch, kernel = self._launch, self._kernel
        numbers = (seed, position) if self._numbered else ()
        if kernel is None:
            given = launch.arguments
            given = (*given[: self._at], *numbers, *given[self._rest :])
            self._kernel = launch._replace(arguments=given).run(device)
            return
        grid, arguments = (launch.grid[0], 1, 1), (*self._before, *numbers, *self._after)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if getattr(enter, "calls", True) or getattr(leave, "calls", True):
            kernel[grid](*arguments)  # a profiler wants to know of each launch
            return
        # What that does, without what hooks would get: half of its time.
        stream = driver.active.get_current_stream(device.index)
        known = kernel.function, kernel.packed_metadata
        kernel.run(*grid, stream, *known, None, None, None, *arguments)


class BoundLaunches:
    """Launches one after another, as `BoundLaunch`. They hold their tensors."""

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self._launches, self._device = [BoundLaunch(x) for x in launches], device

    def __call__(self, seed: int, position: int) -> None:
        with _current(self._device):
            for launch in self._launches:
                launch.run(self._device, seed, position)


def _addresses(x: Any) -> Any:
    """Tensors as their addresses, in tuples however deep."""
    if isinstance(x, tuple):
        return tuple([_addresses(y) for y in x])
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches on that, not on the tensors' device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
