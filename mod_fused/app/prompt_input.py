"""Reads prompts and conversations from arguments, standard input and files: UTF-8, one a line."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]


def read_prompts(data: bytes, source: str) -> list[str]:
    """The lines that are not blank, without line ends.

    Lines end in LF or CRLF, whatever the locale. Form feeds, U+2028 and the like do not end a
    line. A byte-order mark at the start is dropped.

    Raises:
        ValueError: a line is not UTF-8, or holds a NUL byte; says which line of the source.
    """
    return [line for _, line in _lines(data, source)]


def read_conversations(data: bytes, source: str) -> list[list[Message]]:
    """One conversation a line: a JSON list of {"role", "content"}, or an object with "messages".

    Raises:
        ValueError: a line holds something else; says which line of the source.
    """
    found = []
    for where, line in _lines(data, source):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ValueError(
                f'{where} must be a list of {{"role": ..., "content": ...}}, or an object with '
                'such a list as "messages"'
            )
        if not _is_unicode(messages):
            raise ValueError(f"{where} holds half of a surrogate pair, which is no character")
        found.append(messages)
    return found


def standard_input() -> bytes:
    """All of standard input."""
    return sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()


def argument(text: str, name: str) -> str:
    """Text of the command line as UTF-8. Python puts bytes that the locale cannot decode into it as
    surrogates.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise ValueError(f"{name} is not valid UTF-8") from None


def _lines(data: bytes, source: str) -> Iterator[tuple[str, str]]:
    """(which line, its text) of each line that is not blank."""
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        where = f"line {number} of {source}"
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{where} is not valid UTF-8") from None
        if "\0" in text:
            raise ValueError(f"{where} holds a NUL byte: expected UTF-8 text")
        if text.strip():
            yield where, text


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_message(value: object) -> bool:
    """Whether a value has the form of a message; the decoder checks the content."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), (str, list)) or "tool_calls" in value
