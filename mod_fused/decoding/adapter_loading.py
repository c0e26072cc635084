"""One base model and several PEFT adapters that share its weights, from names and objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .loading import adapter_config, has_tokenizer, load_model, load_tokenizer, with_adapter
from .stacked_adapters import check_plain, copy_of_modules, without_adapters


def load_base_and_adapters(
    base: Any, adapters: Sequence[str] | None, check_base: bool, device: Any, **options: Any
) -> tuple[Any, list[tuple[Any, str]], list[Any]]:
    """One base model and adapters, each on a copy of its modules that shares its weights.

    Args:
        base, adapters, check_base: as in `Ensemble.from_adapters`.
        device: where to put the base; None leaves it.
        **options: as for `load_model`.

    Returns:
        The base, for each adapter a `PeftModel` and the adapter's name in it, and the tokenizers of
        the base and of the adapters.

    Raises:
        OSError, TypeError, ValueError, ImportError: as `Ensemble.from_adapters`.
    """
    loaded = isinstance(base, (str, Path))
    base = getattr(base, "_orig_mod", base)  # of torch.compile
    if not loaded and (options or device is not None):
        given = sorted(options) or ["device"]
        raise ValueError(f"{', '.join(given)}: for a base model that is loaded by name")
    if adapters is not None and not adapters:
        raise ValueError(f"adapters must name at least one adapter, got {adapters}")
    if hasattr(base, "peft_config") and hasattr(base, "get_base_model"):
        names = list(base.peft_config) if adapters is None else list(adapters)
        if unknown := set(names) - set(base.peft_config):
            raise ValueError(
                f"the PeftModel has no adapter {', '.join(sorted(unknown))}, it has "
                f"{', '.join(base.peft_config)}"
            )
        return without_adapters(base), [(base, n) for n in names], [None] * (len(names) + 1)
    if adapters is None:
        raise ValueError("adapters may be None for a PeftModel alone: name folders or hub names")
    if loaded:
        path = str(base)
        if adapter_config(path, options) is not None:
            raise ValueError(f"the base model {path} is an adapter itself")
    elif hasattr(base, "config") and hasattr(base, "named_modules"):
        path = getattr(base.config, "_name_or_path", "")
    else:
        raise TypeError(
            "base must be a folder, a hub name, a transformers model or a PeftModel, got "
            f"{type(base).__name__}"
        )
    # The base's subfolder and revision do not apply to its adapters.
    own_files = {k: v for k, v in options.items() if k not in ("subfolder", "revision")}
    own_files = {"use_safetensors": True, **own_files}
    for name in adapters:  # before the base is loaded, which takes long
        _check_made_for(name, path if check_base else "", own_files)
    tokenizer = None
    if loaded:
        from transformers import AutoModelForCausalLM

        base = load_model(AutoModelForCausalLM, path, **options)
        base = base if device is None else base.to(device)
        tokenizer = load_tokenizer(path, **options)
    check_plain(base)
    models, tokenizers = {}, {}
    for name in dict.fromkeys(adapters):
        models[name] = _adapted_copy(base, name, path or "its base", own_files)
        has_own = has_tokenizer(name, own_files)
        tokenizers[name] = load_tokenizer(name, **own_files) if has_own else tokenizer
    sources = [(models[name], "default") for name in adapters]
    return base, sources, [tokenizer, *(tokenizers[name] for name in adapters)]


def _check_made_for(name: str, base: str, options: Mapping[str, Any]) -> None:
    """Refuse what is no adapter, and one that names another base model. ("": any.)"""
    config = adapter_config(name, options)
    if config is None:
        raise ValueError(f"{name} is no PEFT adapter: it has no adapter_config.json")
    made_for = config.get("base_model_name_or_path")
    if base and made_for and not same_name(base, made_for):
        raise ValueError(
            f"the adapter {name} was made for the base model {made_for}, got {base}: if they "
            "are the same, pass check_base=False"
        )


def _adapted_copy(base: Any, name: str, label: str, options: dict[str, Any]) -> Any:
    """An adapter on a copy of the base's modules, which stays as it is."""
    copied = copy_of_modules(base)
    if hasattr(copied, "gradient_checkpointing_disable"):
        copied.gradient_checkpointing_disable()  # else PEFT hooks the base's own embedding
    trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
    try:
        return with_adapter(copied, name, label, options, shares_base=True)
    finally:
        for parameter in trainable:  # PEFT freezes them
            parameter.requires_grad_(True)


def same_name(first: str, second: str) -> bool:
    """Whether two names of models end alike, as given or resolved: folders may be moved or linked,
    and a snapshot in the cache of the hub has its name on the hub."""

    def lasts(name: str) -> set[str]:
        cached = re.search(r"models--.*--([^/]+)/snapshots/", name)
        return {cached[1]} if cached else {Path(name).name, Path(name).resolve().name}

    return bool(lasts(first) & lasts(second))
