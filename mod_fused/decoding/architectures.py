"""What a transformers model can do, judged by its class, config and modules before it runs.

docs/architectures.md lists the causal architectures of transformers and how each was compared with
the model's own `generate`. Models that gave wrong results are refused here by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .adapters import check_adapter, unwrapped, virtual_tokens

# The names under which models return their caches, and take them again.
CACHE_NAMES = frozenset({"cache", "cache_params", "mems", "past_key_values", "state"})

# Forward takes no positions, yet left padding changes nothing: ALiBi counts by the mask, rotary
# positions depend on distances only, state-space models zero the padding.
_PADDING_WITHOUT_POSITIONS = frozenset({"bloom", "falcon_mamba", "mamba", "mamba2", "mpt"})

# Models whose tokens depend on whether a cache is used, or on chance.
_UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "moshi": "it gives other tokens with a cache than without",
        "prophetnet": "it gives other probabilities with a cache than without",
        "reformer": "its attention hashes at random, so a row depends on its batch",
    }
)

# Padding changes the tokens behind it although forward takes positions and a mask.
_NO_PADDING: Mapping[str, str] = MappingProxyType(
    {
        "git": "its cached steps attend to the padding",
        "recurrent_gemma": "its convolutions read the padding",
    }
)

# Models whose own cached step mixes the rows of a batch.
_NO_CACHED_BATCH: Mapping[str, str] = MappingProxyType(
    {"rwkv": "its cached step mixes the rows of a batch"}
)

# Models that read their prompt differently without a cache.
_NO_RECOMPUTING: Mapping[str, str] = MappingProxyType({"cpmant": "it reads its prompt both ways"})

# Models that read the tokens of one call otherwise than token by token, or keep the logits of the
# last token whatever they are asked for.
_NO_SINGLE_PASS = frozenset(
    (*_NO_RECOMPUTING, "bamba", "falcon_h1", "nemotron_h", "xlnet", "zamba", "zamba2")
)

# Models whose cache rows cannot be selected with the methods that transformers offers.
_NO_SELECTION: Mapping[str, str] = MappingProxyType(
    {
        **_NO_CACHED_BATCH,
        "minimax": "its cache reorders the attention layers only",
        "xlstm": "its cache cannot be reordered",
    }
)

# Models whose caches are plain lists of tensors: the dimension of the rows.
_SELECTED: Mapping[str, int] = MappingProxyType({"xlnet": 1})

# These attend both ways unless their config has is_decoder=True.
_ENCODERS = frozenset(
    {
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)

# State that models keep on their modules instead of in a cache (RecurrentGemma).
_MODULE_STATE = ("conv1d_state", "recurrent_states")

# Tables of absolute positions, by the names that transformers gives them.
_POSITION_TABLES = frozenset(
    {"embed_positions", "pos_encoding", "position_embeddings", "positions_embed", "wpe"}
)


def is_transformers_model(model: Any) -> bool:
    """Whether to call the model as transformers does; others are step(tokens) -> logits."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        return False
    return "input_ids" in accepted_arguments(model)


def accepted_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's forward takes: not all take positions."""
    return frozenset(inspect.signature(unwrapped(model).forward).parameters)


def text_config(model: Any) -> Any:
    """The part of the config that describes the language model."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def embedded_ids(model: Any) -> int:
    """How many token ids a language model can read."""
    return text_config(model).vocab_size


def input_device(model: Any) -> torch.device:
    """The device of a model's token ids, also when its weights are spread or offloaded."""
    embedding = unwrapped(model).get_input_embeddings()
    for module in (embedding, model):
        # accelerate's hooks bring weights here for the time of a call; until then they are "meta".
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(embedding.parameters()).device


def check_causal_lm(model: Any, label: str) -> None:
    """Raise TypeError for a transformers model that gives no logits of the next token."""
    config, name = model.config, type(unwrapped(model)).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{label} is an encoder-decoder model ({name}), expected a causal one")
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise TypeError(
            f"{label} is a {name}, which has no head for the next token: expected a causal "
            "language model, as AutoModelForCausalLM loads it"
        )
    if (reason := _UNSUPPORTED.get(config.model_type)) is not None:
        raise TypeError(f"{label} is a {name}, which is not supported: {reason}")
    if "text" not in getattr(unwrapped(model), "output_modalities", ("text",)):
        raise TypeError(f"{label} is a {name}, which generates no text")
    text = text_config(model)
    flags = {
        "is_decoder": getattr(config, "is_decoder", None) is False and _is_encoder(model),
        "is_causal": getattr(text, "is_causal", None) is False,
        "causal": getattr(text, "causal", None) is False,
        "use_bidirectional_attention": getattr(text, "use_bidirectional_attention", None) is True,
    }
    for flag, bidirectional in flags.items():
        if bidirectional:
            raise TypeError(
                f"{label} is a {name} whose config has {flag}={getattr(text, flag)}: every token "
                "sees those behind it, so it is no causal language model"
            )
    if "position_ids" in accepted_arguments(model):
        offsets = [table.padding_idx for table in _position_tables(model)]
        if any(offset is not None for offset in offsets):
            raise TypeError(
                f"{label} is a {name}, whose positions begin behind its padding id; transformers' "
                "own generate numbers them from 0, so what it would generate is not what it learned"
            )


