"""Which backend runs, and whether Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from mod_fused.dispatch import backends as dispatch

VALUES = [None, "", "0", "1", "2", "true", "True", "TRUE", "on", "yes", "y", "false", "off", "no"]


@pytest.mark.parametrize("value", VALUES)
def test_triton_is_interpreted_exactly_if_triton_says_so(monkeypatch, value):
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)

    @triton.jit
    def kernel():
        pass

    assert dispatch._interpreted() == (type(kernel) is not triton.JITFunction)


def test_a_knob_that_was_set_before_counts(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton.knobs, "propagate_env", False)  # it would set the variable
    for value in (True, False):
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = value
            assert dispatch._interpreted() == value


def test_without_triton_nothing_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert not dispatch._interpreted()


def test_any_word_of_triton_s_makes_the_kernels_those_of_cpu_tensors():
    pytest.importorskip("triton")
    code = """
        import torch, mod_fused
        assert mod_fused.backends()["triton"] == "available"
        for op in ("sample_triton", "log_probs_triton_out"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mod_fused::{op}", "CPU")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "yes"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)
