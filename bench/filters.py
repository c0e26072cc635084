"""The case `filters`: temperature, top-k, top-p, min-p and masks, on one distribution and on a
mixture, beside what serving stacks do: logits processors and torch.multinomial."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import eager
from .measure import Call
from .problem import FILTERS as NAMED
from .problem import Problem
from .problem import filters as filters_of
from .registry import Case, Contestant, Grid, NotTimed


def _log_probs(problem: Problem, logits: list[Tensor]) -> Tensor:
    """What the filters of the peers start from: float32 [B, V]."""
    if not problem.reference and len(logits) == 1:
        return logits[0].float()
    return eager.probabilities(logits, problem.weights, problem.divergence).log()


def _transformers(problem: Problem, logits: list[Tensor]) -> Call:
    """As `generate` of transformers samples: processors in its order, softmax, multinomial."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    options = filters_of(problem, logits[0].device)
    mask = options.pop("mask", None)
    kinds = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
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


def _one_tensor(problem: Problem, logits: list[Tensor], peer: str) -> Tensor:
    """Logits float32 [B, V] for a sampler of one tensor."""
    if problem.reference or len(logits) != 1:
        raise NotTimed(f"{peer} samples from one tensor of logits")
    return logits[0].float()


def _flashinfer(problem: Problem, logits: list[Tensor]) -> Call:
    import flashinfer  # type: ignore[import-not-found]

    one = _one_tensor(problem, logits, "FlashInfer")
    options = filters_of(problem, one.device)
    if not one.is_cuda:
        raise NotTimed("FlashInfer runs on a GPU")
    calls = {
        "": flashinfer.sampling.sampling_from_logits,
        "top_k": flashinfer.sampling.top_k_sampling_from_probs,
        "top_p": flashinfer.sampling.top_p_sampling_from_probs,
        "min_p": flashinfer.sampling.min_p_sampling_from_probs,
    }
    name, value = next(iter(options.items()), ("", None))
    if len(options) > 1 or name not in calls:
        raise NotTimed(f"FlashInfer has no sampler for {problem.filters}")
    if not options:
        return functools.partial(calls[""], one)
    return lambda: calls[name](torch.softmax(one, -1), value)


def _vllm(problem: Problem, logits: list[Tensor]) -> Call:
    """vLLM's native top-k and top-p; its other filters are separate steps of its sampler."""
    from vllm.v1.sample.ops.topk_topp_sampler import (  # type: ignore[import-not-found]
        TopKTopPSampler,
    )

    one = _one_tensor(problem, logits, "vLLM's sampler")
    options = filters_of(problem, one.device)
    if not set(options) <= {"top_k", "top_p"}:
        raise NotTimed(f"vLLM's TopKTopPSampler does not do {problem.filters}")
    rows, device = problem.batch, one.device
    k = torch.full((rows,), options["top_k"], device=device) if "top_k" in options else None
    p = torch.full((rows,), options["top_p"], device=device) if "top_p" in options else None
    sampler = TopKTopPSampler()
    # It works in place: a copy each call.
    return lambda: sampler.forward_native(one.clone(), {}, k, p)


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
    help="filters on one distribution and on mixtures, beside logits processors and samplers",
    backends=("cpu",),
    contestants={
        "transformers": Contestant(_transformers),
        "flashinfer": Contestant(_flashinfer),
        "vllm": Contestant(_vllm),
    },
    grids=(_SINGLE, _MIXTURE),
    quick=tuple(grid._replace(shapes=((2, 2048),)) for grid in (_SINGLE, _MIXTURE)),
)
