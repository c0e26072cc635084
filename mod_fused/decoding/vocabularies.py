"""Whether one token id means the same token in all models of an ensemble."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


def label(index: int) -> str:
    """What error messages call a model of an ensemble."""
    return "the reference" if index == 0 else f"policy {index}"


def common_ids(tokenizers: Sequence[Any]) -> int | None:
    """Refuse tokenizers that give one id to different tokens. Embeddings may be padded.

    Tokens added behind the smallest vocabulary are no difference: they are never drawn.

    Returns:
        How many ids all tokenizers have in common; None: they have the same tokens.
    """
    known = [(i, t) for i, t in enumerate(tokenizers) if t is not None]
    vocabularies = {id(t): t.get_vocab() for _, t in known}
    if len({frozenset(v.items()) for v in vocabularies.values()}) < 2:
        return None
    first, tokenizer = min(known, key=lambda pair: len(vocabularies[id(pair[1])]))
    expected = vocabularies[id(tokenizer)]
    common = max(expected.values(), default=-1) + 1
    notes = []
    for index, other in known:
        vocabulary = vocabularies[id(other)]
        tokens = expected.keys() | vocabulary.keys()
        differing = [t for t in tokens if expected.get(t) != vocabulary.get(t)]
        differing.sort(key=lambda t: (expected.get(t, 2**63), vocabulary.get(t, 2**63)))
        behind = other.get_added_vocab() if differing else {}
        if all(t in behind and t not in expected and behind[t] >= common for t in differing):
            notes += _note(index, other, differing)
            continue
        token = differing[0]
        here, there = (
            f"maps {token!r} to {v[token]}" if token in v else f"has no {token!r}"
            for v in (vocabulary, expected)
        )
        raise ValueError(
            f"the tokenizers differ: {label(index)}'s {here}, {label(first)}'s {there} "
            f"({len(differing)} of {len(tokens)} tokens differ). One id must mean one token in all "
            "models; check_tokenizers=False skips this check"
        )
    warnings.warn(
        f"only the {common} token ids that all tokenizers have in common are drawn: "
        + "; ".join(notes),
        stacklevel=3,
    )
    return common


def _note(index: int, tokenizer: Any, added: Sequence[str]) -> list[str]:
    """The part of a warning that names the tokens a tokenizer adds; [] for none."""
    if not added:
        return []
    names = ", ".join(map(repr, added[:3])) + (", ..." if len(added) > 3 else "")
    ends = f", among them its end of a sequence {tokenizer.eos_token!r}"
    return [
        f"{label(index)}'s adds {len(added)} ({names})"
        + (ends if tokenizer.eos_token in added else "")
    ]
