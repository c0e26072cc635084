"""Conversations to token ids, by the chat template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

#: Messages {"role": ..., "content": text or [{"type": "text", "text": ...}, ...]}.
Conversation = Sequence[Mapping[str, Any]]


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages. The first item decides: a wrong message after it is
    then reported as a wrong message."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode_conversation(messages: Conversation, tokenizer: Any, label: str) -> list[int]:
    """Token ids as transformers' `apply_chat_template` gives them, with the generation prompt. If
    the last message is the assistant's, the response continues it, as in transformers' pipelines.

    Args:
        messages: at least one.
        tokenizer: with a chat template.
        label: the model's name in error messages.

    Raises:
        TypeError, ValueError: a message without a role, a part other than text, parts where the
            template takes strings only, no template, or an error of the template itself.
    """
    _check_messages(messages)
    goes_on = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    conversation = list(messages)
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        encoded = tokenizer.apply_chat_template(
            conversation, tokenize=True, return_dict=True, **options
        )
    except ImportError:  # no jinja2
        raise
    except Exception as error:  # a template may raise whatever Python raises
        raise ValueError(f"{label}'s tokenizer cannot render the conversation: {error}") from error
    for message in messages:
        if not all(_is_rendered(part, text) for part in _parts(message)):
            raise ValueError(
                f"{label}'s chat template takes content as a string, got a list of parts"
            )
    return list(encoded["input_ids"])


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, (list, tuple)) else ()


def _is_rendered(part: Mapping[str, Any], text: str) -> bool:
    """Whether a template has rendered the part's text. Some templates drop a list, or print it as
    Python or JSON, which shows by its beginning "{'type': 'text', 'text': "."""
    printed = [(str(dict(part)), repr(part["text"]))]
    printed.append((json.dumps(dict(part)), json.dumps(part["text"])))
    heads = [whole.split(own)[0] for whole, own in printed]
    return part["text"].strip() in text and not any(head in text for head in heads)


def _check_messages(messages: Conversation) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {index} must be a dict, got {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} has no role, expected a string: {dict(message)}")
        content = message.get("content")
        if isinstance(content, (str, type(None))):
            continue  # None: a message may hold tool calls alone
        if not isinstance(content, (list, tuple)):
            raise TypeError(
                f"the content of message {index} must be a string or a list of parts, "
                f"got {type(content).__name__}"
            )
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"message {index} has a part of type {kind!r}: parts must be "
                    '{"type": "text", "text": ...}'
                )
