"""Tools: what a model is told about functions, and the grammar of the answers that call them.

Owns the formats in which families of models write tool calls, found by trying a tokenizer's chat template; the conversation
as such a model wants it; and the grammar that makes every call one of a given function with arguments its schema accepts.
Knows no HTTP and no model. `tool_parser` reads the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from unmask.data.chat import Message, Tool
from unmask.data.tokenizer import Tokenizer
from unmask.engine.grammar import Grammar, GrammarCompiler
from unmask.errors import DataError, RequestError
from unmask.serve.tool_parser import END_MARKER, MARKER, CallParser

MAX_CALLS = 16
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_STRING, _MAX_DEPTH = re.compile(r'"(?:\\.|[^"\\])*"'), 100
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_PLAIN_KEYWORDS = frozenset({"type", "properties", "required", "title", "description", "$schema", "$defs", "definitions"})
# The prompt of SmolLM2's model card, word for word, spaces at line ends too: what the model was trained on is its interface.
_PROMPT = """\
You are an expert in composing functions. You are given a question and a set of possible functions.\x20
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.\x20
If none of the functions can be used, point it out and refuse to answer.\x20
If the given question lacks the parameters required by the function, also point it out.

You have access to the following tools:
<tools>{tools}</tools>

The output MUST strictly adhere to the following format, and NO other text MUST be included.
The example format is as follows. Please make sure the parameter type is correct. If no function call is needed, \
please make the tool calls an empty list '[]'.
<tool_call>[
{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},
... (more tool calls as required)
]</tool_call>"""


@dataclass(frozen=True)
class Function:
    """A function that a model may call.

    Attributes:
        name: letters, digits, `_` and `-`, at most 64.
        description: what it does.
        parameters: JSON schema of its arguments, an object; None or empty: it takes none.
        strict: OpenAI's wish for arguments that follow the schema; here they always do.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def definition(self) -> dict[str, Any]:
        """The function as OpenAI's `tools` and chat templates write it."""
        about = {} if self.description is None else {"description": self.description}
        parameters = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": parameters}}


