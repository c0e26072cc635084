"""One base with LoRA adapters against separate PEFT models, each with a base of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from vllm import LLM

import mod_fused
from mod_fused.serving.vllm.adapters import Adapted

from .conftest import REFERENCE, Case, cases, engine, expected, tokens
from .test_config import configure
from .test_models import checkpoint, quantised

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
        adapter(
            *(folder, base, 1),
            r=3,
            rank_pattern={"v_proj": 5},
            alpha_pattern={"down_proj": 6},
            target_modules=["q_proj", "v_proj", *MLP],
        ),
        adapter(folder, base, 2, r=8, use_rslora=True, target_modules=[*ATTENTION, "up_proj"]),
    ]


def separate(base: str, names: list[str]) -> mod_fused.Ensemble:
    """The models for `generate`: a base of its own for each adapter."""
    models = [AutoModelForCausalLM.from_pretrained(base) for _ in range(len(names) + 1)]
    adapted = [PeftModel.from_pretrained(m, n) for m, n in zip(models[1:], names, strict=True)]
    return mod_fused.Ensemble([models[0], *adapted], AutoTokenizer.from_pretrained(base))


def two_policies(count: int, seed: int, **more: Any) -> list[Case]:
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
    requests = two_policies(40, 40)
    assert drawn(answers(llm, requests)) == wanted(ensemble, requests)


def test_a_token_takes_the_keys_and_values_of_every_model(
    pair: tuple[LLM, mod_fused.Ensemble],
) -> None:
    config = pair[0].llm_engine.vllm_config.cache_config
    # Models, keys and values, layers, heads times head size, bytes of a number.
    per_token = 3 * 2 * 2 * 64 * 4
    assert config.num_gpu_blocks == (128 << 20) // (per_token * config.block_size)


def test_each_models_log_probabilities(pair: tuple[LLM, mod_fused.Ensemble]) -> None:
    llm, ensemble = pair
    requests = two_policies(20, 41, history=False)
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
        replace(c, prompt=f"{long} {c.prompt}")
        for c in two_policies(24, 43, history=True, max_tokens=60)
    ]
    outputs = answers(llm, requests)
    assert [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"][0] > 0
    assert hits(llm) > 0
    assert drawn(outputs) == wanted(separate(base, names), requests)


def test_compiled(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "mistral")
    names = adapters(tmp_path, base)
    llm = engine(model=base, hf_overrides=overrides(names), enforce_eager=False, max_num_seqs=4)
    requests = two_policies(12, 44, max_tokens=12)
    assert drawn(answers(llm, requests)) == wanted(separate(base, names), requests)


def test_saved_embeddings_must_be_those_of_the_base() -> None:
    base = nn.Module()
    base.embed_tokens = nn.Embedding(3, 4)
    base.embed_tokens.shard_indices = SimpleNamespace(
        org_vocab_start_index=5, org_vocab_end_index=8
    )
    saved = torch.randn(9, 4)
    base.embed_tokens.weight.data = saved[5:8].clone()
    one: Any = SimpleNamespace(base=base)  # of three ranks
    Adapted._check_embedding(one, "adapter 1", "embed_tokens", saved)
    saved[6, 2] += 1
    with pytest.raises(ValueError, match="adapter 1 comes with other weights of embed_tokens"):
        Adapted._check_embedding(one, "adapter 1", "embed_tokens", saved)


def test_two_ranks_with_adapters_on_embedding_and_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's own binding wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    base = checkpoint(tmp_path, "qwen3")
    modules = r".*\.(embed_tokens|1\..*\.[qo]_proj)|lm_head"
    names = [*adapters(tmp_path, base), adapter(tmp_path, base, 3, target_modules=modules)]
    llm = engine(model=base, hf_overrides=overrides(names), tensor_parallel_size=2)
    requests = [replace(c, weights=[0.3, 0.3, 0.4]) for c in two_policies(20, 45)]
    assert drawn(answers(llm, requests)) == wanted(separate(base, names), requests)


def damaged(folder: str, **config: Any) -> str:
    """Change fields of an adapter's configuration."""
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def rewritten(folder: str, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> str:
    """Change an adapter's tensors."""
    file = Path(folder) / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


def without(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if part not in key}


REFUSED: dict[str, tuple[Callable[[Path, str], str], str]] = {
    "no folder": (lambda p, b: str(p / "none"), "adapter_config.json"),
    "another base": (
        lambda p, b: adapter(p, checkpoint(p, "qwen2"), 1),
        r"_proj \(A\) must have the shape \[4, 64\] on this base, got \[4, 128\]",
    ),
    "a deeper base": (
        lambda p, b: adapter(p, checkpoint(p, "mistral"), 1),
        r"the base has no module model\.layers\.2\.",
    ),
    "DoRA": (lambda p, b: adapter(p, b, 1, use_dora=True), "DoRA"),
    "bias": (lambda p, b: adapter(p, b, 1, bias="all"), "bias"),
    "a bias of LoRA": (lambda p, b: adapter(p, b, 1, lora_bias=True), "lora_bias"),
    "modules_to_save": (lambda p, b: adapter(p, b, 1, modules_to_save=["lm_head"]), "modules_to"),
    "tokens": (
        lambda p, b: adapter(p, b, 1, trainable_token_indices=[5]),
        "trainable_token_indices",
    ),
    "another method": (lambda p, b: damaged(adapter(p, b, 1), peft_type="LOHA"), "LOHA, not LORA"),
    "a field of tomorrow": (lambda p, b: damaged(adapter(p, b, 1), use_xyz=True), "use_xyz"),
    "a missing matrix": (
        lambda p, b: rewritten(
            adapter(p, b, 1), lambda t: without(t, "layers.1.self_attn.q_proj.lora_B")
        ),
        r"lacks matrices of 1 modules, such as model\.layers\.1\.self_attn\.q_proj",
    ),
    "a missing layer": (
        lambda p, b: rewritten(adapter(p, b, 1), lambda t: without(t, "layers.1.")),
        "lacks matrices of 4 modules",
    ),
    "an unexpected matrix": (
        lambda p, b: damaged(adapter(p, b, 1), target_modules=["q_proj", "k_proj", "v_proj"]),
        "o_proj, which is none of its target_modules",
    ),
    "a base of another name": (
        lambda p, b: damaged(adapter(p, b, 1), base_model_name_or_path="org/another"),
        "made for the base model org/another, got .*mod_fused_check_base",
    ),
    "another rank": (lambda p, b: damaged(adapter(p, b, 1), r=8), r"\(A\) must have the shape \[8"),
    "pickles": (
        lambda p, b: str(
            (Path(adapter(p, b, 1)) / "adapter_model.safetensors")
            .rename(p / "adapter1" / "adapter_model.bin")
            .parent
        ),
        "it has no adapter_model.safetensors",
    ),
    "another tokenizer": (lambda p, b: retokenised(adapter(p, b, 1)), "policy 1"),
}


def retokenised(folder: str) -> str:
    """Give an adapter a tokenizer in which two tokens have changed places."""
    tokenizer = json.loads((Path(REFERENCE) / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = [token for token, i in vocab.items() if i in (300, 301)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (Path(folder) / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(Path(REFERENCE) / "tokenizer_config.json", folder)
    return folder


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, kind: str) -> None:
    make, word = REFUSED[kind]
    base = checkpoint(tmp_path, "llama")
    with pytest.raises(Exception, match=word) as error:
        configure(model=base, hf_overrides=overrides([make(tmp_path, base)]))
    assert kind == "another tokenizer" or "adapter 1 (" in str(error.value)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"mod_fused_policies": [REFERENCE]}, "one of .*, got both"),
        ({"mod_fused_adapters": []}, "mod_fused_adapters must name 1 to 8 policies, got 0"),
        ({"mod_fused_adapters": "A"}, "mod_fused_adapters in --hf-overrides must be a list"),
    ],
)
def test_overrides_that_say_no_ensemble_are_refused(more: dict[str, Any], word: str) -> None:
    with pytest.raises(Exception, match=word):
        configure(hf_overrides=overrides(["A"]) | more)


