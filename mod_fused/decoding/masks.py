"""Which tokens a step may draw: what min_new_tokens, bad_words_ids, logits processors of
transformers that only exclude tokens, and the caller's mask_fn leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.fields import check_tensor
from ..torch_kernels import filters
from .options import Limits, count, plain

_BAD_ID = "a token id of bad_words_ids"

MaskFunction = Callable[[int, Tensor], Tensor]


class ProcessorMasks(NamedTuple):
    """Logits processors as a mask_fn of `generate`."""

    processors: Sequence[Callable[[Tensor, Tensor], Tensor]]  # they only set scores to -inf
    mask_fn: MaskFunction | None  # the caller's, which goes with them

    @property
    def constrained(self) -> bool:
        """Whether one asks a function of the caller's, as a mask_fn is."""
        names = [type(processor).__name__ for processor in self.processors]
        return "PrefixConstrainedLogitsProcessor" in names


class BadWords(NamedTuple):
    """Forbidden sequences of one length n."""

    before: Tensor  # int64 [N, n - 1]
    last: Tensor  # int64 [N], not drawn after what stands before
    largest: int  # of all these ids


def bad_words_of(
    given: Any, ends: Sequence[int], vocab_size: int | None, device: torch.device
) -> list[BadWords]:
    """bad_words_ids of `mod_fused.generate`, checked; those of one end-of-sequence id left out."""
    if given is None:
        return []
    given = plain(given)
    if not isinstance(given, list) or not all(isinstance(word, list) for word in given):
        raise TypeError(f"bad_words_ids must be a list of lists of token ids, got {given!r}")
    if not all(given):
        raise ValueError("bad_words_ids must not hold an empty list: it would forbid every token")
    by_length: dict[int, list[list[int]]] = {}
    for word in given:
        checked = [count(_BAD_ID, token, 0, vocab_size) for token in word]
        if len(checked) > 1 or checked[0] not in ends:
            by_length.setdefault(len(checked), []).append(checked)
    made: list[BadWords] = []
    for words in by_length.values():
        ids = torch.tensor(words, dtype=torch.int64, device=device)
        made.append(BadWords(ids[:, :-1], ids[:, -1], max(map(max, words))))
    return made


class Masks:
    """The masks of one decode.

    Args:
        mask_fn: that of `generate`.
        limits: min_new_tokens, and the end-of-sequence ids that it excludes.
        options: those of `mod_fused.sample`; vocab_size and the cut of the support are read.
        automatic_cut: the caller left the cut (plausibility) to `generate`.
        bad_words: of `bad_words_of`.
    """

    def __init__(
        self,
        mask_fn: MaskFunction | ProcessorMasks | None,
        limits: Limits,
        options: dict[str, Any],
        automatic_cut: bool,
        bad_words: Sequence[BadWords] = (),
    ) -> None:
        if not isinstance(mask_fn, ProcessorMasks):
            mask_fn = ProcessorMasks((), mask_fn)
        self._processors, self._mask_fn = mask_fn
        self._constrained = mask_fn.constrained
        self._limits, self._options, self._bad_words = limits, options, bad_words
        self._automatic_cut = automatic_cut and options["plausibility"] is not None

    def step(
        self,
        step: int,
        sequences: Tensor,
        models: Sequence[Tensor],
        candidates: bool,
        read: Tensor,
    ) -> dict[str, Any]:
        """The step's mask, and its plausibility where that changes, as `mod_fused.sample` takes
        them.

        Args:
            step: counts from 0.
            sequences: int64 [B, n + step].
            models: logits [B, V_i] of each model, reference first.
            candidates: the values exclude tokens too.
            read: the sequences with -1 for padding.
        """
        vocab = self._options["vocab_size"] or min(x.shape[1] for x in models)
        own = self._own(step, sequences, vocab, read)
        theirs = None if self._mask_fn is None else self._mask_fn(step, sequences)
        given: dict[str, Any] = {"mask": own if theirs is None else theirs}
        if own is not None and theirs is not None:
            given["mask"] = own & unpacked(theirs, own)
        if self._automatic_cut:
            if theirs is not None or self._constrained or candidates:
                given["plausibility"] = None
            elif own is not None:
                given["plausibility"] = self._cut_among(own, models)
        return given

    def _own(self, step: int, sequences: Tensor, vocab: int, read: Tensor) -> Tensor | None:
        """What processors, min_new_tokens and bad words leave, bool [B, V]; None: everything."""
        early = step < self._limits.min_new_tokens
        ends = [token for token in self._limits.eos_token_ids if token < vocab] if early else []
        if not self._processors and not ends and not self._bad_words:
            return None
        shape = len(sequences), vocab
        scores = torch.zeros(shape, dtype=torch.float32, device=sequences.device)
        scores[:, ends] = -torch.inf
        for words in self._bad_words:
            count(_BAD_ID, words.largest, 0, vocab)
            start = read.shape[1] - words.before.shape[1]
            if start >= 0:
                complete = (read[:, None, start:] == words.before).all(-1)
                excluded = torch.where(complete, -torch.inf, 0.0)
                scores.index_add_(1, words.last, excluded)
        for processor in self._processors:  # after the ends: one may force the last token
            scores = processor(sequences, scores)
        return scores != -torch.inf

    def _cut_among(self, mask: Tensor, models: Sequence[Tensor]) -> Tensor:
        """The automatic cut [B], measured from the most likely token that the mask leaves: it may
        be far below the peak, and a cut from there could leave nothing."""
        at, scales = self._options["plausibility_tensor"], self._options["logit_scales"]
        logits = models[at][:, : mask.shape[1]].float() * (1.0 if scales is None else scales[at])
        left = logits.masked_fill(~mask, -torch.inf).amax(1)
        return (left - logits.amax(1)).double().exp() * self._options["plausibility"]


def unpacked(mask: Any, like: Tensor) -> Tensor:
    """A mask of `mod_fused.sample`, checked, as bool [B, V], the shape of `like`."""
    rows, vocab = like.shape
    if isinstance(mask, Tensor) and mask.dtype == torch.int32:
        shapes = {"[B, ceil(V / 32)]": [rows, (vocab + 31) // 32]}
    else:
        shapes = {"[B, V]": [rows, vocab]}
    mask = check_tensor("mask", mask, (torch.bool, torch.int32), like.device, shapes)
    return filters.unpacked(mask, vocab)
