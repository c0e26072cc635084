"""One base with LoRA adapters against separate PEFT models, each with a base of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mod_fused

from .conftest import Case, cases, engine, expected, tokens
from .test_models import checkpoint

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def adapter(folder: Path, base: str, seed: int, **options: Any) -> str:
    """An adapter with random matrices, strong enough to make another policy."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**given | options))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
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


def drawn(llm: Any, requests: list[Case], **more: Any) -> list[Any]:
    params = [c.params(**more) for c in requests]
    return llm.generate([c.prompt for c in requests], params, use_tqdm=False)


def test_mixed_requests(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "llama")
    names = adapters(tmp_path, base)
    llm = engine(model=base, hf_overrides=overrides(names))
    requests = given(40, 40)
    outputs = drawn(llm, requests)
    wanted = [tokens(out) for out in expected(separate(base, names), requests)]
    assert [list(out.outputs[0].token_ids) for out in outputs] == wanted
