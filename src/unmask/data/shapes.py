"""Record formats: a text, a conversation, a prompt with its response, or a preference.

Owns the names of the fields and the checks of a record: what a record says is read or refused by name. The fields of messages
are `turns`'. Knows neither tokens nor files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from unmask.data.chat import Message, Tool
from unmask.data.turns import Turns, read_json, read_turns
from unmask.errors import DataError

Shape = Literal["text", "messages", "preference", "prompt"]

_UNREAD = ("history", "functions", "mask", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios")
"""Fields that other libraries read beside a conversation or a prompt; what they hold would be lost."""
_VERDICTS = ("label", "kto_tag")
"""Fields that say whether the answer is a good one, where they hold true or false."""


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
        system: names of a system message beside a conversation or a prompt.
        shape: which shape to read where a record has several; None: such a record is refused.
    """

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    response: tuple[str, ...] = ("response", "completion")
    conversations: str = "conversations"
    chosen: str = "chosen"
    rejected: str = "rejected"
    tools: str = "tools"
    system: tuple[str, ...] = ("system", "system_prompt")
    shape: Shape | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All that are read or refused."""
        shapes = (self.text, self.messages, self.conversations, self.prompt, *self.response, self.chosen, self.rejected)
        others = (self.tools, *self.system, "input", "ended", "finish_reason", *_VERDICTS, *_UNREAD)
        return tuple(dict.fromkeys((*shapes, *others)))


@dataclass(frozen=True)
class PlainText:
    """A text without turns.

    Attributes:
        label: its fields, for messages.
        prompt: its beginning, which is not learnt.
        response: the rest, which is learnt; may be empty.
        ended: it ends there; False: it was cut off.
    """

    label: str
    prompt: str
    response: str
    ended: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns, at least one of them an assistant's from `num_given` on.

    Attributes:
        label: its fields, for messages.
        messages: the turns, in OpenAI's dialect.
        num_given: number of turns at the start that are context only.
        tools: definitions of functions.
        plain: the same without a template, where it is a prompt and a response.
        left_out: indexes of assistant turns that are context only, by a flag of theirs.
        ended: the last answer ends there; False: it was cut off.
    """

    label: str
    messages: list[Message]
    num_given: int = 0
    tools: list[Tool] | None = None
    plain: PlainText | None = None
    left_out: frozenset[int] = frozenset()
    ended: bool = True

    def __post_init__(self) -> None:
        answers = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not any(index >= self.num_given and index not in self.left_out for index in answers):
            raise DataError(f"{self.label}: 0 assistant turns to learn from; a conversation needs one")


Example = PlainText | Conversation


def read_example(record: Mapping[str, Any], fields: Fields) -> Example:
    """The example of a record: its text, conversation, preference, or prompt with a response.

    A preference counts as a prompt with its chosen answer. A response may be the empty text, an answer that is an end-of-text
    token alone. An empty list of messages is an error: it does not say who answers.

    Raises:
        DataError: a field is missing or malformed, the record has several shapes, or it says what would be lost.
    """
    shape, names = _shape(record, fields)
    ended = _ended(record)
    if shape == "text":
        (name,) = names
        if not isinstance(record[name], str):
            raise DataError(f"field {name} holds {type(record[name]).__name__}, not a text; give a string")
        _refuse_system(record, fields, name)
        return PlainText(f"field {name}", "", record[name], ended)
    _refuse_unread(record)
    if shape == "messages":
        turns = _with_system(read_turns(record[names[0]], names[0]), record, fields, names[0])
        tools = _tools(record, fields.tools)
        example: Example = Conversation(f"field {names[0]}", turns.messages, tools=tools, left_out=turns.left_out)
    else:
        example = _answer(record, fields, names[-1])
    if isinstance(example, PlainText):
        return replace(example, ended=ended)
    last = max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")
    plain = None if example.plain is None else replace(example.plain, ended=ended)
    return replace(example, plain=plain, ended=ended or last in example.left_out)


def _shape(record: Mapping[str, Any], fields: Fields) -> tuple[Shape, tuple[str, ...]]:
    """The shape of a record and the fields that make it."""
    present = {name for name, value in record.items() if value is not None}
    shapes: list[tuple[Shape, tuple[str, ...]]] = [("text", (fields.text,))]
    shapes += [("messages", (name,)) for name in (fields.messages, fields.conversations)]
    shapes += [("preference", (fields.chosen,))]
    shapes += [("prompt", (fields.prompt, name)) for name in fields.response]
    found = [(shape, names) for shape, names in shapes if present.issuperset(names)]
    # A conversation may be there twice: under both of its names, or as the chosen side of a preference.
    found = [
        each for index, each in enumerate(found) if not any(_is_same(record, each[1], first) for _, first in found[:index])
    ]
    chosen = [each for each in found if fields.shape in (None, each[0])]
    if len(chosen) > 1:
        names = " and ".join(", ".join(each) for _, each in chosen)
        raise DataError(f"the record has fields {names}; keep one, or say with the source's shape which is meant")
    if chosen:
        return chosen[0]
    if fields.prompt in present and fields.shape in (None, "prompt"):
        raise _missing(record, " or ".join(fields.response))
    everything = f"{fields.text}, {fields.messages}, {fields.conversations}, {fields.chosen} or {fields.prompt}"
    expected = [name for shape, names in shapes if shape == fields.shape for name in names]
    raise _missing(record, " or ".join(dict.fromkeys(expected)) or everything)


