"""Record formats: a text, a conversation, a prompt with its response, or a preference.

Owns the names of the fields, their dialects (OpenAI, ShareGPT, TRL) and the checks of a record.
Knows neither tokens nor files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmask.data.chat import Message, Tool, check_message
from unmask.errors import DataError, located

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""ShareGPT's `from` -> role."""


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a record.

    Attributes:
        text: a whole text.
        messages: a conversation: a list of `{"role": ..., "content": ...}` or `{"from": ..., "value": ...}`.
        prompt: what stands before a response: a text or a list of messages.
        response: names of the response, of which a record has one: a text or a list of messages.
        conversations: another name of a conversation.
        chosen: of a preference, the better answer: a text, a list of messages, or the whole conversation.
        rejected: the worse one.
        tools: definitions of functions: a list, or JSON text of one.
    """

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    response: tuple[str, ...] = ("response", "completion")
    conversations: str = "conversations"
    chosen: str = "chosen"
    rejected: str = "rejected"
    tools: str = "tools"

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        conversations = (self.messages, self.conversations)
        return (self.text, *conversations, self.prompt, *self.response, self.chosen, self.rejected, self.tools)


@dataclass(frozen=True)
class PlainText:
    """A text without turns.

    Attributes:
        label: its fields, for messages.
        prompt: its beginning, which is not learnt.
        response: the rest, which is learnt; may be empty.
    """

    label: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Conversation:
    """Turns, at least one of them an assistant's from `num_given` on.

    Attributes:
        label: its fields, for messages.
        messages: the turns, in OpenAI's dialect.
        num_given: number of turns at the start that are context only.
        tools: definitions of functions.
        plain: the same without a template, where it is a prompt and a response.
    """

    label: str
    messages: list[Message]
    num_given: int = 0
    tools: list[Tool] | None = None
    plain: PlainText | None = None

    def __post_init__(self) -> None:
        if not any(message["role"] == "assistant" for message in self.messages[self.num_given :]):
            raise DataError(f"{self.label}: 0 assistant turns to learn from; a conversation needs one")


Example = PlainText | Conversation


def read_example(record: Mapping[str, Any], fields: Fields) -> Example:
    """The example of a record: of its text, conversation, preference and prompt the first that it has.

    A preference counts as a prompt with its chosen answer. A response may be the empty text, an answer that is an end-of-text
    token alone. An empty list of messages is an error: it does not say who answers.

    Raises:
        DataError: a field is missing or malformed.
    """
    present = {name for name, value in record.items() if value is not None}
    if fields.text in present:
        text = record[fields.text]
        if not isinstance(text, str):
            raise DataError(f"field {fields.text} holds {type(text).__name__}, not a text; give a string")
        return PlainText(f"field {fields.text}", "", text)
    for name in (fields.messages, fields.conversations):
        if name in present:
            return Conversation(f"field {name}", _messages(record, name), tools=_tools(record, fields.tools))
    if fields.chosen in present:
        return _answer(record, fields, fields.chosen)
    if fields.prompt in present:
        response = next((name for name in fields.response if name in present), None)
        if response is None:
            raise _missing(record, " or ".join(fields.response))
        return _answer(record, fields, response)
    raise _missing(record, f"{fields.text}, {fields.messages}, {fields.conversations}, {fields.chosen} or {fields.prompt}")


def read_pair(record: Mapping[str, Any], fields: Fields) -> tuple[Example, Example]:
    """The chosen and the rejected side of a preference; their common beginning is given, the rest is learnt.

    Raises:
        DataError: it is no preference, a field is malformed, or the sides are equal or answer different prompts.
    """
    for name in (fields.chosen, fields.rejected):
        if record.get(name) is None:
            raise _missing(record, f"{name}, which a preference has")
    chosen, rejected = _answer(record, fields, fields.chosen), _answer(record, fields, fields.rejected)
    both = f"fields {fields.chosen} and {fields.rejected}"
    if isinstance(chosen, PlainText) and isinstance(rejected, PlainText):
        shared = chosen.response[: _num_shared(chosen.response, rejected.response)]
        if chosen.response == rejected.response:
            raise DataError(f"{both} are equal; give two different answers or remove the record")
        # Not within a word, and white space goes with what follows it: as a tokenizer cuts.
        cut = re.search(r"\s+\S*$", shared)
        start = 0 if cut is None else cut.start()
        return (
            replace(chosen, prompt=shared[:start], response=chosen.response[start:]),
            replace(rejected, prompt=shared[:start], response=rejected.response[start:]),
        )
    if isinstance(chosen, PlainText) or isinstance(rejected, PlainText):
        raise DataError(f"{both} are a text and a list of messages; without {fields.prompt} give both alike")
    if chosen.messages == rejected.messages:
        raise DataError(f"{both} are equal; give two different answers or remove the record")
    num_shared = _num_shared(chosen.messages, rejected.messages)
    for side in (chosen, rejected):
        if [message["role"] for message in side.messages[num_shared : num_shared + 1]] != ["assistant"]:
            raise DataError(f"{both} first differ at message {num_shared + 1}, no answer of both; let them answer one prompt")
    return replace(chosen, num_given=num_shared), replace(rejected, num_given=num_shared)


def _num_shared(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))


def _answer(record: Mapping[str, Any], fields: Fields, name: str) -> Example:
    """The answer in field `name` to the prompt, or to what the answer itself begins with."""
    prompt, answer = record.get(fields.prompt), record[name]
    if prompt is None and isinstance(answer, str):
        return PlainText(f"field {name}", "", answer)
    label = f"field {name}" if prompt is None else f"fields {fields.prompt} and {name}"
    context = [] if prompt is None else _turns(record, fields.prompt, "user")
    turns = _turns(record, name, "assistant")
    num_given = len(context)
    if context and turns[0]["role"] in ("system", "developer", "user"):
        if context[-1] not in turns:
            role = turns[0]["role"]
            raise DataError(f"field {name} starts with a {role} turn but does not hold {fields.prompt}; drop one of them")
        num_given, context = turns.index(context[-1]) + 1, []
    plain = PlainText(label, prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None
    return Conversation(label, context + turns, num_given, _tools(record, fields.tools), plain)


def _turns(record: Mapping[str, Any], name: str, role: str) -> list[Message]:
    if isinstance(record[name], str):
        return [{"role": role, "content": record[name]}]
    return _messages(record, name, "a text or a list of messages")


def _messages(record: Mapping[str, Any], name: str, expected: str = "a list of messages") -> list[Message]:
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"field {name} is not {expected}; give it messages of role and content")
    if not value:
        raise DataError(f"field {name} holds 0 messages; give it at least one or remove the record")
    messages = []
    for number, message in enumerate(value, start=1):
        with located(f"field {name}: message {number}"):
            messages.append(_message(message))
            check_message(messages[-1])
    return messages


def _message(message: Mapping[str, Any]) -> Message:
    """The message in OpenAI's dialect, without nulls."""
    speaker, value = message.get("from"), message.get("value")
    if speaker is None:
        return {key: item for key, item in message.items() if item is not None}
    if speaker not in _SPEAKERS:
        raise DataError(f"from {speaker!r} is not one of {', '.join(_SPEAKERS)}; use one of them")
    if speaker == "function_call":
        calls = _json(value, "value of a function_call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return {"role": _SPEAKERS[speaker], "content": value}


def _tools(record: Mapping[str, Any], name: str) -> list[Tool] | None:
    value = record.get(name)
    if isinstance(value, str):
        value = _json(value, f"field {name}") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"field {name} is not a list of tools; give a list of objects, or JSON text of one")
    return value


def _json(text: Any, label: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{label} is not JSON ({error}); correct it") from error


def _missing(record: Mapping[str, Any], expected: str) -> DataError:
    names = ", ".join(name if value is not None else f"{name} (null)" for name, value in record.items()) or "none"
    return DataError(f"no field {expected}; the fields there are: {names}")
