"""The other schedules (bench/gpu/schedules.py) compiled for GPUs that need not be here; what they
compute is checked in test_gpu_check.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interpreter import INTERPRETED

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is not installed

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mod_fused.triton_kernels.ahead_of_time import (  # noqa: E402
    TARGETS,
    compile_launch,
    machine_code,
)
from test_triton_compile import launches  # noqa: E402

from bench.gpu import schedules  # noqa: E402

CASES = [
    ("sm_90", "jsd", "a launch per phase"),
    ("sm_90", "jsd", "resident"),
    ("sm_90", "jsd", "1 evaluations"),
    ("sm_90", "jeffrey", "resident"),
    ("gfx942", "jsd", "a launch per phase"),
    ("gfx942", "jsd", "resident"),
]


@pytest.mark.parametrize(("target", "divergence", "name"), CASES, ids=["-".join(c) for c in CASES])
def test_other_schedules_spill_nothing(
    target: str, divergence: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "processors", lambda device: 132)
    (shipped,) = launches(divergence=divergence)
    changed = schedules.SCHEDULES[name](shipped)
    assert changed
    for one in changed:
        code = machine_code(compile_launch(one, TARGETS[target]))
        print(f"{name} {one.kernel.__name__} {one.arguments[-1]}: {code}")
        assert (code.spills, code.stack) == (0, 0), code
        if name == "resident":  # as many programs as it counts on have room in 65536 registers
            assert code.registers * one.threads * schedules.RESIDENT_PROGRAMS <= 65536, code