def _is_encoder(model: Any) -> bool:
    """Whether the class attends both ways unless config.is_decoder is set; unknown classes may."""
    return not _is_known(model) or model.config.model_type in _ENCODERS


def _is_known(model: Any) -> bool:
    """Whether the class is one of transformers' or a subclass of one, not remote code."""
    bases = type(unwrapped(model)).__mro__
    return any(base.__module__.startswith("transformers.models.") for base in bases)


def is_spread(model: Any) -> bool:
    """Whether a model lies on several devices."""
    return len({*getattr(model, "hf_device_map", {}).values()}) > 1


def keeps_places(model: Any) -> bool:
    """Whether `logits_to_keep` may be a tensor of places: not in remote code, which may take a
    number only, nor where the head's device is another, nor where layers share their KV cache,
    which leave the prompt out for a number only."""
    shared = getattr(text_config(model), "num_kv_shared_layers", None)
    return _is_known(model) and not is_spread(model) and not shared


def _has_unknown_state(model: Any) -> bool:
    return getattr(unwrapped(model), "_is_stateful", False) and not _is_known(model)


def check_run(
    model: Any,
    label: str,
    sequences: Tensor,
    attention_mask: Tensor | None,
    use_cache: bool,
    new_tokens: int,
) -> None:
    """Raise ValueError for a batch [B, n] that the model cannot continue correctly.

    The model will read `new_tokens` tokens behind the prompts.
    """
    if model.training:
        raise ValueError(
            f"{label} is in training mode, dropout would change it: call .eval() on it"
        )
    if input_device(model).type == "meta":
        raise ValueError(f"{label} is on the meta device: its weights are not loaded")
    size = embedded_ids(model)
    low, high = (int(x) for x in torch.aminmax(sequences))
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(f"{label} has a vocabulary of {size} ids, its prompt holds the id {bad}")
    check_adapter(model, label, attention_mask, use_cache)
    virtual = virtual_tokens(model)
    length = virtual + sequences.shape[1] + new_tokens
    limit = _positions(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"{label} has {limit} positions, a prompt of {virtual + sequences.shape[1]} tokens "
            f"and {new_tokens} tokens to read behind it need {length}: shorten one of them"
        )
    if attention_mask is not None:
        _check_padding(model, label, length)
    kind = text_config(model).model_type
    reason = _NO_RECOMPUTING.get(kind)
    if reason is not None and not use_cache:
        raise ValueError(
            f"{label} ({type(unwrapped(model)).__name__}) gives other tokens without its cache: "
            f"{reason}. Pass use_cache=True"
        )
    reason = _NO_CACHED_BATCH.get(kind)
    if reason is not None and use_cache and len(sequences) > 1:
        raise ValueError(
            f"{label} ({type(unwrapped(model)).__name__}) cannot continue {len(sequences)} rows: "
            f"{reason}. Pass one prompt at a time, or use_cache=False"
        )


def _check_padding(model: Any, label: str, length: int) -> None:
    kind = text_config(model).model_type
    reason = _NO_PADDING.get(kind)
    accepted = accepted_arguments(model)
    if reason is None and "attention_mask" not in accepted:
        reason = "its forward takes no attention_mask"
    counted = "position_ids" in accepted or kind in _PADDING_WITHOUT_POSITIONS
    if reason is None and not counted:
        reason = "its forward takes no position_ids, so padding shifts the tokens behind it"
    if reason is None and _has_unknown_state(model):
        reason = "padding may enter its state, and its class is not transformers'"
    if reason is None:
        switch = _rope_switch(model)
        if switch is not None and length > switch:
            reason = (
                f"its rotary frequencies change at {switch} tokens for all rows of a batch at once"
            )
    if reason is not None:
        raise ValueError(
            f"{label} ({type(unwrapped(model)).__name__}) cannot read padded prompts: {reason}. "
            "Pass prompts of equal length, or one at a time"
        )


def _position_tables(model: Any) -> list[torch.nn.Embedding]:
    return [
        module
        for name, module in unwrapped(model).get_decoder().named_modules()
        if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(module, torch.nn.Embedding)
    ]


