"""The reference and the policies as models of vLLM side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model

from .config import model_configs


class Composite(nn.Module):
    """The models of `ModFusedForCausalLM`: each of vLLM's registry, under its own prefix."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        configs = model_configs(vllm_config.model_config)
        # vLLM reads one integer in a layer's name, and takes it for the layer's index.
        self.names = ["reference", *(f"policy{i}" for i in range(1, len(configs)))]
        self.secondary_weights = [
            DefaultModelLoader.Source(config.model, revision=None, prefix=f"{name}.")
            for name, config in list(zip(self.names, configs, strict=True))[1:]
        ]
        self.widths: list[int] = []
        for index, (name, config) in enumerate(zip(self.names, configs, strict=True)):
            hf_config = copy.deepcopy(config.hf_config)
            # Models of one shape would share an entry of the compile cache, and so their weights.
            hf_config.mod_fused_index = index
            setattr(
                self,
                name,
                init_vllm_registered_model(
                    vllm_config,
                    hf_config=hf_config,
                    prefix=name,
                    architectures=hf_config.architectures,
                ),
            )
            self.widths.append(config.get_hidden_size())

    @property
    def models(self) -> list[Any]:
        """The models, the reference first."""
        return [getattr(self, name) for name in self.names]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The reference's embeddings."""
        return self.models[0].embed_input_ids(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states side by side, [tokens, sum of the models' widths]."""
        out: Tensor | None = None
        begin = 0
        for model, width in zip(self.models, self.widths, strict=True):
            hidden = model(input_ids, positions)
            if out is None:
                out = hidden.new_empty(len(hidden), sum(self.widths))
            # Copied at once: a CUDA graph of the next model may reuse the memory of this output.
            out[:, begin : begin + width] = hidden
            begin += width
        assert out is not None
        return out

    def compute_logits(self, hidden_states: Tensor) -> list[Tensor] | None:
        """The models' logits, each [B, V_k]; None on a rank that does not draw."""
        parts = hidden_states.split(self.widths, dim=-1)
        logits = [m.compute_logits(part) for m, part in zip(self.models, parts, strict=True)]
        return None if logits[0] is None else logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The reference's weights come first and without prefix, the policies' with theirs."""

        def owner(weight: tuple[str, Tensor]) -> str:
            head = weight[0].partition(".")[0]
            return head if head in self.names[1:] else self.names[0]

        loaded: set[str] = set()
        for name, own in groupby(weights, owner):
            plain = ((key.removeprefix(f"{name}."), tensor) for key, tensor in own)
            loaded |= {f"{name}.{key}" for key in getattr(self, name).load_weights(plain)}
        return loaded
