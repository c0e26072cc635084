"""The least memory that decoding takes, and the memory there is: a decode that cannot fit is
refused before it runs.

    each language model   rows x tokens x sum over its layers of 2 x key heads x head size x bytes
                          rows x vocabulary x bytes                       the logits of one step
    the responses         rows x tokens x (8 + 4 + 4 x models) bytes      ids and log-probabilities
    scores and logits     rows x new tokens x vocabulary x 4 bytes each    where they are asked for

with tokens = prompt tokens + new tokens; a layer with a sliding window holds no more than the
window. Weights and activations are left out, so that nothing that fits is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architectures import embedded_ids, is_spread, is_transformers_model, text_config


def check_decoding(
    models: Sequence[Any],
    input_ids: Sequence[Tensor],
    copies: int,
    max_new_tokens: int,
    use_cache: bool = True,
    distributions: int = 0,
) -> None:
    """Refuse a decode that cannot fit.

    Args:
        models: the K models that are not None.
        input_ids: [B, n_k] for each.
        copies: responses to each prompt.
        max_new_tokens: the most tokens of a response.
        use_cache: whether the models keep KV caches.
        distributions: how many of each step are kept, as scores and logits.

    Raises:
        ValueError: says how much memory it would take.
    """
    rows = len(input_ids[0]) * copies
    tokens = input_ids[0].shape[1] + max_new_tokens
    vocab = min([embedded_ids(m) for m in models if is_transformers_model(m)], default=0)
    kept = rows * max_new_tokens * vocab * 4 * distributions
    needed = {input_ids[0].device: rows * tokens * (8 + 4 + 4 * len(models)) + kept}
    for model, ids in zip(models, input_ids, strict=True):
        # Models spread over several devices are not counted.
        if is_transformers_model(model) and not is_spread(model):
            parameter = next(model.parameters())
            numbers = embedded_ids(model)
            if use_cache:
                numbers += cached_numbers(model, ids.shape[1] + max_new_tokens)
            needed.setdefault(parameter.device, 0)
            needed[parameter.device] += rows * numbers * parameter.element_size()
    for device, count in needed.items():
        what = f"decoding {rows} rows of up to {max_new_tokens} new tokens"
        check_memory(count, what, device)


def check_memory(needed: int, what: str, device: torch.device | None = None) -> None:
    """Refuse more bytes than the device (None: the CPU) has free.

    Raises:
        ValueError: says how many bytes `what` would take.
    """
    available = available_bytes(device or torch.device("cpu"))
    if available is not None and needed > available:
        raise ValueError(
            f"{what} takes at least {in_words(needed)} of memory, {in_words(available)} are there"
        )


def cached_numbers(model: Any, tokens: int) -> int:
    """How many numbers one row's KV cache holds after so many tokens; 0 where it is not known."""
    config = text_config(model)
    layers, heads = _decoder(config, "layers", "num_hidden_layers"), _key_heads(config)
    size: Any = getattr(config, "head_dim", None)
    queries = _decoder(config, "attention_heads", "num_attention_heads")
    if size is None and queries:
        size = getattr(config, "hidden_size", 0) // queries
    if not all(isinstance(x, int) for x in (layers, heads, size)):
        return 0  # they differ by layer
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    kinds = kinds or ["sliding_attention" if window else "attention"] * layers
    held = {
        "attention": tokens,
        "full_attention": tokens,
        "sliding_attention": min(tokens, window - 1) if window else tokens,
    }
    # The last layers of some models read the keys and values of earlier ones.
    kinds = kinds[: layers - (getattr(config, "num_kv_shared_layers", 0) or 0)]
    each = 2 * heads * size
    if isinstance(
        rank := getattr(config, "kv_lora_rank", None), int
    ):  # DeepSeek: one compressed vector for all heads
        each = rank + getattr(config, "qk_rope_head_dim", 0)
    return each * sum(held.get(kind, 0) for kind in kinds)


def _decoder(config: Any, what: str, name: str) -> Any:
    """A number of the decoder's: in some configs the usual name means the encoder's."""
    own = getattr(config, f"decoder_{what}", None)
    return getattr(config, name, 0) if own is None else own


def _key_heads(config: Any) -> Any:
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    names = ("num_key_value_heads", "decoder_attention_heads", "num_attention_heads")
    return next((x for name in names if (x := getattr(config, name, None)) is not None), 0)


def available_bytes(device: torch.device) -> int | None:
    """How many bytes are free on the device; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    try:  # the limit of a container; "max" means no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def in_words(count: int) -> str:
    """A number of bytes: "1.5 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{min(count, 2**100) / 1024**power:,.1f} {units[power]}"