def _is_same(record: Mapping[str, Any], names: tuple[str, ...], others: tuple[str, ...]) -> bool:
    return len(names) == len(others) == 1 and isinstance(record[names[0]], list) and record[names[0]] == record[others[0]]


def _ended(record: Mapping[str, Any]) -> bool:
    """Whether the text or the last answer ends where it does, and was not cut off."""
    ended, reason = record.get("ended"), record.get("finish_reason")
    if ended is not None and not isinstance(ended, bool):
        raise DataError(f"field ended is {ended!r}; it must be true or false")
    if reason is not None and not isinstance(reason, str):
        raise DataError(f"field finish_reason is {reason!r}; it must be a text, such as stop or length")
    return reason != "length" if ended is None else ended


def _refuse_unread(record: Mapping[str, Any]) -> None:
    for name in _UNREAD:
        if record.get(name) not in (None, [], {}, ""):
            raise DataError(f"field {name} is not read, and what it says would be lost; put it into the messages or remove it")
    for name in _VERDICTS:
        if record.get(name) is False:
            raise DataError(f"field {name} is false: an answer that is not to be learnt; remove the record")


def _system(record: Mapping[str, Any], fields: Fields) -> tuple[str, str] | None:
    """Field and text of a system message beside the turns."""
    found = [(name, record[name]) for name in fields.system if record.get(name) not in (None, "")]
    if len(found) > 1:
        raise DataError(f"fields {' and '.join(name for name, _ in found)} are both there; keep one")
    for name, text in found:
        if not isinstance(text, str):
            raise DataError(f"field {name} holds {type(text).__name__}, not a text; give a string")
    return found[0] if found else None


def _refuse_system(record: Mapping[str, Any], fields: Fields, name: str) -> None:
    system = _system(record, fields)
    if system is not None:
        raise DataError(f"field {system[0]} stands beside field {name}, which has no turns; give messages, or remove it")


def _with_system(turns: Turns, record: Mapping[str, Any], fields: Fields, name: str) -> Turns:
    """The turns behind the system message that stands beside them, if one does."""
    system = _system(record, fields)
    if system is None:
        return turns
    if turns.messages[0]["role"] in ("system", "developer"):
        raise DataError(f"field {system[0]} stands beside a system turn in field {name}; keep one of them")
    message = {"role": "system", "content": system[1]}
    return Turns([message, *turns.messages], frozenset(index + 1 for index in turns.left_out))


def read_pair(record: Mapping[str, Any], fields: Fields) -> tuple[Example, Example]:
    """The chosen and the rejected side of a preference; their common beginning is given, the rest is learnt.

    Raises:
        DataError: it is no preference, a field is malformed, or the sides are equal or answer different prompts.
    """
    for name in (fields.chosen, fields.rejected):
        if record.get(name) is None:
            raise _missing(record, f"{name}, which a preference has")
    _refuse_unread(record)
    if not _ended(record):
        raise DataError("field ended or finish_reason does not say of which answer of a preference; remove it")
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
        _refuse_system(record, fields, name)
        return PlainText(f"field {name}", "", answer)
    label = f"field {name}" if prompt is None else f"fields {fields.prompt} and {name}"
    if isinstance(prompt, str) and fields.prompt == "instruction" and record.get("input") not in (None, ""):
        prompt = f"{prompt}\n{record['input']}"
    context = Turns([]) if prompt is None else _turns(prompt, fields.prompt, "user")
    turns = _turns(answer, name, "assistant")
    num_given, left_out = len(context.messages), {index + len(context.messages) for index in turns.left_out}
    messages = context.messages + turns.messages
    if context.messages and turns.messages[0]["role"] in ("system", "developer", "user"):
        if context.messages[-1] not in turns.messages:
            role = turns.messages[0]["role"]
            raise DataError(f"field {name} starts with a {role} turn but does not hold {fields.prompt}; drop one of them")
        num_given, messages, left_out = turns.messages.index(context.messages[-1]) + 1, turns.messages, set(turns.left_out)
    whole = _with_system(Turns(messages, frozenset(left_out)), record, fields, name if prompt is None else fields.prompt)
    is_plain = isinstance(prompt, str) and isinstance(answer, str) and whole.messages is messages
    plain = PlainText(label, str(prompt), answer) if is_plain else None
    num_given += len(whole.messages) - len(messages)
    return Conversation(label, whole.messages, num_given, _tools(record, fields.tools), plain, whole.left_out)


def _turns(value: Any, name: str, role: str) -> Turns:
    if isinstance(value, str):
        return Turns([{"role": role, "content": value}])
    return read_turns(value, name, "a text or a list of messages")


def _tools(record: Mapping[str, Any], name: str) -> list[Tool] | None:
    value = record.get(name)
    if isinstance(value, str):
        value = read_json(value, f"field {name}") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"field {name} is not a list of tools; give a list of objects, or JSON text of one")
    return value


def _missing(record: Mapping[str, Any], expected: str) -> DataError:
    names = ", ".join(name if value is not None else f"{name} (null)" for name, value in record.items()) or "none"
    return DataError(f"no field {expected}; the fields there are: {names}")
