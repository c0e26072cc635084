"""The case `filters`: temperature, top-k, top-p, min-p and masks, on one distribution and on a
mixture, beside logits processors and torch.multinomial, as serving stacks use them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..case import Case, Contestant, Grid
from ..contestants import eager
from ..measure import Call
from ..problem import FILTERS as NAMED
from ..problem import Problem
from ..problem import filters as filters_of


def _log_probs(problem: Problem, logits: list[Tensor]) -> Tensor:
    """The log-probabilities that the peers filter: float32 [B, V]."""
    if not problem.reference and len(logits) == 1:
        return logits[0].float()
    return eager.probabilities(logits, problem.weights, problem.divergence).log()


def _transformers(problem: Problem, logits: list[Tensor]) -> Call:
    """Sampling as in transformers' `generate`: its processors, softmax, multinomial."""
    import transformers

    options = filters_of(problem, logits[0].device)
    mask = options.pop("mask", None)
    kinds = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    processors = [kinds[name](value) for name, value in options.items()]

    def sample() -> Tensor:
        scores = _log_probs(problem, logits)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        for processor in processors:
            scores = processor(None, scores)
        return torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)

    return sample


_SINGLE = Grid(
    dtypes=("bfloat16",),
    shapes=((1, 128256), (8, 128256)),
    threads=(1,),
    divergences=("reverse_kl",),
    policies=(1,),
    filters=tuple(NAMED),
    reference=False,
)
_MIXTURE = _SINGLE._replace(divergences=("reverse_kl", "jsd"), policies=(2,), reference=True)

FILTERS = Case(
    help="filters on one distribution and on mixtures, beside logits processors",
    backends=("cpu",),
    contestants={"transformers": Contestant(_transformers)},
    grids=(_SINGLE, _MIXTURE),
    quick=tuple(grid._replace(shapes=((2, 2048),)) for grid in (_SINGLE, _MIXTURE)),
)
