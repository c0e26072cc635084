"""Models with PEFT adapters: which module to call, and which models can share an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Methods that put tokens or keys in front of the prompt, step by step.
_PROMPT_METHODS = frozenset({"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"})

# Methods whose forward needs whole sequences, or inputs that a decoder does not have.
_WHOLE_CALLS = frozenset({"POLY", "XLORA"})


def unwrapped(model: Any) -> Any:
    """The module whose forward names its arguments: torch.compile and PEFT wrap it with *args."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _prompt_learning(model: Any) -> bool | None:
    """Whether the active adapter puts something in front of the prompt; None without adapters."""
    config = getattr(model, "active_peft_config", None)
    return None if config is None else bool(config.is_prompt_learning)


def virtual_tokens(model: Any) -> int:
    """How many positions the active adapter takes in front of the prompt."""
    return model.active_peft_config.num_virtual_tokens if _prompt_learning(model) else 0


def forward_module(model: Any) -> Any:
    """The module to call with prepared inputs, which already hold PEFT's virtual tokens."""
    return model.base_model if _prompt_learning(model) else model


def check_adapter(model: Any, label: str, attention_mask: Tensor | None, use_cache: bool) -> None:
    """Raise ValueError for an adapter that cannot run step by step."""
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{label} has an activated LoRA, whose first token is found in whole sequences only"
        )
    if (config.is_prompt_learning and method not in _PROMPT_METHODS) or method in _WHOLE_CALLS:
        raise ValueError(f"{label} has an adapter of the kind {method}, which is not supported")
    if method == "PREFIX_TUNING" and not use_cache:
        raise ValueError(f"{label} keeps its prefix ({method}) in the cache: pass use_cache=True")
    if not config.is_prompt_learning:
        return
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    # With too old a PEFT, transformers puts the learned prompt in front of every token.
    check_peft_version(min_version=MIN_PEFT_VERSION)
    if attention_mask is not None:
        raise ValueError(
            f"{label} puts virtual tokens ({method}) in front of the padding, which shifts them: "
            "pass prompts of equal length, or one at a time"
        )


def check_shared(models: Mapping[str, Any]) -> None:
    """Raise ValueError if two of the models, by label, share modules that an adapter has changed.

    PEFT changes a base model in place: the base, and every model around the same base, then run the
    active adapter, and mixing them would mix one model with itself. Prompt learning changes no
    base. Passing one model twice is allowed: that plainly asks for the same function.
    """
    seen: dict[int, tuple[str, Any]] = {}
    for label, model in models.items():
        if not isinstance(model, nn.Module):
            continue
        base = unwrapped(model)
        for module in model.modules():
            first, owner = seen.setdefault(id(module), (label, model))
            if owner is model:
                continue
            adapters = type(module).__module__.startswith("peft.")
            around = module is base and False in (_prompt_learning(model), _prompt_learning(owner))
            if adapters or around:
                raise ValueError(
                    f"{first} and {label} share a base model that PEFT has changed in place: both "
                    "run the adapter that is active. Load a base model for each adapter"
                )
