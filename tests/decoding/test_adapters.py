"""PEFT's adapters: each method as its own `generate`, and bases that are changed in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble, generate
from mod_fused.guidance import Guidance

peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


def adapted(config: Any, base: Any = None, seed: int = 5) -> Any:
    """A model with an adapter that changes what it predicts."""
    model = peft.get_peft_model(tiny.llama(0, eos=None) if base is None else base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "ia3_", "prompt_encoder")):
            with torch.no_grad():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def lora(base: Any = None, seed: int = 5) -> Any:
    return adapted(peft.LoraConfig(r=4, **LORA), base, seed)


def ours(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    fixed: dict[str, Any] = {"weights": [1.0], "do_sample": False, "max_new_tokens": 8}
    fixed |= {"eos_token_id": [], "pad_token_id": 0, **options}
    return generate(Ensemble([tiny.llama(3, eos=None), model]), input_ids=ids, **fixed).tokens


CONFIGS = {
    "lora": peft.LoraConfig(r=4, **LORA),
    "loha": peft.LoHaConfig(r=4, **LORA),
    "ia3": peft.IA3Config(feedforward_modules=[], **LORA),
    "prompt": peft.PromptTuningConfig(**PROMPT),
    "p-tuning": peft.PromptEncoderConfig(encoder_hidden_size=16, **PROMPT),
    "prefix": peft.PrefixTuningConfig(**PROMPT),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_method_equals_its_own_generate_with_and_without_a_cache(method: str) -> None:
    model = adapted(copy.deepcopy(CONFIGS[method]))
    expected = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=8
    )[:, IDS.shape[1] :]
    assert not torch.equal(expected, ours(tiny.llama(0, eos=None)))
    assert torch.equal(ours(model), expected)
    assert torch.equal(ours(model, num_return_sequences=2), expected.repeat_interleave(2, dim=0))
    if method == "prefix":  # PEFT itself cannot
        with pytest.raises(ValueError, match="prefix .* in the cache: pass use_cache=True"):
            ours(model, use_cache=False)
    else:
        assert torch.equal(ours(model, use_cache=False), expected)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_in_front_of_padding_are_refused(method: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="policy 1 puts virtual tokens .* front of the padding"):
        ours(adapted(copy.deepcopy(CONFIGS[method])), attention_mask=mask)


def test_virtual_tokens_take_positions() -> None:
    model = adapted(copy.deepcopy(CONFIGS["prompt"]), tiny.gpt2(0, eos=None))
    options: dict[str, Any] = {"ids": IDS[:, :1], "max_new_tokens": 61}  # 3 + 1 + 60 of 64
    assert ours(model, **options).shape == (2, 61)
    options["max_new_tokens"] += 1
    with pytest.raises(ValueError, match="policy 1 has 64 positions, a prompt of 4 tokens"):
        ours(model, **options)


def test_an_activated_lora_and_a_method_with_task_ids_are_refused() -> None:
    activated = peft.LoraConfig(r=2, alora_invocation_tokens=[3, 4], **LORA)
    with pytest.raises(ValueError, match="policy 1 has an activated LoRA"):
        ours(adapted(activated))
    tasks = peft.MultitaskPromptTuningConfig(num_tasks=2, **PROMPT)
    with pytest.raises(ValueError, match="policy 1 has an adapter .* MULTITASK_PROMPT_TUNING"):
        ours(adapted(tasks))


def test_places_that_share_what_an_adapter_changed_are_refused() -> None:
    base = tiny.llama(0)
    first = lora(base)
    message = "{} and {} share a base model that PEFT has changed in place.*a base model for each"
    with pytest.raises(ValueError, match=message.format("the reference", "policy 1")):
        Ensemble([base, first])
    second = peft.PeftModel(base, peft.LoraConfig(r=2, **LORA), adapter_name="second").eval()
    with pytest.raises(ValueError, match=message.format("policy 1", "policy 2")):
        Ensemble([tiny.llama(1), first, second])
    for change in (first.merge_adapter, first.unload):  # the base is one function at a time
        change()
        with pytest.raises(ValueError, match=message.format("the reference", "policy 1")):
            Ensemble([base, first])


def test_adapters_injected_without_a_peft_model_are_found_in_shared_parts() -> None:
    base = tiny.llama(0)
    other = tiny.llama(1)
    other.model = base.model
    Ensemble([base, other])  # plain modules may be shared: they keep nothing
    base.add_adapter(peft.LoraConfig(r=2, **LORA))
    with pytest.raises(ValueError, match="the reference and policy 1 share"):
        Ensemble([base, other])
    with pytest.raises(ValueError, match="scorer 0 and scorer 1 share"):
        Guidance([base, other])
    with pytest.raises(ValueError, match="policy 1 and scorer 0 share"):
        generate(Ensemble([None, base]), input_ids=IDS, weights=[1.0], value_fn=Guidance([other]))


def test_bases_of_their_own_one_model_twice_and_prompts_on_one_base_are_accepted() -> None:
    base = tiny.llama(0, eos=None)
    first, second = lora(seed=5), lora(seed=6)
    Ensemble([base, first, second, first])
    prompts = [adapted(copy.deepcopy(CONFIGS["prompt"]), base, seed) for seed in (5, 6)]
    ensemble = Ensemble([base, *prompts])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": []}
    for place, model in enumerate(prompts):
        weights = [0.0, 0.0]
        weights[place] = 1.0
        got = generate(ensemble, input_ids=IDS, weights=weights, pad_token_id=0, **options).tokens
        assert torch.equal(got, ours(model)[:, :6])
