"""`ToolFormat`: how a model reads function definitions and writes tool calls, and the grammar of such answers.

Owns the tool call formats of model families, detected from a tokenizer's chat template; conversations in those formats; and
the grammar under which every call names a given function and its arguments follow the function's schema. Knows no HTTP and no
model. `tool_parser` reads the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from unmask.data.chat import Message, Tool
from unmask.data.tokenizer import Tokenizer
from unmask.engine.grammar import Grammar, GrammarCompiler
from unmask.engine.json_schema import close_objects
from unmask.errors import DataError, RequestError
from unmask.serve.protocol.messages import FunctionSpec
from unmask.serve.tool_parser import END_MARKER, MARKER, CallParser

MAX_CALLS = 16
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_OPENING, _NAMED = r"\s*(```(json)?\s*)?", r'\s*\{\s*"name"\s*:\s*'
_WRAP = r'\s*\{\s*"type"\s*:\s*"function"\s*,\s*"function"\s*:'
_STRING, _MAX_DEPTH = re.compile(r'"(?:\\.|[^"\\])*"'), 100
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
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
class ToolChoice:
    """Whether functions are called: `auto` (the model decides), `none` or `required`; `name`: this one, once."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None


@dataclass(frozen=True)
class _CallStyle:
    """How a model family writes calls: `marker before CALL between CALL ... after`, where CALL is a JSON object."""

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


_HERMES = _CallStyle(MARKER, "\n", f"\n{END_MARKER}\n{MARKER}\n", f"\n{END_MARKER}", "arguments")
_LIST = _CallStyle(MARKER, "[", ", ", f"]{END_MARKER}", "arguments", may_be_empty=True)
_LLAMA = _CallStyle("", "", "", "", "parameters", max_calls=1)


