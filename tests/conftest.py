"""Shared by all tests: the backends to run on, and poisoned uninitialised memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import cases`

from interpreter import INTERPRETED, affordable, patch_language_once  # noqa: E402

if INTERPRETED:
    patch_language_once()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter runs its own tests and some of those of the op, and no others run with it."""
    own = {id(item) for item in items if item.get_closest_marker("interpreted")}
    if INTERPRETED:
        own |= {id(item) for item in items if item.get_closest_marker("gpu")}
        keep = own | {*map(id, affordable(items))}
    else:
        keep = {*map(id, items)} - own
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in keep])
    items[:] = [item for item in items if id(item) in keep]


def _targets() -> list[tuple[str, str]]:
    """(backend, device) pairs that work here; a new backend joins every test by being available."""
    from mod_fused.ops import backends

    available = [name for name, status in backends().items() if status == "available"]
    devices = {"torch": ["cpu", "cuda"], "cpu": ["cpu"], "triton": ["cuda"]}
    if INTERPRETED:
        devices = {"torch": [], "cpu": [], "triton": ["cpu"]}
    here = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [(b, d) for b in available for d in devices[b] if d in here]


class Op:
    """The public functions bound to one backend and device. Tensors are moved there and back."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    def _move(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.device.type != self.device:
            return x.to(self.device)
        if isinstance(x, (list, tuple)) and any(isinstance(y, torch.Tensor) for y in x):
            return type(x)(self._move(y) for y in x)
        return x

    def _call(self, function: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {name: self._move(x) for name, x in kwargs.items()}
        return function(*(self._move(x) for x in args), backend=self.backend, **kwargs)

    def log_probs(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        from mod_fused.ops import log_probs

        return self._call(log_probs, args, kwargs).cpu()

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        from mod_fused.ops import sample

        result = self._call(sample, args, kwargs)
        return type(result)(*(x if x is None else x.cpu() for x in result))


@pytest.fixture(params=_targets(), ids="-".join)
def op(request: pytest.FixtureRequest) -> Op:
    """The op on every available backend and device in turn."""
    return Op(*request.param)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """torch.empty and its relatives return NaN or the largest integer: unwritten outputs show."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill is off without it
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
