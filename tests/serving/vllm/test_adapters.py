"""One base with LoRA adapters against separate PEFT models, each with a base of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM

import mod_fused

from .conftest import Case, cases, engine, expected, tokens
from .test_models import checkpoint

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def adapter(folder: Path, base: str, seed: int, **options: Any) -> str:
    """An adapter with random matrices, strong enough to make another policy."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**given | options)
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    target = folder / f"adapter{seed}"
    model.save_pretrained(target)
    return str(target)


def adapters(folder: Path, base: str) -> list[str]:
    """Two that differ in rank, modules and scaling."""
    return [
        adapter(folder, base, 1, r=3, target_modules=["q_proj", "v_proj", *MLP]),
        adapter(folder, base, 2, r=8, use_rslora=True, target_modules=[*ATTENTION, "up_proj"]),
    ]


def separate(base: str, names: list[str]) -> mod_fused.Ensemble:
    """The models for `generate`: a base of its own for each adapter."""
    models = [AutoModelForCausalLM.from_pretrained(base) for _ in range(len(names) + 1)]
    adapted = [PeftModel.from_pretrained(m, n) for m, n in zip(models[1:], names, strict=True)]
    return mod_fused.Ensemble([models[0], *adapted], AutoTokenizer.from_pretrained(base))


def given(count: int, seed: int, **more: Any) -> list[Case]:
    """Requests of all kinds for two policies."""
    return [
        Case(**{**vars(c), "weights": [c.weights[0], 1 - c.weights[0]], **more})
        for c in cases(count, seed)
    ]


def overrides(names: list[str], **more: Any) -> dict[str, Any]:
    return {"architectures": ["ModFusedForCausalLM"], "mod_fused_adapters": names, **more}


def answers(llm: LLM, requests: list[Case], **more: Any) -> list[Any]:
    params = [c.params(**more) for c in requests]
    return llm.generate([c.prompt for c in requests], params, use_tqdm=False)


def drawn(outputs: list[Any]) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in outputs]


def wanted(ensemble: mod_fused.Ensemble, requests: list[Case]) -> list[list[int]]:
    return [tokens(out) for out in expected(ensemble, requests)]


def hits(llm: LLM) -> int:
    """How many prompt tokens the prefix cache has given."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, mod_fused.Ensemble]:
    """Both programs with the same models."""
    folder = tmp_path_factory.mktemp("adapters")
    base = checkpoint(folder, "llama")
    names = adapters(folder, base)
    return engine(model=base, hf_overrides=overrides(names)), separate(base, names)


def test_mixed_requests(pair: tuple[LLM, mod_fused.Ensemble]) -> None:
    llm, ensemble = pair
    requests = given(40, 40)
    assert drawn(answers(llm, requests)) == wanted(ensemble, requests)


def test_each_models_log_probabilities(pair: tuple[LLM, mod_fused.Ensemble]) -> None:
    llm, ensemble = pair
    requests = given(20, 41, history=False)
    params = [c.params(logprobs=6) for c in requests]
    for p in params:
        p.extra_args["mod_model_logprobs"] = True
    outputs = llm.generate([c.prompt for c in requests], params, use_tqdm=False)
    apart = 0.0
    for out, want in zip(outputs, expected(ensemble, requests), strict=True):
        assert list(out.outputs[0].token_ids) == tokens(want)
        for step, entries in enumerate(out.outputs[0].logprobs):
            found = [entries[904 + k].logprob for k in range(3)]
            assert found == pytest.approx(want.model_logprobs[0, step].tolist(), abs=5e-5)
            apart = max(apart, min(abs(found[0] - found[1]), abs(found[1] - found[2])))
    assert apart > 2.0  # the models differ


def test_answers_to_one_prompt_share_its_keys_and_values(
    pair: tuple[LLM, mod_fused.Ensemble],
) -> None:
    llm, ensemble = pair
    # A whole block and a rest, which nobody has asked before.
    prompt = " ".join(c.prompt for c in cases(20, 42))[:650]
    case = Case(prompt, [0.4, 0.5], "jsd", seed=7, max_tokens=12)
    length = len(ensemble.tokenizer(prompt).input_ids)
    assert 128 < length < 256 - 12
    before = hits(llm)
    out = answers(llm, [case], n=4)[0]
    want = wanted(ensemble, [replace(case, seed=case.seed + k) for k in range(4)])
    assert [list(x.token_ids) for x in out.outputs] == want
    assert hits(llm) - before == 3 * 128
    # The keys and values of every model are there, whatever the weights were.
    other = replace(case, weights=[0.0, 1.0], divergence="reverse_kl")
    again = answers(llm, [other])[0]
    assert again.num_cached_tokens == 128 and drawn([again]) == wanted(ensemble, [other])


def test_prompts_in_parts_and_preemption(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "qwen2")
    names = adapters(tmp_path, base)
    llm = engine(
        model=base,
        hf_overrides=overrides(names),
        max_num_batched_tokens=64,
        block_size=32,
        num_gpu_blocks_override=14,
        max_num_seqs=16,
    )
    long = " ".join(c.prompt for c in cases(40, seed=10))[:1500]
    requests = [
        replace(c, prompt=f"{long} {c.prompt}") for c in given(24, 43, history=True, max_tokens=60)
    ]
    outputs = answers(llm, requests)
    assert [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"][0] > 0
    assert hits(llm) > 0
    assert drawn(outputs) == wanted(separate(base, names), requests)


def test_compiled(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "mistral")
    names = adapters(tmp_path, base)
    llm = engine(model=base, hf_overrides=overrides(names), enforce_eager=False, max_num_seqs=4)
    requests = given(12, 44, max_tokens=12)
    assert drawn(answers(llm, requests)) == wanted(separate(base, names), requests)


def test_two_ranks_with_adapters_on_embedding_and_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's own binding wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    base = checkpoint(tmp_path, "qwen3")
    modules = ["embed_tokens", "lm_head", *ATTENTION]
    names = [*adapters(tmp_path, base), adapter(tmp_path, base, 3, target_modules=modules)]
    llm = engine(model=base, hf_overrides=overrides(names), tensor_parallel_size=2)
    requests = [replace(c, weights=[0.3, 0.3, 0.4]) for c in given(20, 45)]
    assert drawn(answers(llm, requests)) == wanted(separate(base, names), requests)
