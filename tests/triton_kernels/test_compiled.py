"""How a compiled kernel is found again and run (triton_kernels/compiled.py), without a GPU."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED
from launches import launches

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mod_fused.triton_kernels import compiled  # noqa: E402
from mod_fused.triton_kernels.ahead_of_time import TARGETS  # noqa: E402
from mod_fused.triton_kernels.compiled import (  # noqa: E402
    BoundLaunches,
    Launch,
    specialization,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from triton.compiler.compiler import CompiledKernel, LazyDict, make_backend  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

BYTES = torch.zeros(4096, dtype=torch.uint8)
#: What may stand in an argument's place: each may be compiled for.
INTEGERS = [0, 1, -1, 2, 16, 24, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**40, 2**62]
TENSORS = [
    BYTES[begin : begin + 1024].view(dtype)
    for begin, dtype in product(
        (0, 8, 16, 24), (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8)
    )
]
OTHERS: list[Any] = [None, 0.5, 1.0, 16.0, (), (1, 16), (16, 1), ((1,), None)]


class Huge(torch.Tensor):
    """As if it had 2 GB."""

    def untyped_storage(self) -> Any:
        class Storage:
            def nbytes(self) -> int:
                return 2**31

            size = nbytes

        return Storage()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_equal_keys_are_one_kernel_for_triton_too(target, monkeypatch):
    amd = target == "gfx942"
    monkeypatch.setattr(compiled, "_AMD", amd)
    (launch,) = launches(divergence="jsd")
    kernel, options = launch.kernel, launch.options(amd, 64 if amd else 32)
    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(TARGETS[target])
    )
    _, *rest = launch.arguments
    huge = TENSORS[0].as_subclass(Huge)
    found = [
        (specialization((x, *rest)), repr(bind(x, *rest, **options)[1]))
        for x in [*INTEGERS, *TENSORS, huge, *OTHERS]
    ]
    equal = [(a, b) for (x, a), (y, b) in combinations(found, 2) if x == y]
    assert len(equal) >= 10  # what is 16 bytes further on, or another number of the same kind
    assert [(a, b) for a, b in equal if a != b] == []
    assert len({x for x, _ in found}) >= len({a for _, a in found}) >= 20
    # The other arguments count as well, however deep they lie.
    mixing = launch.arguments[0]
    other = mixing._replace(strides=(mixing.strides[0] + 1, *mixing.strides[1:]))
    assert specialization((other, *rest)) != specialization(launch.arguments)


class Compiled:
    """A compiled kernel, and what it was launched with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """A kernel that has to be compiled each time it is called by its own name."""

    arg_names = ("mixing", "drawing", "work", "rows", "group", "seed", "position", "variant")

    def __init__(self, constant: int = -1) -> None:
        self.compiled: list[tuple[dict[str, Any], Any]] = []
        self.make: Any = Compiled
        self.params = [SimpleNamespace(is_constexpr=i == constant) for i in range(8)]

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Compiled:
            self.compiled.append((options, self.make()))
            self.first = arguments
            return self.compiled[-1][1]

        return run


@pytest.fixture
def launch(monkeypatch) -> Launch:
    """A launch of a `Kernel`."""
    monkeypatch.setattr(compiled, "_compiled", {})
    (real,) = launches(divergence="jsd")
    return real._replace(kernel=Kernel())


CPU = torch.device("cpu")


def test_a_kernel_is_compiled_once_for_all_calls_that_may_share_it(launch):
    launch.run(CPU)
    m, *rest = launch.arguments
    again = launch._replace(grid=(7,), arguments=(m._replace(alpha=0.25), *rest))
    again.run(CPU)
    ((options, shared),) = launch.kernel.compiled
    assert options == launch.options(False, 32)
    assert shared.calls == [((7, 1, 1), (*again.arguments, launch.variant))]
    odd = m._replace(logits=tuple(torch.zeros(1, 2048)[:, 1:] for _ in m.logits))
    changed = [
        launch._replace(arguments=(odd, *rest)),
        launch._replace(threads=2 * launch.threads),
        launch._replace(variant=launch.variant._replace(chunk=2)),
    ]
    for other in [*changed, *changed]:
        other.run(CPU)
    assert len(launch.kernel.compiled) == 4
    assert [len(c.calls) for _, c in launch.kernel.compiled] == [1, 1, 1, 1]


def test_constants_among_the_arguments_count_as_they_are(launch):
    kernel = Kernel(constant=3)
    for constant in (2, 3, 2, 3):  # alike as numbers: neither 1 nor multiples of 16
        arguments = (*launch.arguments[:3], constant)
        launch._replace(kernel=kernel, arguments=arguments).run(CPU)
    assert [len(c.calls) for _, c in kernel.compiled] == [1, 1]
    (real,) = launches(divergence="jsd")
    assert real.kernel.params[-1].is_constexpr  # a name that Triton's kernels have


def test_kernels_are_not_kept_for_ever(launch, monkeypatch):
    monkeypatch.setattr(compiled, "_MOST", 3)
    for threads in (32, 64, 128, 256, 512):
        launch._replace(threads=threads).run(CPU)
    assert len(compiled._compiled) <= 3


def flat(x: Any) -> list[Any]:
    return [z for y in x for z in flat(y)] if isinstance(x, tuple) else [x]


STREAM = 11


