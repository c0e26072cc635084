"""Model Runner V2, vLLM's default on GPUs: here through Triton's interpreter, in its own run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm import LLM
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

import mod_fused

from .conftest import Case, cases, engine, expected, overrides, tokens
from .test_adapters import adapters, separate, two_policies
from .test_models import checkpoint

pytestmark = pytest.mark.interpreted


@pytest.fixture(scope="module")
def small() -> Iterator[LLM]:
    """Too few blocks for all requests at once, and prompts read in parts."""
    yield engine(
        max_num_seqs=6, max_num_batched_tokens=48, block_size=32, num_gpu_blocks_override=10
    )


def test_mixed_requests_preempted_and_resumed(small: LLM, ensemble: mod_fused.Ensemble) -> None:
    long = " ".join(c.prompt for c in cases(8, seed=30))[:150]
    given = [
        replace(c, prompt=f"{long} {c.prompt}", max_tokens=20, history=i % 3 > 0)
        for i, c in enumerate(cases(9, seed=31))
    ]
    params = [c.params(logprobs=5, ignore_eos=True) for c in given]
    for p in params[::2]:
        p.extra_args["mod_model_logprobs"] = True
    outputs = small.generate([c.prompt for c in given], params, use_tqdm=False)
    assert [m.value for m in small.get_metrics() if m.name == "vllm:num_preemptions"][0] > 0
    wanted = expected(ensemble, given, eos_token_id=[])
    for i, (out, want) in enumerate(zip(outputs, wanted, strict=True)):
        answer = out.outputs[0]
        assert list(answer.token_ids) == tokens(want), given[i]
        for step, (token, entries) in enumerate(
            zip(answer.token_ids, answer.logprobs, strict=True)
        ):
            close = 1e-3 if given[i].history else 1e-4
            own = float(want.logprobs[0, step])
            assert entries[token].logprob == pytest.approx(own, abs=close)
            models = [entries[904 + k].logprob for k in range(4) if 904 + k in entries]
            every = want.model_logprobs[0, step].tolist()
            assert models == (pytest.approx(every, abs=1e-4) if i % 2 == 0 else [])


def test_adapters_on_one_base(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "llama")
    names = adapters(tmp_path, base)
    options = {"mod_fused_policies": None, "mod_fused_adapters": names}
    sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 48}
    llm = engine(model=base, hf_overrides=overrides(**options), **sizes)
    requests = two_policies(4, 45, max_tokens=6)
    params = [c.params() for c in requests]
    outputs = llm.generate([c.prompt for c in requests], params, use_tqdm=False)
    wanted = [tokens(out) for out in expected(separate(base, names), requests)]
    assert [list(out.outputs[0].token_ids) for out in outputs] == wanted


def test_a_grammar_holds(small: LLM) -> None:
    choices = [" Take a break.", " Dim the lights."]
    grammar = StructuredOutputsParams(choice=choices)
    params = [Case("", [0.5, 0.2, 0.3], seed=s).params(structured_outputs=grammar) for s in (1, 2)]
    outputs = small.generate(["How do I sleep?"] * 2, params, use_tqdm=False)
    assert {out.outputs[0].text for out in outputs} <= set(choices)


def test_a_bad_request_is_refused(small: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="3 finite numbers"):
        small.generate(["Hi"], [Case("", [1.0]).params()], use_tqdm=False)
