"""The embedded models inside vLLM, and what `mod_fused.generate` draws for the same requests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions sent to workers

import pytest
from vllm import LLM, SamplingParams

import mod_fused
from mod_fused import world

REFERENCE = str(world.checkpoint("reference"))
POLICIES = [str(world.checkpoint(name)) for name in world.OBJECTIVES]
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey"]
WEIGHTS = [[0.5, 0.2, 0.3], [1, 0, 0], [0, 1, 0], [0.33, 0.33, 0.34], [0.1, 0.8, 0.1]]


def overrides(**more: Any) -> dict[str, Any]:
    """The --hf-overrides of the ensemble."""
    return {"architectures": ["ModFusedForCausalLM"], "mod_fused_policies": POLICIES, **more}


def engine(**options: Any) -> LLM:
    """A small engine on the CPU, in float32 unless told otherwise."""
    given = {
        "model": REFERENCE,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "kv_cache_memory_bytes": 128 << 20,
        "max_num_seqs": 64,
        "hf_overrides": overrides(),
        "disable_log_stats": False,
    }
    return LLM(**given | options)


@dataclass(frozen=True)
class Case:
    """A request that both can serve."""

    prompt: str
    weights: Sequence[float]
    divergence: str = "reverse_kl"
    normalizer: str = "exact"
    history: bool = False
    plausibility: float | str | None = "auto"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 32
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def params(self, **more: Any) -> SamplingParams:
        """The request for vLLM."""
        own = {
            "mod_weights": list(self.weights),
            "mod_divergence": self.divergence,
            "mod_normalizer": self.normalizer,
            "mod_sequence_history": self.history,
            "mod_plausibility": self.plausibility,
        }
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")
        given = {name: getattr(self, name) for name in names} | {"extra_args": own}
        given["min_tokens"] = min(self.min_tokens, self.max_tokens)
        given["repetition_penalty"] = self.repetition_penalty
        given["logit_bias"] = dict(self.logit_bias) or None
        return SamplingParams(**given | more)


def cases(count: int, seed: int) -> list[Case]:
    """Requests with all kinds of arguments."""
    draw = random.Random(seed)
    found = []
    for prompt in world.prompts(count, seed=seed):
        divergence = draw.choice(DIVERGENCES)
        extra = [[0.6, 0.6, -0.2]] if divergence == "reverse_kl" else []
        filtered = draw.random() < 0.5
        case = Case(
            prompt,
            draw.choice(WEIGHTS + extra),
            divergence,
            draw.choice(["exact", "exact", "zero"]),
            draw.random() < 0.4,
            draw.choice(["auto", "auto", None, 0.05]),
            draw.choice([1.0, 0.7, 1.3, 0.0]),
            seed=draw.randrange(-(2**63), 2**63),
        )
        if filtered:
            case = replace(
                case,
                top_k=draw.choice([0, 5, 20]),
                top_p=draw.choice([1.0, 0.9]),
                min_p=draw.choice([0.0, 0.05]),
            )
        if draw.random() < 0.3:
            # Not both: vLLM scales log pi* + logit_bias, `generate` log pi* alone.
            penalty = draw.choice([1.0, 1.2, 0.9])
            bias = ((898, -100.0), (173, 2.5), (40, 4.0)) if penalty == 1.0 else ()
            case = replace(
                case,
                min_tokens=draw.choice([0, 12, 24]),
                repetition_penalty=penalty,
                logit_bias=bias,
            )
        found.append(case)
    return found


def expected(
    ensemble: mod_fused.Ensemble, given: Sequence[Case], **more: Any
) -> list[mod_fused.GenerateOutput]:
    """What `generate` draws, one call each: nothing about a batch can enter."""
    return [
        mod_fused.generate(
            ensemble,
            [case.prompt],
            weights=case.weights,
            divergence=case.divergence,
            normalizer=case.normalizer,
            sequence_history=case.history,
            plausibility=case.plausibility,
            temperature=case.temperature,
            top_k=case.top_k,
            top_p=case.top_p,
            min_p=case.min_p,
            seed=[case.seed],
            max_new_tokens=case.max_tokens,
            min_new_tokens=min(case.min_tokens, case.max_tokens),
            repetition_penalty=case.repetition_penalty,
            logit_bias=dict(case.logit_bias) or None,
            return_model_logprobs=True,
            **more,
        )
        for case in given
    ]


def tokens(output: mod_fused.GenerateOutput) -> list[int]:
    """The first response's tokens. Where nothing is left to draw vLLM gets the end of sequence."""
    found = output.tokens[0, : int(output.lengths[0])].tolist()
    return [*found, 2] if output.finish_reasons[0] == "invalid" else found


@pytest.fixture(scope="session")
def ensemble() -> mod_fused.Ensemble:
    return mod_fused.Ensemble.from_pretrained(REFERENCE, POLICIES)


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """Model Runner V1 with vLLM's own CPU kernels."""
    yield engine()