@pytest.fixture
def runtime(monkeypatch) -> Any:
    """Triton without a GPU: its driver knows one stream, its C launcher keeps what it gets."""
    launched: list[Any] = []
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: STREAM)
    monkeypatch.setattr(driver, "_active", active)

    def compiled_kernel() -> CompiledKernel:
        launcher = CudaLauncher.__new__(CudaLauncher)
        names = ("global_scratch", "profile_scratch")
        fields = dict.fromkeys([f"{x}_{y}" for x in names for y in ("size", "align")], 0)
        fields |= {"launch_cooperative_grid": False, "launch_pdl": False, "gsan_enabled": False}
        fields |= {"num_ctas": 1, "arg_annotations": None, "kernel_signature": None}
        vars(launcher).update(fields, launch=lambda *arguments: launched.append(arguments))
        kernel = CompiledKernel.__new__(CompiledKernel)
        vars(kernel).update(module=0, _module_pid=None, function=7, name="", src=None)
        vars(kernel).update(packed_metadata=(4, 1, 0), _run=launcher)
        return kernel

    return SimpleNamespace(launched=launched, compile=compiled_kernel)


def test_a_bound_launch_compiles_once_and_passes_addresses(launch, runtime):
    launch.kernel.make = runtime.compile
    x = torch.zeros(1, 2048)
    mixing, *rest = launch.arguments
    launch = launch._replace(arguments=(mixing._replace(logits=(x, x, x[:, 1024:])), *rest))
    bound = BoundLaunches([launch, launch._replace(grid=(9,))], CPU)
    bound(5, 3)
    given = launch.arguments[:5]
    assert all(a is b for a, b in zip(launch.kernel.first[:5], given, strict=True))
    assert launch.kernel.first[5:] == (5, 3)
    ((_, kernel),) = launch.kernel.compiled  # the second launch found it
    runtime.launched.clear()
    with TorchOps() as ops:
        bound(2**62, 0)
    assert ops.seen == [] and len(launch.kernel.compiled) == 1
    plain = list(runtime.launched)
    runtime.launched.clear()
    numbers = (2**62, 0, launch.variant)
    for grid in (launch.grid[0], 9):  # Triton's own way to launch a compiled kernel
        kernel[grid, 1, 1](*(tuple_of_addresses(y) for y in given), *numbers)
    # All that the launcher in C gets but the hooks: their chains are empty.
    assert [without_hooks(a) for a in plain] == [without_hooks(a) for a in runtime.launched]
    assert [a[:5] for a in plain] == [(launch.grid[0], 1, 1, STREAM, 7), (9, 1, 1, STREAM, 7)]


def without_hooks(x: Any) -> list[Any]:
    hooks = (LazyDict, type(knobs.runtime.launch_enter_hook))
    return [y for y in flat(x) if y is not None and not isinstance(y, hooks)]


def tuple_of_addresses(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(tuple_of_addresses, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def test_a_profiler_is_told_of_bound_launches(launch, runtime, monkeypatch):
    launch.kernel.make = runtime.compile
    bound = BoundLaunches([launch], CPU)
    bound(5, 3)

    def hook(metadata: Any) -> None:
        pass

    for name in ("launch_enter_hook", "launch_exit_hook"):
        runtime.launched.clear()
        chain = getattr(knobs.runtime, name)
        chain.add(hook)
        try:
            bound(5, 3)
        finally:
            chain.remove(hook)
        (arguments,) = runtime.launched
        assert any(isinstance(x, LazyDict) for x in arguments)
        assert any(x is chain for x in arguments)
    runtime.launched.clear()
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", None)  # as Triton allows
    bound(5, 3)
    assert len(runtime.launched) == 1


class TorchOps(TorchDispatchMode):
    """The torch operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_kernel_depends_on_the_numbers_of_seed_and_position(target):
    for launch in launches(divergence="jsd", top_k=50):
        kernel = launch.kernel
        options = launch.options(target == "gfx942", 64 if target == "gfx942" else 32)
        backend = make_backend(TARGETS[target])
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        at = kernel.arg_names.index("seed")
        assert kernel.arg_names[at + 1] == "position"
        before, after = launch.arguments[:at], launch.arguments[at + 2 :]
        found = {
            repr(bind(*before, a, b, *after, **options)[1]) for a, b in product(INTEGERS, INTEGERS)
        }
        assert len(found) == 1


def test_it_runs_on_the_tensors_gpu_and_each_gpu_has_its_own_kernel(launch, monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *why: Any) -> None:
            current.pop()

    seen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(
        Kernel, "__getitem__", lambda k, g: lambda *a, **o: seen.append(current[-1]) or Compiled()
    )
    monkeypatch.setattr(
        Compiled, "__getitem__", lambda k, g: lambda *a: seen.append(("again", current[-1]))
    )
    for index in (1, 0, 1, 0):
        launch.run(torch.device("cuda", index))
    assert seen == [1, 0, ("again", 1), ("again", 0)] and current == [0]


def test_a_launch_that_takes_no_numbers_is_bound_too():
    made = launches(bias=torch.empty(128256, device="meta"))
    assert ["seed" in launch.kernel.arg_names for launch in made] == [True, False, True]
    bound = [compiled.BoundLaunch(launch) for launch in made]
    lengths = [len(x._before) + 2 * x._numbered + len(x._after) for x in bound]
    assert lengths == [len(launch.kernel.arg_names) for launch in made]