@dataclass(frozen=True)
class ToolChoice:
    """Whether functions are called: as the model likes, not at all, or for certain; `name`: this one, once."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None


@dataclass(frozen=True)
class _Style:
    """How a family writes calls: `marker before CALL between CALL ... after`, CALL a JSON object."""

    marker: str
    before: str
    between: str
    after: str
    key: str
    max_calls: int = MAX_CALLS
    may_be_empty: bool = False

    def call(self, name: str, arguments: str) -> str:
        return f'{{"name": {json.dumps(name)}, "{self.key}": {arguments}}}'

    def answer(self, calls: Sequence[str]) -> str:
        return f"{self.marker}{self.before}{self.between.join(calls)}{self.after}"


_HERMES = _Style(MARKER, "\n", f"\n{END_MARKER}\n{MARKER}\n", f"\n{END_MARKER}", "arguments")
_LIST = _Style(MARKER, "[", ", ", f"]{END_MARKER}", "arguments", may_be_empty=True)
_LLAMA = _Style("", "", "", "", "parameters", max_calls=1)


@dataclass(frozen=True)
class ToolFormat:
    """How one model wants tools. Make one with `tool_format`."""

    _style: _Style
    _shows_tools: bool
    _writes_calls: bool
    _has_system: bool
    _has_developer: bool

    def messages(
        self, messages: Sequence[Message], functions: Sequence[Function], choice: ToolChoice
    ) -> tuple[list[Message], list[Tool] | None]:
        """A conversation, with tool calls and results in it or not, as the model wants it.

        Args:
            messages: as OpenAI writes them, content a text or None.
            functions: the functions; may be empty.
            choice: `none`: the functions are not shown.

        Returns:
            What to give to `Tokenizer.chat`: messages, and tools or None.
        """
        tools: list[Tool] = [] if choice.mode == "none" else [function.definition() for function in functions]
        told = [self._message(message) for message in messages]
        if not self._writes_calls:
            told = self._as_text(told)
        elif self._style.max_calls == 1:
            told = [part for message in told for part in _one_call_each(message)]
        if not tools or self._shows_tools:
            return list(told), tools or None
        return list(self._with_prompt(told, _PROMPT.replace("{tools}", json.dumps(tools)))), None

    def grammar(
        self, functions: Sequence[Function], choice: ToolChoice, *, parallel: bool, answer: Mapping[str, Any] | None = None
    ) -> str | None:
        """Lark source of the whole answer; None where nothing constrains it: no functions, or none may be called.

        Args:
            functions: the functions.
            choice: `auto`: text without a call, or calls with text before them or not; `required`: calls; named: one call.
            parallel: more than one call may be made, where the family does that.
            answer: schema of an answer without calls (`auto`), which is JSON then; None: any text.

        Raises:
            RequestError: a bad or doubled name, a choice of what is not there, or parameters that are no object's schema.
        """
        check_functions(functions, choice)
        if choice.mode == "none" or not functions:
            return None
        style = self._style
        callable_ = [(place, each) for place, each in enumerate(functions) if choice.name in (None, each.name)]
        more = min(style.max_calls, MAX_CALLS if parallel and choice.name is None else 1) - 1
        calls = f"call ({_quoted(style.between)} call){{0,{more}}}" if more else "call"
        if choice.mode == "auto" and style.may_be_empty:
            calls = f"({calls})?"
        begun = " ".join(filter(None, (_quoted(style.before), calls, _quoted(style.after))))
        rules = [f"call: {' | '.join(f'call_{place}' for place, _ in callable_)}"]
        for place, function in callable_:
            schema = _arguments_schema(place, function)
            head, tail = style.call(function.name, "\0").split("\0")
            rules.append(f"call_{place}: {_quoted(head)} arguments_{place} {_quoted(tail)}")
            rules.append(f"arguments_{place}: " + ('"{}"' if schema is None else f"%json {json.dumps(schema)}"))
        calling = " ".join(filter(None, (_quoted(style.marker), begun)))
        if choice.mode == "required":
            rules.insert(0, f"start: {calling}")
        elif answer is not None:
            rules.insert(0, f"start: answer | {calling}")
            rules.append(f"answer: %json {json.dumps({**answer, 'x-guidance': _LAYOUT})}")
        elif style.marker:
            # The lazy rule ends with the first marker; text that goes on without one stays the other.
            rules.insert(0, f"start: TEXT? | begun {begun}\nbegun[lazy]: /(?s:.*){style.marker}/")
            rules.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){style.marker}(?s:.*)/")
        else:
            rules.insert(0, f"start: TEXT? | {begun}")
            rules.append(r'TEXT: /(?s:.+)/ & ~/\{"name"(?s:.*)/')
        return "\n".join(rules) + "\n"

    def compile(
        self,
        compiler: GrammarCompiler,
        functions: Sequence[Function],
        choice: ToolChoice,
        *,
        parallel: bool,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar | None:
        """`grammar`, compiled; a schema that is refused is named.

        Raises:
            RequestError: as `grammar`, or a schema that is not supported, or functions too complex together.
        """
        check_functions(functions, choice)
        if choice.mode == "none" or not functions:
            return None
        for place, function in enumerate(functions):
            schema = _arguments_schema(place, function)
            try:
                compiler.json_schema(schema or {})
            except RequestError as error:
                raise RequestError(f"{_place(place, function)}: {error}") from error
        try:
            return compiler.lark(self.grammar(functions, choice, parallel=parallel, answer=answer) or "")
        except RequestError as error:
            raise RequestError(f"tools: {len(functions)} are too much for one grammar ({error}); give fewer") from error

    def parser(self) -> CallParser:
        """A parser for one answer."""
        return CallParser(marked=bool(self._style.marker))

    def _message(self, message: Message) -> dict[str, Any]:
        """The message with a role the template knows, and without what templates trip over: no content, an empty list."""
        role = "system" if message["role"] == "developer" and not self._has_developer else message["role"]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        calls = [_read(call) for call in message.get("tool_calls") or []]
        content = "" if message.get("content") is None else message["content"]
        return {**kept, "role": role, "content": content, **({"tool_calls": calls} if calls else {})}

    def _as_text(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Calls as the model would write them, results as a user's turn: all those in a row in one."""
        told: list[dict[str, Any]] = []
        was_result = False
        for message in messages:
            is_result = message["role"] == "tool"
            kept = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
            if is_result:
                kept = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            elif "tool_calls" in message:
                written = self._style.answer([self._written(call) for call in message["tool_calls"]])
                kept["content"] = "\n".join(filter(None, (message["content"], written)))
            if is_result and was_result:
                told[-1]["content"] += "\n" + kept["content"]
            else:
                told.append(kept)
            was_result = is_result
        return told

    def _written(self, call: Mapping[str, Any]) -> str:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return self._style.call(function["name"], text)

    def _with_prompt(self, messages: Sequence[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
        """The prompt after a given system text; at the head of the user's first turn where there are no system turns."""
        role = "system" if self._has_system else "user"
        place = next((place for place, message in enumerate(messages) if message["role"] == role), len(messages))
        if self._has_system and place > 0:
            return [{"role": "system", "content": prompt}, *messages]
        if place == len(messages):
            return [*messages, {"role": role, "content": prompt}]
        given = messages[place]["content"]
        parts = (given, prompt) if self._has_system else (prompt, given)
        joined = {**messages[place], "content": "\n\n".join(filter(None, parts))}
        return [*messages[:place], joined, *messages[place + 1 :]]


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """How the model of a tokenizer wants tools, found by giving some to its chat template.

    A template that writes calls says how; one that only shows tools says so in its instructions. Where it knows nothing of
    tools, they go into a system text in SmolLM2's published words.

    Raises:
        RequestError: no chat template, or one that wants calls in a way not known here.
    """
    if not tokenizer.has_chat_template:
        raise RequestError("tools need a chat template and the tokenizer has none; use a model that has one")
    user = {"role": "user", "content": "?"}
    call = {"id": "call_0", "type": "function", "function": {"name": "probe_name", "arguments": {"probe": 1}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_0", "content": "probe_result"}
    tools = [Function("probe_name", "?", {"type": "object", "properties": {"probe": {"type": "integer"}}}).definition()]
    shown = _rendered(tokenizer, [user], tools)
    shows_tools = "probe_name" in shown
    written = _rendered(tokenizer, [user, called, result], tools)
    spaceless = re.sub(r"\s+", "", written)
    styles = (_HERMES, _LIST, _LLAMA)
    patterns = [re.sub(r"\s+", "", style.answer([style.call("probe_name", '{"probe": 1}')])) for style in styles]
    style = next((style for style, pattern in zip(styles, patterns, strict=True) if pattern in spaceless), None)
    writes_calls = style is not None and "probe_result" in written
    if style is None and shows_tools:
        asked = re.search(rf'{MARKER}\s*(\[?)\s*\{{\s*"name"[^\n]*"arguments"', shown)
        if asked is None:
            raise RequestError("the chat template asks for tool calls in a format that is not supported; use another model")
        style = _LIST if asked[1] else _HERMES
    system = {"role": "system", "content": "probe_system"}
    return ToolFormat(
        _style=style or _LIST,
        _shows_tools=shows_tools,
        _writes_calls=writes_calls,
        _has_system="probe_system" in _rendered(tokenizer, [system, user], None),
        _has_developer="developer" in tokenizer.chat_template,
    )


def check_functions(functions: Sequence[Function], choice: ToolChoice) -> None:
    """Raise RequestError for a name that is not one, two functions of one name, or a choice of what is not there."""
    names: set[str] = set()
    for place, function in enumerate(functions):
        if not _NAME.fullmatch(function.name):
            raise RequestError(
                f"tools[{place}].function.name is {function.name[:80]!r}; use 1 to 64 letters, digits, underscores and hyphens"
            )
        if function.name in names:
            raise RequestError(f"tools[{place}].function.name {function.name!r} is given twice; name each function differently")
        names.add(function.name)
    if choice.name is not None and choice.name not in names:
        raise RequestError(f"tool_choice names {choice.name[:80]!r}, which is not among tools; name one of them")
    if choice.mode == "required" and not functions:
        raise RequestError("tool_choice is required and there are no tools; give at least one")


def _arguments_schema(place: int, function: Function) -> dict[str, Any] | None:
    """Schema of the arguments, on one line; None: there are none.

    An object whose schema only lists properties takes no others: a model must not invent arguments.
    """
    given = function.parameters
    if not given:
        return None
    if given.get("type", "object") != "object":
        raise RequestError(f"{_place(place, function)}: type is {str(given['type'])[:80]!r}; it must be object")
    schema = {"type": "object", **given, "x-guidance": _LAYOUT}
    properties, required = given.get("properties"), given.get("required", [])
    is_plain = isinstance(properties, Mapping) and isinstance(required, list) and given.keys() <= _PLAIN_KEYWORDS
    if is_plain and all(name in (properties or {}) for name in required):
        schema["additionalProperties"] = False
    return schema


def _place(place: int, function: Function) -> str:
    return f"tools[{place}].function.parameters of {function.name!r}"


def _read(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object where they are one, so that they come out in the family's layout."""
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        depths = accumulate((char in "[{") - (char in "]}") for char in _STRING.sub("", arguments))
        if max(depths, default=0) > _MAX_DEPTH:
            raise RequestError(f"arguments of a call of {function['name'][:80]!r} nest deeper than {_MAX_DEPTH}; flatten them")
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _one_call_each(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn of several calls as several turns, for a family that makes one at a time."""
    calls = message.get("tool_calls", [])
    first, *others = [{**message, "tool_calls": [call]} for call in calls] or [message]
    return [first, *({**other, "content": ""} for other in others)]


def _quoted(text: str) -> str:
    """A Lark string; nothing for nothing."""
    return json.dumps(text) if text else ""


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
    """The conversation as the template writes it; nothing where it refuses to."""
    try:
        return tokenizer.decode(tokenizer.chat(messages, add_generation_prompt=False, tools=tools), skip_special=False)
    except DataError:
        return ""
