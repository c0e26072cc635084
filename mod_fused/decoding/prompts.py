"""Encodes prompts as left-padded token ids, one batch per model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chat import Conversation, encode_conversation, is_conversation

Prompt = str | Conversation
#: One prompt, B prompts for all models, or one list of B prompts per model.
Prompts = Prompt | Sequence[Prompt] | Sequence[Sequence[Prompt]]


def encode_prompts(
    prompts: Prompts | None,
    input_ids: Tensor | Sequence[Tensor] | None,
    attention_mask: Tensor | Sequence[Tensor] | None,
    *,
    tokenizers: Sequence[Any],
    labels: Sequence[str],
    pad_token_id: int,
    device: torch.device | None,
    add_special_tokens: bool | None = None,
    wanted: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Token ids and masks of each model's prompts.

    Args:
        prompts: a string or conversation, B of them for all models, or one list of B per model.
        input_ids: instead of prompts, an integer tensor [B, n] for all models, or one [B, n_k] per
            model.
        attention_mask: for input_ids: same form, 1 for tokens and 0 for padding on the left; None:
            no padding.
        tokenizers: K tokenizers, one per model, or None where there is none.
        labels: K names of the models, for error messages.
        pad_token_id: filled in on the left of the shorter prompts.
        device: where the results go; None leaves input_ids where they are.
        add_special_tokens: see `encode_text`.
        wanted: which of the K models' prompts to encode; None: all.

    Returns:
        For each of these int64 [B, n_k], and the masks int64 [B, n_k], None for a batch without
        padding.

    Raises:
        TypeError, ValueError: for neither or both of prompts and input_ids, a wrong count, an empty
            prompt, padding on the right, a conversation that a tokenizer has no template for.
    """
    if not isinstance(add_special_tokens, (bool, type(None))):
        raise TypeError(f"add_special_tokens must be None or a bool, got {add_special_tokens!r}")
    if (prompts is None) == (input_ids is None):
        what = "neither" if prompts is None else "both"
        raise ValueError(f"pass either prompts or input_ids, got {what}")
    chosen = range(len(labels)) if wanted is None else wanted
    if prompts is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask goes with input_ids; prompts are padded here")
        batches = _prompts_per_model(prompts, labels)
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for k in chosen:
            batch, tokenizer, label = batches[k], tokenizers[k], labels[k]
            rows = [encode_prompt(p, tokenizer, label, add_special_tokens) for p in batch]
            if [] in rows:
                index = rows.index([])
                raise ValueError(
                    f"prompt {index} ({batch[index]!r}) has no tokens for {label}: a model needs "
                    "one"
                )
            pairs.append(padded(rows, pad_token_id))
    else:
        if add_special_tokens is not None:
            raise ValueError("add_special_tokens goes with prompts, got input_ids")
        ids = _tensors_per_model(input_ids, labels, "input_ids")
        masks = _tensors_per_model(attention_mask, labels, "attention_mask")
        pairs = [_check_ids(ids[k], masks[k], labels[k]) for k in chosen]
    return _placed(pairs, [labels[k] for k in chosen], device)