def test_bases_that_take_no_adapters_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "llama")
    names = [adapter(tmp_path, base, 1)]
    other = shutil.copytree(base, tmp_path / "other")
    config = LlamaConfig.from_pretrained(base)
    config.architectures = ["InternLM3ForCausalLM"]
    config.save_pretrained(other)
    with pytest.raises(Exception, match="needs a base of .*Qwen3.*, got InternLM3ForCausalLM"):
        configure(model=str(other), hf_overrides=overrides(names))
    # No adapters on the embedding where vLLM has none.
    qwen2 = checkpoint(tmp_path, "qwen2")
    wide = adapter(tmp_path, qwen2, 2, target_modules=["embed_tokens"])
    with pytest.raises(Exception, match="vLLM takes no adapter on model.embed_tokens of Qwen2"):
        configure(model=qwen2, hf_overrides=overrides([wide]))
    with pytest.raises(Exception, match="quantization_config"):
        configure(model=quantised(base), hf_overrides=overrides(names), dtype="bfloat16")


def test_an_adapter_may_lie_elsewhere_and_change_some_layers(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "llama")
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere" / Path(base).name))
    other = damaged(adapter(tmp_path, base, 4), base_model_name_or_path="org/another")
    names = [
        other,
        adapter(tmp_path, base, 1, r=700, layers_to_transform=1),
        adapter(tmp_path, base, 2, target_modules=r".*\.0\.mlp\.(up|down)_proj"),
        adapter(tmp_path, base, 3, rank_pattern={"q_proj": 9}, exclude_modules=["o_proj"]),
    ]
    unchecked = overrides(names) | {"mod_fused_check_base": False}
    found = configure(model=str(moved), hf_overrides=unchecked).model_config.hf_config
    assert found.mod_fused_rank == 700
    assert found.mod_fused_modules == sorted([*ATTENTION, "up_proj", "down_proj"])
    configure(model=str(moved), hf_overrides=overrides(names[1:]))
