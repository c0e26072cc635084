"""Every causal architecture of transformers, built small: configs and models by model type."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 99

# Read by every config that has a field of the name; sub-configs of the text too.
SMALL: dict[str, Any] = {
    **{"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"sliding_window": 8, "num_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4},
    **{"num_local_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
    "tie_word_embeddings": False,  # tied ones repeat the last token, whatever came before
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "is_decoder": True},
}
SMALL |= {
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16},
    **{"q_lora_rank": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "rotary_dim": 4},
    **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    **{"vocab_size_per_layer_input": VOCAB, "index_head_dim": 16, "index_n_heads": 2},
    **{"mamba_d_ssm": 64, "mamba_d_state": 8, "linear_num_value_heads": 4},
    **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
_DECODERS = (
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet "
    "trocr whisper"
).split()
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}

# What a kind needs beside SMALL.
_LINEAR = (
    "bailing_hybrid kimi_linear qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text"
).split()
_LATENT = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa youtu".split()
EXTRA: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4, "head_dim": 8} for kind in _LATENT},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {
        **{"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "feed_forward_size": 48},
        **{"attention_head_size": 8, "attn_layers": ["local", "lsh"], "num_buckets": 4},
        **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    },
    **{
        kind: {
            "layer_types": ["linear_attention", "full_attention"],
            **({"num_key_value_heads": 4} if kind in ("bailing_hybrid", "kimi_linear") else {}),
        }
        for kind in _LINEAR
    },
    **{
        kind: {"text_config": {"layer_types": ["linear_attention", "full_attention"]}}
        for kind in ("qwen3_5", "qwen3_5_moe")
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "minicpm3": {"num_key_value_heads": 4},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    **{kind: {"is_encoder_decoder": False} for kind in _DECODERS},
    "bamba": {**_MAMBA, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "granitemoehybrid": {**_MAMBA, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {
        **{"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1},
        "attention_window_size": 8,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}

# The same classes with other positions, and models with images that are given text alone.
_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 12}
_LONG = {**_ROPE, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon (ALiBi)": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "llama (dynamic RoPE)": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 12,
        },
    ),
    "llama (linear RoPE)": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "phi3 (LongRoPE)": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", **_LONG},
            "original_max_position_embeddings": 12,
        },
    ),
    "qwen2 (YaRN)": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **_ROPE}}),
}
_VISION = {
    **{"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48},
    **{"out_hidden_size": 32, "num_hidden_layers": 1, "fullatt_block_indexes": [0]},
    "deepstack_visual_indexes": [0],
}
_SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_MROPE = {"rope_parameters": _SECTIONS}
for _kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
    VARIANTS[f"{_kind} (text alone)"] = (_kind, {"text_config": _MROPE})


def kinds() -> list[str]:
    """Every model type that AutoModelForCausalLM knows, then the variants."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def _fields(config_class: Any) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    try:
        names |= set(config_class().to_dict())
    except Exception:  # some cannot be made without arguments
        pass
    return names - set(getattr(config_class, "attribute_map", {}))


def small_config(kind: str, **options: Any) -> Any:
    """The smallest config of a model type or variant that a test of ten tokens can tell from
    others; options are fields of the text's config."""
    name, extra = VARIANTS.get(kind, (kind, EXTRA.get(kind, {})))
    config_class = CONFIG_MAPPING[name]

    def small(of: Any, more: dict[str, Any]) -> dict[str, Any]:
        values = {**SMALL, **more, **options}
        known = _fields(of)
        return {key: value for key, value in values.items() if key in known or key in more}

    parts = getattr(config_class, "sub_configs", None) or {}
    if "text_config" not in parts:
        return config_class(**small(config_class, extra))
    fields = small(config_class, {k: v for k, v in extra.items() if k not in parts})
    fields["text_config"] = small(parts["text_config"], extra.get("text_config", {}))
    given = {part: _VISION for part in parts if part == "vision_config"}
    for part, values in given.items():
        known = _fields(parts[part])
        fields[part] = {key: value for key, value in values.items() if key in known}
    return config_class(**fields)


def small_model(kind: str, seed: int, auto: Any = None, **options: Any) -> Any:
    """A small model of random weights that ends no text by itself.

    Raises:
        ValueError: it has more than 100 million parameters.
    """
    config = small_config(kind, **options)
    if auto is None:
        images = kind.endswith("(text alone)")
        auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 1e8:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large, so that predictions depend on the context
                torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model
