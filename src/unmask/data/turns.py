"""Turns of a record: messages of OpenAI's and ShareGPT's dialects, and which of them are to be learnt.

Owns the fields of a message. Knows neither the fields of a record nor the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.data.chat import Message, check_message
from unmask.errors import DataError, located

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""ShareGPT's `from` -> role."""
_LEARNT_FLAGS = ("weight", "train", "training", "loss")
"""Fields of a message that say whether it is learnt: OpenAI's, axolotl's, ms-swift's."""
_UNREAD = ("mask", "loss_mask", "loss_scale", "loss_weight", "train_detail", "training_detail")
"""Fields that other libraries read, of which we cannot tell or do what they mean."""


@dataclass(frozen=True)
class Turns:
    """Messages in OpenAI's dialect.

    Attributes:
        messages: without nulls, and without the flags.
        left_out: indexes of the assistant's that are not to be learnt.
    """

    messages: list[Message]
    left_out: frozenset[int] = frozenset()


def read_turns(value: Any, name: str, expected: str = "a list of messages") -> Turns:
    """The turns in field `name`.

    Raises:
        DataError: no list of messages, none, or a message that cannot be read.
    """
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"field {name} is not {expected}; give it messages of role and content")
    if not value:
        raise DataError(f"field {name} holds 0 messages; give it at least one or remove the record")
    messages, left_out = [], set()
    for index, message in enumerate(value):
        with located(f"field {name}: message {index + 1}"):
            messages.append(_message(message))
            check_message(messages[-1])
            if not _is_learnt(message, str(messages[-1]["role"])):
                left_out.add(index)
    return Turns(messages, frozenset(left_out))


def read_json(text: Any, label: str) -> Any:
    """The value of a JSON text; raises DataError, naming `label`, when it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{label} is not JSON ({error}); correct it") from error


def _message(message: Mapping[str, Any]) -> Message:
    """The message in OpenAI's dialect, without nulls and flags."""
    for key in _UNREAD:
        if message.get(key) is not None:
            raise DataError(f"{key} is not read; say with weight 0 or 1 whether the message is learnt, or remove it")
    speaker, value = message.get("from"), message.get("value")
    if speaker is None:
        fields = {key: item for key, item in message.items() if item is not None and key not in _LEARNT_FLAGS}
        call = fields.pop("function_call", None)
        return fields if call is None else {**fields, "tool_calls": [{"type": "function", "function": call}]}
    if speaker not in _SPEAKERS:
        raise DataError(f"from {speaker!r} is not one of {', '.join(_SPEAKERS)}; use one of them")
    if speaker == "function_call":
        calls = read_json(value, "value of a function_call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return {"role": _SPEAKERS[speaker], "content": value}


def _is_learnt(message: Mapping[str, Any], role: str) -> bool:
    """What the flags say; True for a turn without any."""
    flags = {key: message[key] for key in _LEARNT_FLAGS if message.get(key) is not None}
    for key, flag in flags.items():
        if not isinstance(flag, int | float) or flag not in (0, 1):
            raise DataError(f"{key} is {flag!r}; it must be 0 or 1, false or true")
        if flag and role != "assistant":
            raise DataError(
                f"{key} is {flag!r}, of a {role} turn: only an assistant's are learnt; remove it, or use supervise: all"
            )
    if len({bool(flag) for flag in flags.values()}) > 1:
        raise DataError(f"{' and '.join(flags)} contradict each other; leave one of them out")
    return all(flags.values())