@dataclass(frozen=True)
class ToolFormat:
    """The tool format of one model; made by `tool_format`."""

    _style: _CallStyle
    _shows_tools: bool
    _writes_calls: bool
    _has_system: bool

    def messages(
        self, messages: Sequence[Message], functions: Sequence[FunctionSpec], choice: ToolChoice
    ) -> tuple[list[Message], list[Tool] | None]:
        """A conversation in the form that the model's chat template accepts, tool calls and results included.

        Args:
            messages: in OpenAI's form, content a text or None.
            functions: may be empty.
            choice: with `none`, the functions are not shown.

        Returns:
            Messages and tools (or None) for `Tokenizer.chat`.
        """
        tools: list[Tool] = [] if choice.mode == "none" else [_definition(function) for function in functions]
        converted = [self._message(message) for message in messages]
        if not self._writes_calls:
            converted = self._as_text(converted)
        elif self._style.max_calls == 1:
            converted = [single for message in converted for single in _one_call_each(message)]
        if not tools or self._shows_tools:
            return list(converted), tools or None
        return list(self._with_prompt(converted, _PROMPT.replace("{tools}", json.dumps(tools)))), None

    def grammar(
        self, functions: Sequence[FunctionSpec], choice: ToolChoice, *, parallel: bool, answer: Mapping[str, Any] | None = None
    ) -> str | None:
        """Lark grammar of the whole answer; None where nothing constrains it: no functions, or choice `none`.

        Args:
            functions: the functions.
            choice: `auto`: text without calls, or calls with or without text before them; `required`: calls; named: one call.
            parallel: allow several calls, where the model family makes several.
            answer: JSON schema of an answer without calls (`auto`); None: any text.

        Raises:
            RequestError: an invalid or repeated name, a choice of an unknown function, or parameters that are not the schema
                of an object.
        """
        _check_functions(functions, choice)
        if choice.mode == "none" or not functions:
            return None
        style = self._style
        callable_ = [(index, each) for index, each in enumerate(functions) if choice.name in (None, each.name)]
        more = min(style.max_calls, MAX_CALLS if parallel and choice.name is None else 1) - 1
        calls = f"call ({_quoted(style.between)} call){{0,{more}}}" if more else "call"
        if choice.mode == "auto" and style.may_be_empty:
            calls = f"({calls})?"
        begun = " ".join(filter(None, (_quoted(style.before), calls, _quoted(style.after))))
        rules = [f"call: {' | '.join(f'call_{index}' for index, _ in callable_)}"]
        for index, function in callable_:
            schema = _arguments_schema(index, function)
            head, tail = style.call(function.name, "\0").split("\0")
            rules.append(f"call_{index}: {_quoted(head)} arguments_{index} {_quoted(tail)}")
            rules.append(f"arguments_{index}: " + ('"{}"' if schema is None else f"%json {json.dumps(schema)}"))
        calling = " ".join(filter(None, (_quoted(style.marker), begun)))
        if choice.mode == "required":
            rules.insert(0, f"start: {calling}")
        elif answer is not None:
            rules.insert(0, f"start: answer | {calling}")
            rules.append(f"answer: %json {json.dumps({**answer, 'x-guidance': _LAYOUT})}")
        else:
            rules += self._auto_rules(callable_, begun, f'(", " call){{0,{more}}}' if more else "")
        return "\n".join(rules) + "\n"

    def _auto_rules(self, functions: Sequence[tuple[int, FunctionSpec]], begun: str, more: str) -> list[str]:
        """Rules of an answer that is text until the model opens a call, from where on the grammar leads.

        A call is opened by the family's marker anywhere, or by an answer that begins as a call of a given function: alone or in
        a list, in OpenAI's `{"type": "function", ...}` or not, in a code block or not.

        Args:
            functions: that may be called, with their numbers.
            begun: what follows the marker.
            more: what may follow the first call of a list.
        """
        names, marker = "|".join(function.name for _, function in functions), self._style.marker
        starts, rules = ["TEXT?"], []
        for index, function in functions:
            before, after = self._style.call(function.name, "\0").partition(f'"{function.name}"')[2].split("\0")
            rules.append(f"tail_{index}: {_quoted(before)} arguments_{index} {_quoted(after)}")
            for kind, bracket, wrap in (("one", "", ""), ("list", r"\[", ""), ("wrapped", "", _WRAP), ("wraps", r"\[", _WRAP)):
                rules.append(f'{kind}_{index}[lazy]: /{_OPENING}{bracket}{wrap}{_NAMED}"{function.name}"/')
                closing = [_quoted("}" if wrap else ""), more if bracket else "", _quoted("]" if bracket else "")]
                starts.append(" ".join(filter(None, (f"{kind}_{index} tail_{index}", *closing))))
        no_text = rf'~/{_OPENING}\[?({_WRAP})?{_NAMED}"({names})"(?s:.*)/'
        if marker:
            # A lazy rule ends at the first marker.
            starts.append(f"begun {begun}")
            rules += ["begun[lazy]: BEGUN", f"BEGUN: /(?s:.*){marker}/ & {no_text}"]
            no_text += f" & ~/(?s:.*){marker}(?s:.*)/"
        return [f"start: {' | '.join(starts)}", f"TEXT: /(?s:.+)/ & {no_text}", *rules]

    def compile(
        self,
        compiler: GrammarCompiler,
        functions: Sequence[FunctionSpec],
        choice: ToolChoice,
        *,
        parallel: bool,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar | None:
        """`grammar`, compiled.

        Raises:
            RequestError: as of `grammar`; an unsupported schema, which is named; or functions too complex together.
        """
        grammar = self.grammar(functions, choice, parallel=parallel, answer=answer)
        if grammar is None:
            return None
        for index, function in enumerate(functions):
            schema = _arguments_schema(index, function)
            try:
                compiler.json_schema(schema or {})
            except RequestError as error:
                raise RequestError(f"{_parameters_field(index, function)}: {error}") from error
        try:
            return compiler.lark(grammar)
        except RequestError as error:
            raise RequestError(f"tools: {len(functions)} functions exceed one grammar ({error}); give fewer") from error

    def parser(self, names: Container[str]) -> CallParser:
        """A parser for one answer, in which functions of these names are called."""
        return CallParser(names, marked=bool(self._style.marker))

    @staticmethod
    def _message(message: Message) -> dict[str, Any]:
        """The message with a text as content and no empty list of calls."""
        fields = {key: value for key, value in message.items() if key != "tool_calls"}
        calls = [_parsed(call) for call in message.get("tool_calls") or []]
        content = "" if message.get("content") is None else message["content"]
        return {**fields, "content": content, **({"tool_calls": calls} if calls else {})}

    def _as_text(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with calls as text in the model's own format, and neighbouring tool results as one user message."""
        converted: list[dict[str, Any]] = []
        was_result = False
        for message in messages:
            is_result = message["role"] == "tool"
            fields = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
            if is_result:
                fields = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            elif "tool_calls" in message:
                calls = self._style.answer([self._call_text(call) for call in message["tool_calls"]])
                fields["content"] = "\n".join(filter(None, (message["content"], calls)))
            if is_result and was_result:
                converted[-1]["content"] += "\n" + fields["content"]
            else:
                converted.append(fields)
            was_result = is_result
        return converted

    def _call_text(self, call: Mapping[str, Any]) -> str:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return self._style.call(function["name"], text)

    def _with_prompt(self, messages: Sequence[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
        """Messages with the prompt after their system text, or before the first user message of a model without system role."""
        role = "system" if self._has_system else "user"
        index = next((index for index, message in enumerate(messages) if message["role"] == role), len(messages))
        if self._has_system and index > 0:
            return [{"role": "system", "content": prompt}, *messages]
        if index == len(messages):
            return [*messages, {"role": role, "content": prompt}]
        content = messages[index]["content"]
        texts = (content, prompt) if self._has_system else (prompt, content)
        joined = {**messages[index], "content": "\n\n".join(filter(None, texts))}
        return [*messages[:index], joined, *messages[index + 1 :]]


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """The tool format of a model, detected by rendering probe messages with its chat template.

    A template that renders calls shows their style; one that only renders tools describes the style in its instructions. For
    a template without tool support, the tools go into a system text in the words of SmolLM2's model card.

    Raises:
        RequestError: no chat template, or one with an unknown style of calls.
    """
    if not tokenizer.has_chat_template:
        raise RequestError("tools need a chat template and the tokenizer has none; use a model that has one")
    user = {"role": "user", "content": "?"}
    call = {"id": "call_0", "type": "function", "function": {"name": "probe_name", "arguments": {"probe": 1}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_0", "content": "probe_result"}
    parameters = {"type": "object", "properties": {"probe": {"type": "integer"}}}
    tools = [_definition(FunctionSpec(name="probe_name", description="?", parameters=parameters))]
    with_tools = _rendered(tokenizer, [user], tools)
    shows_tools = "probe_name" in with_tools
    with_calls = _rendered(tokenizer, [user, called, result], tools)
    spaceless = re.sub(r"\s+", "", with_calls)
    styles = (_HERMES, _LIST, _LLAMA)
    patterns = [re.sub(r"\s+", "", style.answer([style.call("probe_name", '{"probe": 1}')])) for style in styles]
    style = next((style for style, pattern in zip(styles, patterns, strict=True) if pattern in spaceless), None)
    writes_calls = style is not None and "probe_result" in with_calls
    if style is None and shows_tools:
        match = re.search(rf'{MARKER}\s*(\[?)\s*\{{\s*"name"[^\n]*"arguments"', with_tools)
        if match is None:
            raise RequestError("the chat template asks for tool calls in a format that is not supported; use another model")
        style = _LIST if match[1] else _HERMES
    system = {"role": "system", "content": "probe_system"}
    return ToolFormat(
        _style=style or _LIST,
        _shows_tools=shows_tools,
        _writes_calls=writes_calls,
        _has_system="probe_system" in _rendered(tokenizer, [system, user], None),
    )


def _definition(function: FunctionSpec) -> Tool:
    """The function as OpenAI's `tools` and chat templates write it."""
    about = {} if function.description is None else {"description": function.description}
    parameters = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": function.name, **about, "parameters": parameters}}


def _check_functions(functions: Sequence[FunctionSpec], choice: ToolChoice) -> None:
    """Raise RequestError for an invalid name, two functions of one name, or a choice of an unknown function."""
    names: list[str] = []
    for index, function in enumerate(functions):
        if not _NAME.fullmatch(function.name):
            raise RequestError(
                f"tools[{index}].function.name is {function.name[:80]!r}; use 1 to 64 letters, digits, underscores and hyphens"
            )
        if function.name in names:
            raise RequestError(f"tools[{index}].function.name {function.name!r} is given twice; name each function differently")
        names.append(function.name)
    if choice.name is not None and choice.name not in names:
        raise RequestError(f"tool_choice names {choice.name[:64]!r}; the tools are {', '.join(names)}")
    if choice.mode == "required" and not functions:
        raise RequestError("tool_choice is required and there are no tools; give at least one")


def _arguments_schema(index: int, function: FunctionSpec) -> dict[str, Any] | None:
    """JSON schema of the arguments, to be written on one line; None: the function takes none."""
    parameters = function.parameters
    if not parameters:
        return None
    if parameters.get("type", "object") != "object":
        field = _parameters_field(index, function)
        raise RequestError(f"{field}: type is {str(parameters['type'])[:80]!r}; it must be object")
    return {**close_objects({"type": "object", **parameters}), "x-guidance": _LAYOUT}


def _parameters_field(index: int, function: FunctionSpec) -> str:
    return f"tools[{index}].function.parameters of {function.name!r}"


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments parsed if they are JSON, so that the template lays them out in the family's way."""
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
    """A message of several calls as several messages, for a model family that makes one call at a time."""
    calls = message.get("tool_calls", [])
    first, *others = [{**message, "tool_calls": [call]} for call in calls] or [message]
    return [first, *({**other, "content": ""} for other in others)]


def _quoted(text: str) -> str:
    """A Lark string literal; empty for an empty text."""
    return json.dumps(text) if text else ""


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
    """The conversation as the template renders it; empty where it refuses."""
    try:
        return tokenizer.render(messages, add_generation_prompt=False, tools=tools)
    except DataError:
        return ""
