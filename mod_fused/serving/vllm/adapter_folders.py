"""PEFT folders with LoRA adapters: found, and checked against their base before it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import (
    get_adapter_absolute_path,
    is_base_embedding_weights,
    parse_fine_tuned_lora_name,
)

from ...decoding.adapter_loading import same_name

#: The architectures that take adapters, and whether embeddings and heads do, too.
FAMILIES = {
    "LlamaForCausalLM": True,
    "MistralForCausalLM": False,
    "Qwen2ForCausalLM": False,
    "Qwen3ForCausalLM": True,
}
_WEIGHTS = "adapter_model.safetensors"
#: Fields of adapter_config.json that change nothing once an adapter is trained and saved; vLLM's
#: PEFTHelper judges those that it has.
_HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "exclude_modules", "lora_dropout", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
    "runtime_config",
}


class Shape(NamedTuple):
    """What all adapters together need of the base."""

    rank: int  # the highest
    modules: list[str]  # the ends of the modules' names, such as q_proj


def names_of(hf_config: Any) -> list[str]:
    """The adapters that the engine was started with; none where the policies are whole models."""
    return list(getattr(hf_config, "mod_fused_adapters", None) or [])


def folder_of(name: str) -> str:
    """The folder of an adapter, which vLLM downloads for a hub name."""
    return get_adapter_absolute_path(name)


def tokenizer_of(name: str) -> str | None:
    """Where an adapter's own tokenizer is; None: it has the base's."""
    folder = folder_of(name)
    return folder if (Path(folder) / "tokenizer_config.json").is_file() else None


def saved_embeddings(folder: str) -> Iterator[tuple[str, Tensor]]:
    """The modules whose own weights PEFT has saved beside an adapter on them, and these weights."""
    with safe_open(Path(folder) / _WEIGHTS, framework="pt") as file:
        for key in filter(is_base_embedding_weights, file.keys()):
            yield _base_layer(key), file.get_tensor(key)


def check_adapters(names: Sequence[str], base: ModelConfig, check_base: bool) -> Shape:
    """Check all adapters; with `check_base` also the name of the base that they were made for.

    Raises:
        ValueError: for a base that takes no adapters; naming the first adapter that does not fit.
    """
    if base.architecture not in FAMILIES:
        raise ValueError(
            f"mod_fused_adapters needs a base of {sorted(FAMILIES)}, got {base.architecture}"
        )
    for name in ("quantization_config", "dual_chunk_attention_config"):
        if getattr(base.hf_config, name, None) is not None:
            raise ValueError(f"mod_fused_adapters does not support a base with {name}")
    if base.quantization is not None:
        raise ValueError(f"mod_fused_adapters does not support --quantization {base.quantization}")
    weights = _weights(base)
    rank = 0
    modules: set[str] = set()
    for index, name in enumerate(names, 1):
        try:
            ranks = _check(folder_of(name), base, weights, check_base)
        except Exception as error:
            raise ValueError(f"adapter {index} ({name}) cannot be served: {error}") from error
        rank = max(rank, *ranks.values())
        modules |= {module.rpartition(".")[2] for module in ranks}
    return Shape(rank, sorted(modules))


def _weights(base: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The modules that an adapter can be put on, by transformers' names, and their weights' sizes:
    [outputs, inputs], [tokens, width] for the embedding."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.hf_config)
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }


def _check(
    folder: str, base: ModelConfig, weights: Mapping[str, tuple[int, ...]], check_base: bool
) -> dict[str, int]:
    """The rank of each module that the adapter changes."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    helper = _helper(config)
    if not (Path(folder) / _WEIGHTS).is_file():
        raise ValueError(f"it has no {_WEIGHTS}")
    found: dict[str, dict[str, list[int]]] = {}
    with safe_open(Path(folder) / _WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118, it is no dict
            size = file.get_slice(key).get_shape()
            if is_base_embedding_weights(key):
                _same(key, size, weights[_base_layer(key)])
                continue
            module, is_a = parse_fine_tuned_lora_name(key)
            if module not in weights:
                raise ValueError(f"the base has no module {module} with a weight")
            found.setdefault(module, {})["A" if is_a else "B"] = size
    expected = {name for name in weights if _targeted(name, config)}
    missing = sorted(name for name in expected if len(found.get(name, {})) < 2)
    if missing:
        raise ValueError(f"its file lacks matrices of {len(missing)} modules, such as {missing[0]}")
    more = sorted(found.keys() - expected)
    if more:
        raise ValueError(f"its file has matrices of {more[0]}, which is none of its target_modules")
    if not found:
        raise ValueError("it changes no module of the base")
    ranks = {}
    for module, sizes in found.items():
        embedding = module.endswith("embed_tokens")
        if (embedding or module == "lm_head") and not FAMILIES[base.architecture]:
            raise ValueError(f"vLLM takes no adapter on {module} of {base.architecture}")
        rank, _ = helper.get_rank_and_scaling(module)
        tall, wide = weights[module]
        outputs, inputs = (wide, tall) if embedding else (tall, wide)
        _same(f"{module} (A)", sizes["A"], (rank, inputs))
        _same(f"{module} (B)", sizes["B"], (outputs, rank))
        ranks[module] = rank
    made_for = config.get("base_model_name_or_path")
    if check_base and made_for and not same_name(made_for, base.model):
        raise ValueError(
            f"it was made for the base model {made_for}, got {base.model}: if they are the same, "
            'put "mod_fused_check_base": false into --hf-overrides'
        )
    return ranks


def _helper(config: Mapping[str, Any]) -> PEFTHelper:
    """vLLM's reader of the configuration, which refuses what vLLM's own LoRA does not support."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"it is an adapter of the kind {config.get('peft_type')}, not LORA")
    known = _HARMLESS | {field.name for field in fields(PEFTHelper)}
    unknown = sorted(key for key, value in config.items() if value and key not in known)
    if config.get("modules_to_save"):
        unknown.append("modules_to_save")
    if unknown:
        raise ValueError(f"{', '.join(unknown)} in its adapter_config.json is not supported")
    helper = PEFTHelper.from_dict(dict(config))
    if problems := helper._validate_features():
        raise ValueError(" ".join(problems))
    if helper.bias != "none":
        raise ValueError(f"bias={helper.bias!r} is not supported")
    return helper


def _targeted(name: str, config: Mapping[str, Any]) -> bool:
    """PEFT's rule for which modules of a model an adapter changes."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if _matches(name, config.get("exclude_modules")) or not _matches(name, targets):
        return False
    if isinstance(targets, str) or name in targets or layers in (None, []):
        return True
    layer = re.search(r"\.(\d+)\.", name)
    return layer is not None and int(layer[1]) in (layers if isinstance(layers, list) else [layers])


def _matches(name: str, targets: str | Sequence[str] | None) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _base_layer(key: str) -> str:
    return key.removeprefix("base_model.model.").removesuffix(".base_layer.weight")


def _same(what: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"the tensor of {what} must have the shape {list(expected)} on this base, "
            f"got {list(found)}"
        )
