"""Every causal architecture of transformers, built small and compared with its own `generate`.

The command fills the table of docs/architectures.md; the test suite runs a dozen of the same rows:

    python tests/architectures.py --out docs/architectures.md
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mod_fused import Ensemble, generate

VOCAB, NEW = 99, 12
LENGTHS = (9, 5, 2)

# Read by every config that has a field of the name; sub-configs of the text too.
SMALL: dict[str, Any] = {
    **{"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"sliding_window": 8, "num_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4},
    **{"num_local_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "is_decoder": True},
}
_DECODERS = (
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet "
    "trocr whisper"
).split()
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}

# What a kind needs beside SMALL.
EXTRA: dict[str, dict[str, Any]] = {
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
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
for _kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
    VARIANTS[f"{_kind} (text alone)"] = (_kind, {"text_config": _MROPE, "vision_config": _VISION})


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
    given = {part: extra[part] for part in parts if part in extra and part != "text_config"}
    for part, values in given.items():
        known = _fields(parts[part])
        fields[part] = {key: value for key, value in values.items() if key in known}
    return config_class(**fields)


def small_model(kind: str, seed: int, **options: Any) -> Any:
    """A small model of random weights that ends no text by itself.

    Raises:
        ValueError: it has more than 60 million parameters.
    """
    config = small_config(kind, **options)
    auto = AutoModelForCausalLM
    if kind.endswith("(text alone)"):
        auto = AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 6e7:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large, so that predictions depend on the context
                torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


class Small:
    """One architecture: a policy and a reference of the same kind, prompts, and what they give."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.policy, self.reference = (small_model(kind, seed, **options) for seed in (1, 2))
        generator = torch.Generator().manual_seed(7)
        width = LENGTHS[0]
        self.ids = torch.randint(3, VOCAB, (len(LENGTHS), width), generator=generator)
        self.mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()

    def prompt(self, row: int) -> torch.Tensor:
        return self.ids[row : row + 1, self.ids.shape[1] - LENGTHS[row] :]

    def own(self, ids: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
        """What transformers generates, without padding."""
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
        out = self.policy.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **options
        )
        return out[:, ids.shape[1] :]

    def ours(self, ids: torch.Tensor, models: Any = None, **options: Any) -> Any:
        """What mod_fused generates at a corner: the policy, beside a reference that runs too."""
        ensemble = Ensemble([self.reference, self.policy] if models is None else models)
        fixed: dict[str, Any] = {"weights": [1.0], "do_sample": False, "max_new_tokens": NEW}
        return generate(
            ensemble, input_ids=ids, eos_token_id=[], pad_token_id=0, **fixed, **options
        )

    @functools.cached_property
    def alone(self) -> list[torch.Tensor]:
        """What transformers generates from each prompt by itself."""
        return [self.own(self.prompt(row)) for row in range(len(LENGTHS))]


class Wrong(AssertionError):
    """Other tokens, or other log-probabilities."""


def _same(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(got, expected):
        at = (got != expected).nonzero()[0].tolist()
        raise Wrong(f"{what}: token {at[1]} of row {at[0]} differs")


def alone(small: Small) -> None:
    """Each prompt by itself: the policy's own `generate`."""
    for row, expected in enumerate(small.alone):
        _same(small.ours(small.prompt(row)).tokens, expected, "one prompt")


def recomputed(small: Small) -> None:
    """Without a cache: the policy's own `generate` without a cache, and with one."""
    ids = small.prompt(0)
    expected = small.own(ids, use_cache=False)
    _same(small.ours(ids, use_cache=False).tokens, expected, "recomputed")
    if not torch.equal(expected, small.alone[0]):
        raise Wrong("transformers itself gives other tokens without a cache")


def padded(small: Small) -> None:
    """A left-padded batch: each row as alone, in tokens and log-probabilities."""
    ids = torch.where(small.mask.bool(), small.ids, 0)
    out = small.ours(ids, attention_mask=small.mask)
    _same(out.tokens, torch.cat(small.alone), "padded batch")
    for row in range(len(LENGTHS)):
        lone = small.ours(small.prompt(row)).logprobs[0]
        error = float((out.logprobs[row] - lone).abs().max())
        if not error < 1e-3:
            raise Wrong(f"padded batch: log-probabilities of row {row} are {error:.2g} nats off")


def permuted(small: Small) -> None:
    """A batch in another order: the same rows in that order, each as alone."""
    order = torch.tensor([2, 0, 1])
    expected = torch.cat([small.own(small.ids[row : row + 1]) for row in order.tolist()])
    _same(small.ours(small.ids[order]).tokens, expected, "permuted batch")


def copied(small: Small) -> None:
    """Several responses to a prompt, and rows that go on with the state of others."""
    expected = torch.cat([small.own(small.ids[row : row + 1]) for row in range(len(LENGTHS))])
    twice = small.ours(small.ids, num_return_sequences=2).tokens
    _same(twice, expected.repeat_interleave(2, dim=0), "two responses")
    parents = torch.tensor([2, 0, 0])

    def resample(step: int, *_: torch.Tensor) -> torch.Tensor | None:
        return parents if step == 3 else None

    _same(small.ours(small.ids, resample_fn=resample).tokens, expected[parents], "resampled rows")


def shared(small: Small) -> None:
    """One model in two places, after another batch has gone through it."""
    models = [small.policy, small.policy]
    for row in (1, 0):
        got = small.ours(small.prompt(row), models).tokens
        _same(got, small.alone[row], "one model in two places")


def _beyond(kind: str) -> None:
    """Past max_position_embeddings: transformers' own tokens, refused where it cannot."""
    small = Small(kind, max_position_embeddings=12, n_positions=12)
    small.ours(small.prompt(0))  # first: transformers raises what should be refused
    alone(small)


CHECKS: dict[str, Callable[[Small], None]] = {
    check.__name__: check for check in (alone, recomputed, padded, permuted, copied, shared)
}
COLUMNS = (*CHECKS, "beyond")


def _outcome(check: Callable[[], None], models: list[Any]) -> str:
    """ "equal", or "refused: why" before any model ran, or "wrong: what"."""
    ran: list[Any] = []
    hooks = [m.register_forward_pre_hook(lambda *_: ran.append(1)) for m in models]
    try:
        check()
    except (TypeError, ValueError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        if "mod_fused" in Path(place).parts:
            return f"refused: {error}"
        return f"wrong: {type(error).__name__}: {error}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    finally:
        for hook in hooks:
            hook.remove()
    return "equal"


def examine(kind: str) -> dict[str, str]:
    """The outcome of every check, or {"unbuilt": why}."""
    try:
        small = Small(kind)
    except Exception as error:
        return {"unbuilt": f"{type(error).__name__}: {error}"}
    try:
        small.alone
    except Exception as error:
        return {"unbuilt": f"its own generate raises {type(error).__name__}: {error}"}
    models = [small.policy, small.reference]
    found = {name: _outcome(functools.partial(c, small), models) for name, c in CHECKS.items()}
    found["beyond"] = _outcome(functools.partial(_beyond, kind), [])
    return found
