"""Triton's interpreter for tests: TRITON_INTERPRET=1 runs the kernels on CPU tensors."""

from __future__ import annotations

import math
import os
import zlib
from typing import Any

from mod_fused.dispatch.backends import INTERPRETED

__all__ = ["INTERPRETED", "affordable", "patch_language_once"]


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_language_once() -> None:
    """Three times as fast: the interpreter replaces the functions of triton.language at every call
    of a device function, though its launch has done so already."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(fn: Any) -> Any:
        languages = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        patched = all(not tl.core.is_builtin(language.load) for language in languages)
        return _NothingToRestore() if patched else patch(fn)

    interpreter._patch_lang = patch_what_is_not


def affordable(items: list[Any]) -> list[Any]:
    """Of every test that runs on a backend one case and a fourteenth of the others, spread over its
    parameters. INTERPRET=all takes all cases (most of an hour)."""
    tests: dict[str, list[Any]] = {}
    for item in items:
        if "op" in item.fixturenames and not item.get_closest_marker("slow"):
            tests.setdefault(f"{item.path.name}::{item.originalname}", []).append(item)
    chosen = []
    for name, cases in tests.items():
        size = len(cases)
        count = size if os.environ.get("INTERPRET") == "all" else 1 + size // 14
        # A step without a common divisor, so that every parameter changes from case to case.
        step = next(s for s in range(size // count, 2 * size + 1) if math.gcd(s, size) == 1)
        first = zlib.crc32(name.encode())
        chosen += [cases[(first + i * step) % size] for i in range(count)]
    return chosen
