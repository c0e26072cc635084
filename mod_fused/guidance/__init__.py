"""Value-guided decoding: trained scorers that steer a frozen reference.

    guide = guidance.Guidance.embedded(["helpful"])                        # a trained scorer
    mod_fused.generate(models, prompts, weights=[], value_fn=guide, value_weights=[10.0])
    mod_fused.generate(models, prompts, weights=[], **guidance.fudge(classifier))
    guidance.blockwise_best_of_k(models, prompts, score_fn=score, k=4, block_length=8)

A scorer is an ordinary Hugging Face model, so transformers loads, saves and runs it.
`python -m mod_fused.training.embedded_scorers` trains the scorers of the embedded world.
"""

from typing import Any

from .blockwise import (
    BlockwiseOutput,
    best_of_n,
    blockwise_best_of_k,
    prefix_score,
    response_score,
)
from .guide import Guidance, GuidanceState
from .recipes import args, controlled_decoding, fudge, mavis, pad, rad, soft_values
from .scorers import Scorer
from .worst_case import WorstCase, WorstCaseWeights, robust, worst_case_weights

__all__ = [
    "BlockwiseOutput",
    "Guidance",
    "GuidanceState",
    "Scorer",
    "WorstCase",
    "WorstCaseWeights",
    "args",
    "best_of_n",
    "blockwise_best_of_k",
    "controlled_decoding",
    "fudge",
    "mavis",
    "pad",
    "prefix_score",
    "rad",
    "response_score",
    "robust",
    "soft_values",
    "train_mavis",
    "train_scorer",
    "worst_case_weights",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # mod_fused.training imports this package, so its two functions are imported when used.
    if name in ("train_mavis", "train_scorer"):
        from importlib import import_module

        module = "policy_iteration" if name == "train_mavis" else "scorers"
        return getattr(import_module(f"mod_fused.training.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
