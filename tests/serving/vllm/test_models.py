"""Ensembles of models that differ, and several ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import mod_fused
from mod_fused import world

from .conftest import Case, cases, engine, expected, overrides, tokens

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHAPES = {
    "llama": (LlamaConfig, {"hidden_size": 64, "num_attention_heads": 2}, 904),
    # Fewer KV heads, biases, and a padded vocabulary.
    "qwen2": (
        Qwen2Config,
        {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
        960,
    ),
    # More layers, untied embeddings.
    "mistral": (
        MistralConfig,
        {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie": False},
        904,
    ),
    # Norms of queries and keys.
    "qwen3": (
        Qwen3Config,
        {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        904,
    ),
}


def checkpoint(folder: Path, name: str, seed: int = 0) -> str:
    """A small model with random weights and the embedded models' tokenizer."""
    kind, sizes, vocab = SHAPES[name]
    sizes = dict(sizes)
    config = kind(
        vocab_size=vocab,
        intermediate_size=96,
        num_hidden_layers=3 if name == "mistral" else 2,
        max_position_embeddings=256,
        tie_word_embeddings=sizes.pop("tie", True),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,  # else all tokens are about equally likely
        **sizes,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    target = folder / f"{name}{seed}"
    model.save_pretrained(target)
    for file in TOKENIZER:
        source = Path(world.checkpoint("reference")) / file
        if source.is_file():
            shutil.copy(source, target)
    return str(target)


def loaded(names: list[str]) -> mod_fused.Ensemble:
    """The models for `generate`, all with the reference's tokenizer, as inside vLLM: transformers
    may make another one of the same files, by the model's type."""
    models = [AutoModelForCausalLM.from_pretrained(name) for name in names]
    return mod_fused.Ensemble(models, AutoTokenizer.from_pretrained(names[0]))


def test_sizes_families_and_padded_vocabularies(tmp_path: Path) -> None:
    names = [checkpoint(tmp_path, name) for name in ("llama", "qwen2", "mistral")]
    # A policy with ends of its own: one that is often drawn, one that no other model has.
    GenerationConfig(eos_token_id=[2, 195, 950]).save_pretrained(names[1])
    llm = engine(model=names[0], hf_overrides=overrides(mod_fused_policies=names[1:]))
    ensemble = loaded(names)
    given = [
        Case(
            *(c.prompt, [0.5, 0.4], c.divergence, c.normalizer, c.history, None),
            seed=i,
            min_tokens=4 * (i % 2),
        )
        for i, c in enumerate(cases(30, seed=21))
    ]
    outputs = llm.generate([c.prompt for c in given], [c.params() for c in given], use_tqdm=False)
    wanted = [tokens(out) for out in expected(ensemble, given)]
    assert [list(out.outputs[0].token_ids) for out in outputs] == wanted
    assert any(answer[-1] == 195 for answer in wanted)


def quantised(path: str) -> str:
    """Turn a checkpoint's layers into 8-bit integers, a scale for each row (compressed-tensors)."""
    file, weights = Path(path) / "model.safetensors", {}
    for key, weight in load_file(file).items():
        weights[key] = weight
        if key.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights |= {key: (weight / scale).round().to(torch.int8), f"{key}_scale": scale}
    save_file(weights, file, {"format": "pt"})
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    layers = {
        "targets": ["Linear"],
        "weights": bits | {"strategy": "channel", "dynamic": False},
        "input_activations": bits | {"strategy": "token", "dynamic": True},
    }
    config = LlamaConfig.from_pretrained(path)
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": layers},
    }
    config.save_pretrained(path)
    return path


def test_quantised_models_against_vllm_alone(tmp_path: Path) -> None:
    names = [quantised(checkpoint(tmp_path, "llama", seed)) for seed in range(2)]
    prompts = [c.prompt for c in cases(4, seed=24)]
    greedy = Case("", [1.0], temperature=0.0, max_tokens=16)
    given = {"dtype": "bfloat16", "max_num_seqs": 4}
    alone = engine(model=names[1], hf_overrides={}, **given)
    wanted = alone.generate(prompts, greedy.params(extra_args=None), use_tqdm=False)
    llm = engine(model=names[0], hf_overrides=overrides(mod_fused_policies=names[1:]), **given)
    outputs = llm.generate(prompts, greedy.params(), use_tqdm=False)
    assert [x.outputs[0].token_ids for x in outputs] == [x.outputs[0].token_ids for x in wanted]


def test_compiled_models_of_one_shape_keep_their_weights(tmp_path: Path) -> None:
    names = [checkpoint(tmp_path, "llama", seed) for seed in range(3)]
    llm = engine(
        model=names[0],
        hf_overrides=overrides(mod_fused_policies=names[1:]),
        enforce_eager=False,
        max_num_seqs=4,
    )
    ensemble = loaded(names)
    given = [Case(c.prompt, [0.8, 0.7], temperature=0.0, max_tokens=12) for c in cases(4, seed=22)]
    outputs = llm.generate([c.prompt for c in given], [c.params() for c in given], use_tqdm=False)
    wanted = [tokens(out) for out in expected(ensemble, given)]
    assert [list(out.outputs[0].token_ids) for out in outputs] == wanted


def test_two_ranks(ensemble: mod_fused.Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's own binding wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = engine(tensor_parallel_size=2)
    given = cases(30, seed=23)
    outputs = llm.generate([c.prompt for c in given], [c.params() for c in given], use_tqdm=False)
    wanted = [tokens(out) for out in expected(ensemble, given)]
    assert [list(out.outputs[0].token_ids) for out in outputs] == wanted
    # Without seeds both ranks must draw the same: else their caches would part, and the
    # log-probabilities of the answer with them.
    params = [c.params(seed=None, logprobs=0) for c in given]
    checked = 0
    outputs = llm.generate([c.prompt for c in given], params, use_tqdm=False)
    for case, out in zip(given, outputs, strict=True):
        answer = out.outputs[0]
        again = mod_fused.loglikelihood(
            ensemble,
            [case.prompt],
            [list(answer.token_ids)],
            weights=case.weights,
            divergence=case.divergence,
            normalizer=case.normalizer,
            sequence_history=case.history,
            plausibility=None,
        )
        if (
            case.plausibility is None
            or case.divergence == "reverse_kl"
            and case.plausibility == "auto"
        ):
            assert answer.cumulative_logprob == pytest.approx(float(again.totals[0]), abs=1e-3)
            checked += 1
    assert checked > 5
