"""Multi-objective decoding inside vLLM: the reference and the policies as one model of one engine.

    vllm serve REFERENCE --hf-overrides \
        '{"architectures": ["ModFusedForCausalLM"], "mod_fused_policies": ["A", "B"]}'

config.py checks what the engine was started with (adapter_folders.py the adapters), requests.py
what a request asks for; model.py is the model that vLLM sees, made of M+1 models (composite.py) or
of one base with M adapters (adapters.py); slots.py keeps what must last from step to step, step.py
mixes and draws; runner_v1.py and runner_v2.py put that into vLLM's two model runners, worker.py
into its worker.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "ModFusedForCausalLM"


def register() -> None:
    """Make the architecture known to vLLM: the entry point of the group vllm.general_plugins, which
    runs in every process of vLLM. For other architectures it does nothing and imports nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class ModFusedConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from .config import verify_and_update

            verify_and_update(vllm_config)

    MODELS_CONFIG_MAP[ARCHITECTURE] = ModFusedConfig
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