def _placed(
    pairs: Sequence[tuple[Tensor, Tensor | None]],
    labels: Sequence[str],
    device: torch.device | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    sizes = [len(ids) for ids, _ in pairs]
    if len(set(sizes)) > 1 or sizes[0] == 0:
        rows = ", ".join(f"{size} for {label}" for size, label in zip(sizes, labels, strict=True))
        raise ValueError(f"every model needs the same number of prompts, at least one, got {rows}")
    encoded = [ids.to(device=device, dtype=torch.int64) for ids, _ in pairs]
    # Drop a mask without zeros: transformers is faster without one.
    padding = [
        None if m is None or bool(m.all()) else m.to(device=device, dtype=torch.int64)
        for _, m in pairs
    ]
    return encoded, padding


def encode_prompt(
    prompt: Prompt, tokenizer: Any, label: str, add_special_tokens: bool | None = None
) -> list[int]:
    """The token ids of a string or a conversation, without padding.

    Raises:
        ValueError: no tokenizer, or a conversation that cannot be rendered.
    """
    if tokenizer is None:
        raise ValueError(f"{label} has no tokenizer: pass input_ids, or tokenizers to Ensemble")
    if isinstance(prompt, str):
        return encode_text(prompt, tokenizer, add_special_tokens)
    if add_special_tokens:
        raise ValueError(
            "a chat template writes its own special tokens, got add_special_tokens=True with a "
            "conversation"
        )
    return encode_conversation(prompt, tokenizer, label)


def encode_text(text: str, tokenizer: Any, add_special_tokens: bool | None = None) -> list[int]:
    """The token ids of a text.

    Args:
        text: any string, also one that a chat template has rendered.
        tokenizer: one of transformers'.
        add_special_tokens: as transformers' tokenizers take it. None keeps the tokens that the
            tokenizer puts in front, unless the text itself begins with the first of them or with
            BOS. It drops the tokens that T5's and BERT's tokenizers put behind a text: the model
            is to continue the text.
    """
    if add_special_tokens is not None:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    framed = list(tokenizer(text)["input_ids"])
    if framed == bare:
        return bare
    if not bare and (word := list(tokenizer("a", add_special_tokens=False)["input_ids"])):
        return encode_text("a", tokenizer)[: -len(word)]
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            front = framed[:start]
            starts = {*front[:1], getattr(tokenizer, "bos_token_id", None)}
            return bare if bare[0] in starts else front + bare
    return framed  # the tokenizer changes the text's own tokens as well


def _prompts_per_model(prompts: Any, labels: Sequence[str]) -> list[list[Prompt]]:
    if isinstance(prompts, str) or is_conversation(prompts):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(
            f"prompts must be a string, a conversation or a list, got {type(prompts).__name__}"
        )
    if _are_prompts(prompts):
        return [list(prompts)] * len(labels)
    if not all(isinstance(p, (list, tuple)) and _are_prompts(p) for p in prompts):
        raise TypeError(
            "prompts must be strings or conversations (lists of messages), or one list of them per "
            "model; got a mixture"
        )
    if len(prompts) != len(labels):
        raise ValueError(
            f"expected {len(labels)} lists of prompts, one each for {', '.join(labels)}, "
            f"got {len(prompts)}"
        )
    return [list(p) for p in prompts]


def _are_prompts(items: Sequence[Any]) -> bool:
    return all(isinstance(item, str) or is_conversation(item) for item in items)


def _tensors_per_model(value: Any, labels: Sequence[str], name: str) -> list[Any]:
    if value is None or isinstance(value, Tensor):
        return [value] * len(labels)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Tensor) for v in value):
        raise TypeError(
            f"{name} must be a tensor or one tensor per model, got {type(value).__name__}"
        )
    if len(value) != len(labels):
        raise ValueError(
            f"expected {len(labels)} tensors of {name}, one each for {', '.join(labels)}, "
            f"got {len(value)}"
        )
    return list(value)


def padded(rows: Sequence[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, n]. Many tokenizers have no padding token, or pad on the right."""
    width = max(map(len, rows), default=0)
    ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    on_host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
    return torch.tensor(ids, **on_host), torch.tensor(mask, **on_host)


def _check_ids(ids: Tensor, mask: Tensor | None, label: str) -> tuple[Tensor, Tensor | None]:
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids of {label} must be an integer tensor [B, n], "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    if ids.shape[1] == 0:
        raise ValueError(
            f"input_ids of {label} are empty ({list(ids.shape)}): a model needs one token"
        )
    if mask is None:
        return ids, None
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of {label} must have the shape of its input_ids {list(ids.shape)}, "
            f"got {list(mask.shape)}"
        )
    mask = mask.to(torch.int64)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"attention_mask of {label} must hold 0 and 1 only")
    if bool((mask.diff(dim=1) < 0).any()) or bool((mask[:, -1] == 0).any()):
        raise ValueError(
            f"attention_mask of {label} must be 0s then 1s in each row, padding on the left"
        )
    return ids, mask
