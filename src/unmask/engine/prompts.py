"""Prompts: a text or a conversation as token ids.

Owns what a prompt may be and its layout by the chat template. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmask.data.chat import Message
from unmask.data.tokenizer import Tokenizer
from unmask.errors import DataError, RequestError

Prompt = str | Sequence[Message]
"""A text, or the messages of a conversation."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, *, chat: bool | None = None) -> list[int]:
    """Ids of a prompt; a text goes through the chat template when there is one, with `chat=False` it never does.

    Raises:
        RequestError: neither a text nor a list of messages, or messages that no template lays out.
    """
    if isinstance(prompt, str):
        if tokenizer.has_chat_template if chat is None else chat:
            return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
        return [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
    messages: Any = prompt
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(f"prompt is {prompt!r:.60}; it must be a text or a list of messages with role and content")
    if chat is False:
        raise RequestError("chat is False and prompt a list of messages; give a text, or leave chat out")
    try:
        return encode_chat(tokenizer, messages)
    except DataError as error:
        raise RequestError(f"prompt: {error}") from error


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation, laid out for an answer.

    Raises:
        RequestError: there is no chat template.
        DataError: the template does not accept the messages.
    """
    if not tokenizer.has_chat_template:
        raise RequestError("the tokenizer has no chat template; use plain text (chat=False)")
    return tokenizer.chat(messages, add_generation_prompt=True)
