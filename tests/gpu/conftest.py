"""The device of the checks on a GPU: `pytest -m gpu tests/gpu`. With TRITON_INTERPRET=1 they run
dry, the same code on CPU tensors of tiny shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

from bench.gpu import device as devices  # noqa: E402


@pytest.fixture(scope="session")
def gpu() -> devices.Gpu:
    """The GPU, or its stand-in; a machine without one fails."""
    devices.link_kernels()
    return devices.make()
