"""LoRA adapters of a tiny Llama: on one base, and each on a base of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import AutoModelForCausalLM

from mod_fused import Ensemble

peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [3, 3, 4, 4, 5]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
PARTS = ("lora_", "modules_to_save", "trainable_tokens_delta")


def lora(*targets: str, **options: Any) -> Any:
    options = {"r": 4, "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(target_modules=list(targets or ("q_proj", "v_proj")), **options)


KINDS: dict[str, Any] = {
    "plain": lora(),
    "rslora": lora("k_proj", "up_proj", "down_proj", r=2, lora_alpha=7, use_rslora=True),
    "patterns": lora("q_proj", "o_proj", rank_pattern={"q_proj": 6}, alpha_pattern={"o_proj": 3}),
    "dora": lora("o_proj", "gate_proj", r=3, use_dora=True),
    "saved": lora(modules_to_save=["lm_head", "norm"]),
    "embeddings": lora("embed_tokens", "lm_head", "q_proj"),
    "biases": lora(lora_bias=True),
    "tokens": lora(trainable_token_indices=[3, 4, 5, 6, 7]),
}


def filled(model: Any, seed: int) -> Any:
    """The adapter's own weights, so far from 0 that they change what the base says."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in PARTS):
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = parameter * (1 + 0.3 * noise.abs()) if "magnitude" in name else 0.2 * noise
            parameter.data.copy_(scaled)
    return model.eval()


#: A test file takes it as its own: `folders = lora_policies.folders`.
@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Path:
    """A base, and an adapter of each kind."""
    root = tmp_path_factory.mktemp("adapters")
    tiny.llama(0, eos=None).save_pretrained(root / "base")
    tiny.tokenizer(eos_token=None).save_pretrained(root / "base")
    for seed, (kind, config) in enumerate(KINDS.items()):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        filled(peft.get_peft_model(base, copy.deepcopy(config)), seed).save_pretrained(root / kind)
    return root


def separate(folders: Path, kinds: list[str]) -> Ensemble:
    """Each adapter on a base of its own, as PEFT runs it."""

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folders / "base")

    adapted = [peft.PeftModel.from_pretrained(base(), folders / kind).eval() for kind in kinds]
    return Ensemble([base(), *adapted], tiny.tokenizer(eos_token=None))


def shared(folders: Path, kinds: list[str], **options: Any) -> Ensemble:
    return Ensemble.from_adapters(folders / "base", [folders / kind for kind in kinds], **options)


def logits(ensemble: Ensemble, running: list[int], masked: bool = False, copies: int = 1) -> Any:
    """The logits of five steps, [5, running models, rows, V]."""
    ids, mask = [IDS] * len(running), [MASK if masked else None] * len(running)
    state = ensemble.start(ids, mask, max_new_tokens=5, models=running)
    state.fork(copies)
    generator, found = torch.Generator().manual_seed(1), []
    tokens = None
    for step in range(5):
        reference, policies = state.step(tokens)
        each = dict(enumerate([reference, *policies]))
        found.append(torch.stack([each[model] for model in running]))
        tokens = torch.randint(2, tiny.V, (len(IDS) * copies,), generator=generator)
        if step == 2:
            rows = torch.arange(len(tokens)).roll(1)
            state.select(rows)
    return torch.stack(found)


def several() -> Any:
    """A PeftModel with three adapters."""
    model = peft.get_peft_model(tiny.llama(0, eos=None), lora(), "a")
    model.add_adapter("b", lora("k_proj", r=2, lora_alpha=5))
    model.add_adapter("c", lora("o_proj", "down_proj", r=6))
    return filled(model, 3)
