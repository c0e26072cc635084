"""The reference as one base model of vLLM, the policies as LoRA adapters on it.

The base reads the tokens of a step M+1 times, model after model: rows [(M+1) T]. The first T rows
are the reference's. The attentions and the adapters tell the models apart, all else is token-wise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import BaseLayerWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import replace_submodule
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import init_vllm_registered_model

from .adapter_folders import folder_of, names_of, saved_embeddings
from .config import model_configs


class PolicyAttention(nn.Module):
    """The attention of each model, over keys and values of its own."""

    def __init__(self, reference: Attention, policies: int, layers: dict[str, Any]) -> None:
        super().__init__()
        self.each = nn.ModuleList([reference])
        for index in range(1, policies + 1):
            policy = copy.deepcopy(reference)
            # vLLM reads one integer in a layer's name, and takes it for the layer's index.
            policy.layer_name = reference.layer_name.replace("reference.", f"policy{index}.", 1)
            layers[policy.layer_name] = policy
            self.each.append(policy)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All three [(M+1) T, heads of their kind * head size]."""
        of_models = (x.unflatten(0, (len(self.each), -1)).unbind() for x in (query, key, value))
        calls = zip(self.each, *of_models, strict=True)
        return torch.cat([attention(q, k, v) for attention, q, k, v in calls])


class Products:
    """What vLLM's layers with LoRA call. Its own class looks up the adapter of each token; here a
    model's tokens lie together."""

    def __init__(self, policies: int) -> None:
        self._models = policies + 1

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a: tuple[Tensor, ...],
        lora_b: tuple[Tensor, ...],
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Add the adapters' part to the policies' rows of `y`, in the layer's one slice."""
        return self.add_lora_logits(y, x, lora_a[0], lora_b[0])

    def add_lora_logits(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, *_: Any) -> Tensor:
        """The same for y [(M+1) n, out], x [(M+1) n, in], a [M, 1, r, in], b [M, 1, out, r]. Logits
        may be padded beyond the vocabulary."""
        inner = torch.bmm(x.unflatten(0, (self._models, -1))[1:], a[:, 0].mT)
        policies = y[:, : b.shape[2]].unflatten(0, (self._models, -1))[1:]
        policies.baddbmm_(inner, b[:, 0].mT)
        return y


class PolicyEmbedding(nn.Module):
    """The base's embedding, with adapters a [M, V, r] and b [M, 1, width, r]."""

    def __init__(self, layer: VocabParallelEmbeddingWithLoRA) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.a, self.b = layer.lora_a_stacked, layer.lora_b_stacked

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens [(M+1) T] to [(M+1) T, width]."""
        out = self.base_layer(input_ids)
        models = len(self.a) + 1
        ids = input_ids.unflatten(0, (models, -1)).unbind()[1:]
        inner = torch.stack([functional.embedding(i, a) for i, a in zip(ids, self.a, strict=True)])
        out.unflatten(0, (models, -1))[1:].baddbmm_(inner, self.b[:, 0].mT)
        return out


class AdapterManager(LoRAModelManager):
    """vLLM's own manager: it wraps the layers, shards the adapters and fills slots with them."""

    def _init_punica_wrapper(self, *_: Any) -> None:
        self.supports_mm = False
        self.punica_wrapper_mapping = {DEFAULT_LANGUAGE_WRAPPER_KEY: Products(self.lora_slots)}


def join_slices(layer: BaseLayerWithLoRA) -> None:
    """Join the adapters' matrices of a packed layer (q, k and v; gate and up), the inner ones side
    by side, the outer ones in blocks: every layer then costs two products."""
    inner, outer = layer.lora_a_stacked, layer.lora_b_stacked
    if isinstance(inner, Tensor) or len(inner) == 1:
        return
    by_policy = zip(*(b[:, 0] for b in outer), strict=True)
    blocks = [torch.block_diag(*of_policy) for of_policy in by_policy]
    layer.lora_a_stacked = (torch.cat(inner, 2),)
    layer.lora_b_stacked = (torch.stack(blocks)[:, None],)
    layer.output_slices = (len(blocks[0]),)


# Compiled from here, so that compile sizes, ranges and CUDA graphs count the tokens of the step.
@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class Adapted(nn.Module):
    """The models of `ModFusedForCausalLM`: a base and its adapters."""

    secondary_weights: tuple[()] = ()
    vllm_config: VllmConfig  # put there by the decorator

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = model_configs(vllm_config.model_config)[0]
        self._names = names_of(vllm_config.model_config.hf_config)
        self._models = len(self._names) + 1
        self.base = init_vllm_registered_model(
            vllm_config,
            hf_config=config.hf_config,
            prefix="reference",
            architectures=config.hf_config.architectures,
        )
        layers = vllm_config.compilation_config.static_forward_context
        for name, module in list(self.base.named_modules()):
            if isinstance(module, Attention):
                own = PolicyAttention(module, len(self._names), layers)
                replace_submodule(self.base, name, own)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The reference's embeddings."""
        return self.base.embed_input_ids(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states side by side, [tokens, (M+1) * width]."""
        copies = self._models
        hidden = self.base(input_ids.repeat(copies), positions.repeat(copies))
        return hidden.unflatten(0, (copies, -1)).transpose(0, 1).flatten(1)

    def compute_logits(self, hidden_states: Tensor) -> list[Tensor] | None:
        """The models' logits, each [B, V]; None on a rank that does not draw."""
        by_model = hidden_states.unflatten(1, (self._models, -1)).transpose(0, 1)
        logits = self.base.compute_logits(by_model.flatten(0, 1))
        return None if logits is None else list(logits.unflatten(0, (self._models, -1)).unbind())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The base's weights."""
        return {f"base.{key}" for key in self.base.load_weights(weights)}

    def load_adapters(self) -> None:
        """Put the adapters on the base, whose weights are in their final form."""
        model, scheduler = self.vllm_config.model_config, self.vllm_config.scheduler_config
        options = LoRAConfig(
            max_loras=len(self._names),
            lora_dtype=model.dtype,
            target_modules=model.hf_config.mod_fused_modules,
        )
        options.max_lora_rank = model.hf_config.mod_fused_rank  # vLLM takes a few ranks only
        manager = AdapterManager(
            self.base,
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            model.get_vocab_size(),
            options,
            next(self.base.parameters()).device,
            self.vllm_config,
        )
        for index, name in enumerate(self._names, 1):
            folder = folder_of(name)
            for module, weight in saved_embeddings(folder):
                self._check_embedding(f"adapter {index} ({name})", module, weight)
            adapter = LoRAModel.from_local_checkpoint(
                folder,
                set(options.target_modules),
                PEFTHelper.from_local_dir(folder, None),
                lora_model_id=index,
                device="cpu",
                dtype=torch.float32,  # the scaling is multiplied in before it is rounded
            )
            manager.add_adapter(adapter)
            manager.activate_adapter(index)
        for name, layer in manager.modules.items():
            join_slices(layer)
            if isinstance(layer, VocabParallelEmbeddingWithLoRA):
                replace_submodule(self.base, name, PolicyEmbedding(layer))
        del self.base.lora_manager  # and its copies of the adapters

    def _check_embedding(self, place: str, module: str, weight: Tensor) -> None:
        """PEFT saves an embedding beside an adapter on it: it must be the base's."""
        layer = self.base.get_submodule(module)
        shard = layer.shard_indices
        own = weight[shard.org_vocab_start_index : shard.org_vocab_end_index].to(layer.weight)
        if not torch.equal(own, layer.weight[: len(own)]):
            raise ValueError(f"{place} comes with other weights of {module} than the base has")
