"""mod_fused: multi-objective decoding (arXiv 2406.18853) as one fused op, and a small decoder on
it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import recipes
from .divergence import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    JeffreyDivergence,
    JensenShannonDivergence,
    ReverseKL,
    get_divergence,
    register_divergence,
)
from .explain import Explanation, explain
from .ops import Sample, backends, log_probs, reset_workspace, sample, workspace_size
from .plans import Plan, plan
from .warmup import warmup

if TYPE_CHECKING:
    from . import guidance, world
    from .decoding.ensemble import Ensemble
    from .decoding.generate import GenerateOutput, generate
    from .decoding.likelihood import Likelihood, loglikelihood
    from .serving.transformers import custom_generate

__version__ = "0.1.0"
__all__ = [
    "AlphaDivergence",
    "Divergence",
    "Ensemble",
    "Explanation",
    "ForwardKL",
    "GenerateOutput",
    "JeffreyDivergence",
    "JensenShannonDivergence",
    "Likelihood",
    "Plan",
    "ReverseKL",
    "Sample",
    "backends",
    "custom_generate",
    "explain",
    "generate",
    "get_divergence",
    "guidance",
    "log_probs",
    "loglikelihood",
    "plan",
    "recipes",
    "register_divergence",
    "reset_workspace",
    "sample",
    "warmup",
    "workspace_size",
    "world",
]

_LAZY = {
    "Ensemble": "decoding.ensemble",
    "GenerateOutput": "decoding.generate",
    "Likelihood": "decoding.likelihood",
    "custom_generate": "serving.transformers",
    "generate": "decoding.generate",
    "guidance": "guidance",
    "loglikelihood": "decoding.likelihood",
    "world": "world",
}


def __getattr__(name: str) -> Any:
    # The decoder is loaded when it is first used: the op alone imports in a fraction of the time.
    if name in _LAZY:
        from importlib import import_module

        module = import_module(f".{_LAZY[name]}", __name__)
        return module if name == _LAZY[name] else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
