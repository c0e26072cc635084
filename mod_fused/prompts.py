"""Prompts to left-padded token ids, one batch per model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_prompts(
    prompts: str | Sequence[str] | Sequence[Sequence[str]] | None,
    input_ids: Tensor | Sequence[Tensor] | None,
    attention_mask: Tensor | Sequence[Tensor] | None,
    *,
    tokenizers: Sequence[Any],
    labels: Sequence[str],
    pad_token_id: int,
    device: torch.device | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Token ids and masks of each model's prompts.

    Args:
        prompts: a string, B strings for all models, or one list of B strings per model.
        input_ids: instead of prompts, an integer tensor [B, n] for all models, or one [B, n_k] per
            model.
        attention_mask: for input_ids: same form, 1 for tokens and 0 for padding on the left; None:
            no padding.
        tokenizers: K tokenizers, one per model, or None where there is none.
        labels: K names of the models, for messages.
        pad_token_id: filled in on the left of the shorter prompts.
        device: where the results go; None leaves input_ids where they are.

    Returns:
        K tensors int64 [B, n_k], and K masks int64 [B, n_k], None for a batch without padding.

    Raises:
        TypeError, ValueError: for neither or both of prompts and input_ids, a wrong count, an empty
            prompt, padding on the right.
    """
    if (prompts is None) == (input_ids is None):
        what = "neither" if prompts is None else "both"
        raise ValueError(f"pass either prompts or input_ids, got {what}")
    if prompts is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask goes with input_ids; prompts are padded here")
        batches = _texts_per_model(prompts, labels)
        pairs: list[tuple[Tensor, Tensor | None]] = [
            _tokenize(texts, tokenizer, label, pad_token_id)
            for texts, tokenizer, label in zip(batches, tokenizers, labels, strict=True)
        ]
    else:
        ids = _tensors_per_model(input_ids, labels, "input_ids")
        masks = _tensors_per_model(attention_mask, labels, "attention_mask")
        pairs = [_check_ids(i, m, label) for i, m, label in zip(ids, masks, labels, strict=True)]
    sizes = [len(ids) for ids, _ in pairs]
    if len(set(sizes)) > 1 or sizes[0] == 0:
        rows = ", ".join(f"{size} for {label}" for size, label in zip(sizes, labels, strict=True))
        raise ValueError(f"every model needs the same number of prompts, at least one, got {rows}")
    encoded = [ids.to(device=device, dtype=torch.int64) for ids, _ in pairs]
    # A mask without zeros says nothing: transformers is faster without one.
    padding = [
        None if m is None or bool(m.all()) else m.to(device=device, dtype=torch.int64)
        for _, m in pairs
    ]
    return encoded, padding


def _texts_per_model(prompts: Any, labels: Sequence[str]) -> list[list[str]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts must be a string or a list, got {type(prompts).__name__}")
    if all(isinstance(p, str) for p in prompts):
        return [list(prompts)] * len(labels)
    lists = all(isinstance(p, (list, tuple)) for p in prompts)
    if not lists or not all(isinstance(text, str) for p in prompts for text in p):
        raise TypeError("prompts must be strings, or one list of strings per model; got a mixture")
    if len(prompts) != len(labels):
        raise ValueError(
            f"expected {len(labels)} lists of prompts, one each for {', '.join(labels)}, "
            f"got {len(prompts)}"
        )
    return [list(p) for p in prompts]


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


def _tokenize(
    texts: Sequence[str], tokenizer: Any, label: str, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Tokenize row by row and pad here: many tokenizers have no padding token or pad right."""
    if tokenizer is None:
        raise ValueError(f"{label} has no tokenizer: pass input_ids, or tokenizers to Ensemble")
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(
                f"prompt {index} ({texts[index]!r}) has no tokens for {label}: a model needs one"
            )
    width = max(map(len, rows), default=0)
    ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


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
