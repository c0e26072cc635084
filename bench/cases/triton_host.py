"""The case `triton_host`: what a call of the backend `triton` costs in Python, without a GPU.

Kernels are replaced by compiled ones that do nothing, so that the clock stops where Triton's
launcher in C would begin. Before that everything is as it is on a GPU, Triton's own Python
included, but for two look-ups of the current device. The launcher itself comes on top.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import mod_fused

from .. import measure, report
from ..case import Procedure
from ..problem import FILTERS, WEIGHTS

VOCAB = 128256
_ROWS = [(d, f) for d in ("reverse_kl", "jsd") for f in ("", "top_p=0.9")]


class _Kernel:
    """In place of a kernel: Triton's `CompiledKernel` whose launcher in C does nothing."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names
        self.params = [SimpleNamespace(is_constexpr=x == "variant") for x in self.arg_names]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: _compiled()


def _compiled() -> Any:
    from triton.backends.nvidia.driver import CudaLauncher  # type: ignore[import-untyped]
    from triton.compiler.compiler import CompiledKernel  # type: ignore[import-untyped]

    launcher = CudaLauncher.__new__(CudaLauncher)
    sizes = ("global_scratch_size", "global_scratch_align", "profile_scratch_size")
    flags = ("profile_scratch_align", "launch_cooperative_grid", "launch_pdl", "gsan_enabled")
    vars(launcher).update(dict.fromkeys((*sizes, *flags), 0), num_ctas=1)
    vars(launcher).update(launch=lambda *_: None, arg_annotations=[], kernel_signature=b"")
    kernel = CompiledKernel.__new__(CompiledKernel)
    vars(kernel).update(
        module=0, _module_pid=None, function=0, name="", packed_metadata=(4, 1, 0), src=None,
        _run=launcher,
    )  # fmt: skip
    return kernel


def _calls(divergence: str, filters: str) -> dict[str, measure.Call]:
    logits = [torch.zeros(1, VOCAB, dtype=torch.bfloat16) for _ in range(3)]
    options = {"divergence": divergence, "seed": 1, "backend": "triton", **FILTERS[filters]}
    arguments = (logits[0], logits[1:], list(WEIGHTS))
    step = mod_fused.plan(*arguments, **options)
    sample = functools.partial(mod_fused.sample, *arguments, **options)
    own = functools.partial(sample, out=step.out, workspace=step.workspace)
    calls = {"sample": sample, "into out": own, "plan": step}
    calls["plan, new position"] = functools.partial(step, position=7)
    for call in calls.values():
        call()
    return calls


def show(budget: float) -> None:
    """Measure and print the rows, in a process where TRITON_INTERPRET lets CPU tensors through."""
    from mod_fused.triton_kernels import launch
    from triton.runtime.driver import driver  # type: ignore[import-untyped]

    torch.set_num_threads(1)
    stream = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda index: 0)
    driver.set_active(stream)
    for name in ("mixture_kernel", "filter_kernel"):
        setattr(launch, name, _Kernel(getattr(launch, name)))
    rows = []
    for divergence, filters in _ROWS:
        others = measure.Others()
        timings = measure.timings(measure.rounds(_calls(divergence, filters), budget, 5))
        ratios = {n: t.median_us / timings["sample"].median_us for n, t in timings.items()}
        rows.append(
            {"divergence": divergence, "filters": filters, "batch": 1, "vocab": VOCAB}
            | {"timings": timings, "ratios": ratios, "other_cores": others.cores()}
        )
    print(json.dumps(rows))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    budget = 0.01 if args.quick else 0.3
    words = [sys.executable, "-c", f"from {__name__} import show; show({budget})"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(words, cwd=root, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return {
        "what": "Python's time before a launch",
        "device": f"none: the kernels of triton {metadata.version('triton')} do nothing",
        "rows": json.loads(done.stdout),
    }


TRITON_HOST = Procedure(
    help="what Python costs before a launch on a GPU; needs triton and no GPU",
    options=lambda parser: None,
    run=_run,
    report=report.markdown,
)