def _positions(model: Any) -> int | None:
    """How many positions the model's tables have; None if positions are computed, without limit."""
    sizes = [len(table.weight) - getattr(table, "offset", 0) for table in _position_tables(model)]
    for module in unwrapped(model).get_decoder().modules():
        for name in _POSITION_TABLES & {*vars(module), *module._buffers}:
            sizes.append(len(getattr(module, name)))
    return min(sizes, default=None)


def _rope_switch(model: Any) -> int | None:
    """The length at which dynamic rotary frequencies change; None if they never do."""
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    switches = [
        p.get("original_max_position_embeddings", text_config(model).max_position_embeddings)
        for p in nested or [parameters]
        if "dynamic" in str(p.get("rope_type")) or p.get("rope_type") == "longrope"
    ]
    return min(switches, default=None)


def reads_in_one_pass(model: Any, length: int) -> bool:
    """Whether one pass over `length` tokens gives every token the logits that it gets when it is
    read by itself, after those before it."""
    switch = _rope_switch(model)
    kind = text_config(model).model_type
    return kind not in _NO_SINGLE_PASS and (switch is None or length <= switch)


def cache_name(model: Any) -> str:
    """The name of the model's cache argument, which differs between versions and families."""
    accepted = accepted_arguments(model)
    names = (name for name in ("cache", "cache_params", "past_key_values") if name in accepted)
    return next(names, "past_key_values")


def new_cache(model: Any) -> dict[str, Any]:
    """The empty cache that transformers' `generate` would give the model, under its name."""
    if not model._supports_default_dynamic_cache():
        return {}  # the model makes its own
    from transformers import DynamicCache

    name = cache_name(model)
    config = text_config(model)
    # num_hidden_layers of an encoder-decoder's config may be the encoder's. Without a config the
    # cache adds layers as they run.
    if hasattr(config, "decoder_layers"):
        return {name: DynamicCache()}
    return {name: DynamicCache(config=config)}


def check_selection(model: Any, label: str) -> None:
    """Raise ValueError if rows of the model's cache cannot be selected."""
    kind = text_config(model).model_type
    reason = _NO_SELECTION.get(kind)
    made = kind in _SELECTED or model._supports_default_dynamic_cache()
    if reason is None and (not made or _has_unknown_state(model)):
        reason = "its cache is its own"
    if reason is not None:
        raise ValueError(
            f"the rows of {label} ({type(unwrapped(model)).__name__}) cannot be copied: {reason}. "
            "Pass use_cache=False, which recomputes whole sequences"
        )


def check_candidates(model: Any, label: str) -> None:
    """Raise ValueError if a mask cannot keep candidates in one sequence from seeing each other."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = {type(layer) for layer in DynamicCache(config=text_config(model)).layers}
    if layers - {DynamicLayer}:
        raise ValueError(
            f"{label} must attend to the whole sequence in every layer to score candidates in one "
            f"pass; {type(unwrapped(model)).__name__} does not"
        )
    if _rope_switch(model) is not None:
        raise ValueError(f"{label} changes its rotary frequencies on the way: no candidates")


def selected(model: Any, cache: Any, rows: Tensor) -> Any:
    """The cache with these rows, int64 [N]."""
    if hasattr(cache, "reorder_cache"):
        # Beam search's method: every kind of transformers cache has it, for any indices.
        cache.reorder_cache(rows)
        return cache
    axis = _SELECTED[text_config(model).model_type]
    return type(cache)(layer.index_select(axis, rows) for layer in cache)


class ModuleState:
    """The state that a model keeps on its modules, for one batch: put there before each call and
    taken away after it. Two batches, or two places in an ensemble, can then share a model.
    """

    def __init__(self, model: Any) -> None:
        self._values: list[tuple[Any, str, Any]] = []
        for module in model.modules():
            self._values += [(module, n, None) for n in _MODULE_STATE if n in vars(module)]
            # A module keeps the dynamic rotary frequencies of the longest text so far.
            if "dynamic" in str(getattr(module, "rope_type", "")):
                first = module.original_inv_freq.to(module.inv_freq.device)
                self._values.append((module, "inv_freq", first))
                self._values.append((module, "max_seq_len_cached", module.original_max_seq_len))
        self._others: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        self._others = [(m, name, getattr(m, name)) for m, name, _ in self._values]
        self._put(self._values)

    def __exit__(self, *error: object) -> None:
        self._values = [(m, name, getattr(m, name)) for m, name, _ in self._values]
        self._put(self._others)

    def _put(self, values: Sequence[tuple[Any, str, Any]]) -> None:
        for module, name, value in values:
            setattr(module, name, value)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [N]."""
        self._values = [
            (m, name, value[rows] if name in _MODULE_STATE and value is not None else value)
            for m, name, value in self._values
        ]
