"""The reference and the policies as one model of vLLM: own layers, own KV, one block table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig

from .adapter_folders import names_of
from .adapters import Adapted
from .composite import Composite
from .config import settings_of
from .step import Step


class ModFusedForCausalLM(nn.Module):
    """M+1 causal language models that read the same tokens at the same positions: models of their
    own, or one base with adapters."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        kind: Any = Adapted if names_of(vllm_config.model_config.hf_config) else Composite
        self.models = kind(vllm_config=vllm_config)
        self.secondary_weights = self.models.secondary_weights
        self.step = Step(settings_of(vllm_config.model_config))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """vLLM asks every model for it; ours embed the tokens themselves."""
        return self.models.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states side by side, [tokens, sum of the models' widths]."""
        return self.models(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The step's carrier [B, W] (`Step.publish`); the models' logits stay in `step`."""
        logits = self.models.compute_logits(hidden_states)
        return None if logits is None else self.step.publish(logits)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The reference's weights come first and without prefix, the policies' with theirs."""
        return {f"models.{name}" for name in self.models.load_weights(weights)}

    def process_weights_after_loading(self) -> None:
        """vLLM's hook for a model whose layers have their weights."""
        if isinstance(self.models, Adapted):
            self.models.load_adapters()

    @staticmethod
    def get_model_state_cls() -> type:
        """What Model Runner V2 makes of the model."""
        from .runner_v2 import ModFusedState

        return ModFusedState
