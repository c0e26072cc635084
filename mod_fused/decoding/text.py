"""The text of responses: whole, or token by token at a cost that does not grow with the length.

Tokenizers such as SentencePiece drop the space in front of a text. A response continues a text, so
its first space must stay: `Decoder` decodes a word and the response together and cuts off the word.
A *border* is a token before which the decoded text no longer depends on what follows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

# How many last characters clean-up (" n ' t" to "n't") may still change: all its patterns' lengths.
_SLACK = 24
_FEWEST = 16  # no border is looked for among fewer tokens
_TRIES = 12  # how many places are tried for a border
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Decoder:
    """Decodes responses as the continuation of a text.

    Args:
        tokenizer: one of transformers', or an object with the same `decode`.
        skip_special_tokens: leave out special tokens; False shows them as text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._word = next((w for w in _words(tokenizer) if self._serves(w)), [])
        self._length = len(self._whole(self._word)) if self._word else 0
        self._late = _SLACK if self._cleans_up() else 0

    def __call__(self, token_ids: Sequence[int]) -> str:
        """The text of a response, or of a part of one that begins at a border."""
        return self._whole([*self._word, *token_ids])[self._length :]

    def is_border(self, token_id: int) -> bool:
        """Whether the text before this token no longer depends on what follows: the token has text
        of its own, and is no single byte, which would be decoded together with its neighbours."""
        return not self._is_byte(token_id) and self([token_id]) != ""

    def lasting(self, token_ids: Sequence[int], text: str) -> int:
        """How many characters of these tokens' text are final: no later token changes them."""
        end = len(token_ids)
        while end and not self.is_border(token_ids[end - 1]):
            end -= 1
        if any(map(self._is_byte, token_ids[end:])):
            text = self(token_ids[:end])  # a run of bytes becomes valid text only as a whole
        return len(text[: max(0, len(text) - self._late)].rstrip("\ufffd"))

    def _whole(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=self._skip)

    def _serves(self, word: list[int]) -> bool:
        text = self._whole(word)
        return text.isascii() and text.isalnum() and self._whole(word * 2).startswith(text)

    def _is_byte(self, token_id: int) -> bool:
        named = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        return named is not None and _BYTE.fullmatch(named(token_id) or "") is not None

    def _cleans_up(self) -> bool:
        """Whether decoding removes spaces, such as those before full stops."""
        text = self._whole(_plain_ids(self._tokenizer, "a ."))
        if "a" in text and "." in text:
            return "a ." not in text
        return bool(getattr(self._tokenizer, "clean_up_tokenization_spaces", False))


class GrowingText:
    """The text of one response as its tokens come. Only the tokens behind the last border are
    decoded anew.

    Attributes:
        open: the text behind the border so far; later tokens may change it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []  # behind the border
        self._next_try = _FEWEST
        self.open = ""

    def add(self, token_id: int) -> str:
        """Take the next token; returns the text that fell behind the border, often none."""
        self._ids.append(token_id)
        self.open = self._decoder(self._ids)
        if len(self._ids) < self._next_try:
            return ""
        settled = self._settle()
        # Without a border wait for twice as many tokens: else each token would decode them all.
        self._next_try = max(_FEWEST, 2 * len(self._ids))
        return settled

    def lasting(self) -> int:
        """How many characters of `open` are final."""
        return self._decoder.lasting(self._ids, self.open)

    def copy(self) -> GrowingText:
        """An independent copy."""
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    def _settle(self) -> str:
        """Move the border as far as it is certain; returns the text that it passes."""
        cut = len(self._ids) // 2
        for _ in range(_TRIES):
            if cut < 1:
                break
            rest = self._decoder(self._ids[cut:])
            if len(rest) < _SLACK:
                cut //= 2
                continue
            if self._decoder.is_border(self._ids[cut]):
                settled = self._decoder(self._ids[:cut])
                if settled + rest == self.open:
                    self._ids, self.open = self._ids[cut:], rest
                    return settled
            cut -= 1
        return ""


class StopStrings:
    """Whether the text of one response, its special tokens included, holds a stop string."""

    def __init__(self, stops: Sequence[str], decoder: Decoder) -> None:
        self._stops, self._text = stops, GrowingText(decoder)
        self._kept = max(map(len, stops)) - 1  # how far back an occurrence may begin
        self._past = ""

    def add(self, token_id: int) -> bool:
        """Take the next token; whether the response so far holds a stop string."""
        self._past += self._text.add(token_id)
        text = self._past + self._text.open
        self._past = self._past[max(0, len(self._past) - self._kept) :]
        return any(stop in text for stop in self._stops)

    def copy(self) -> StopStrings:
        """An independent copy."""
        other = copy.copy(self)
        other._text = self._text.copy()
        return other


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    if not callable(tokenizer):  # it can only decode
        return []
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _words(tokenizer: Any) -> Iterator[list[int]]:
    """Candidates for the word to decode in front: common words, then the vocabulary's tokens."""
    for text in ("a", "the", "A", "0"):
        yield _plain_ids(tokenizer, text)
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    for token, token_id in vocabulary.items():
        core = token.removesuffix("</w>").strip("▁Ġ ")
        if core.isascii() and core.isalnum():
            yield [token_id]
