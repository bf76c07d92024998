"""Chat templates: conversations as text, in which message text cannot pass for the template's control tokens.

Owns rendering and the division of the result into control tokens, answers and plain text. Knows no token ids.

Before rendering, every spelling of a control token inside a message or a tool is replaced by a code made of Unicode
noncharacters, which cannot be in text; so every control token in the rendered text is the template's own. The codes are
decoded in the text between control tokens, which is then encoded as plain text only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unmask.data.chat_template import ChatTemplate
from unmask.errors import DataError

Message = Mapping[str, Any]
"""`role`, `content` and whatever else the template reads, such as `tool_calls`."""
Tool = Mapping[str, Any]
"""The definition of a function a model may call, as the template wants it."""

_CODE, _ANSWER, _ANSWER_END = "\ufdd0", "\ufdd1", "\ufdd2"
_CODES = re.compile(f"{_CODE}(\\d+){_CODE}")
_MARKS = re.compile(f"([{_ANSWER}{_ANSWER_END}])")
_FIXED_ARGUMENTS = frozenset(
    (
        *("chat_template", "tools", "tokenize", "sanitize_control_tokens", "add_generation_prompt", "continue_final_message"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    )
)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


@dataclass(frozen=True)
class Span:
    """A span of a rendered conversation.

    Attributes:
        text: its text, or the spelling of one control token.
        is_control: it is a control token.
        is_answer: an assistant writes it: an answer, or the control token that closes one, with white space before that.
    """

    text: str
    is_control: bool
    is_answer: bool


def check_message(message: Message) -> None:
    """Raise DataError for a message that no template could lay out."""
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"role {role!r} of a message is not one of {', '.join(sorted(_ROLES))}; use one of them")
    has_more = any(value for key, value in message.items() if key not in ("role", "content", "name"))
    if not isinstance(content, str) and not (content is None and has_more):
        raise DataError(f"content {_short(content)} of the {role} message is not a text; give a string")
    if calls is not None and not (isinstance(calls, (list, tuple)) and all(_is_call(call) for call in calls)):
        raise DataError(f"tool_calls {_short(calls)} of the {role} message is not a list of calls; give each a name")


class Renderer:
    """One tokenizer's chat template."""

    def __init__(self, template: ChatTemplate, control_tokens: Iterable[str]) -> None:
        """Wrap a template.

        Args:
            template: the tokenizer's.
            control_tokens: spellings of the control tokens.
        """
        self._source = template
        self._control_tokens = sorted(control_tokens, key=lambda token: (-len(token), token))
        self._codes = {token: code for code, token in enumerate(self._control_tokens)}
        pattern = "|".join(re.escape(token) for token in self._control_tokens)
        self._literals = re.compile(f"({pattern})" if pattern else "(?!)()")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, bool]:
        """The conversation as text with coded literals, and whether there is any such literal in it."""
        coded, tools = self._coded(messages), self._coded_value(tools)
        variables = self._coded_value(variables or {})
        text = self._template(coded, tools, add_generation_prompt, variables)
        if add_generation_prompt and not self._has_generation_prompt:
            text += self._header(text, coded, tools, variables)
        return text, _CODE in text

    def render_answers(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        num_given: int = 0,
        left_out: Container[int] = (),
        ended: bool = True,
    ) -> str:
        """The conversation as text with coded literals and a mark before and after each answer; arguments of `chat_document`.

        It stops behind the last answer's text where that was cut off.

        Raises:
            DataError: there is no answer, or the template does not show where one begins and ends.
        """
        coded, tools = self._coded(messages), self._coded_value(tools)
        whole = self._template(coded, tools)
        marked, end = "", 0
        for index in range(num_given, len(coded)):
            if coded[index]["role"] == "assistant" and index not in left_out:
                start, stop = self._answer(whole, coded, tools, index)
                if start < end:
                    raise _hidden(index)
                marked += f"{whole[end:start]}{_ANSWER}{whole[start:stop]}{_ANSWER_END}"
                end = stop
        if not marked:
            raise DataError("0 assistant turns in a conversation; it needs one to learn from")
        return marked + whole[end:] if ended else marked

    def split(self, rendered: str) -> Iterator[Span]:
        """Divide rendered text into control tokens, answers and other text, none of it empty."""
        in_answer = closes_answer = False
        texts = self._literals.split(rendered)
        for index, text in enumerate(texts):
            if text in self._codes:
                yield Span(text, is_control=True, is_answer=closes_answer or in_answer)
                closes_answer = False
                continue
            is_before_control = index + 1 < len(texts)
            for plain in _MARKS.split(text):
                if plain in (_ANSWER, _ANSWER_END):
                    in_answer = plain == _ANSWER
                    closes_answer = not in_answer
                elif plain:
                    closes_answer = closes_answer and plain.isspace() and is_before_control
                    decoded = _CODES.sub(lambda match: self._control_tokens[int(match[1])], plain)
                    yield Span(decoded, is_control=False, is_answer=in_answer or closes_answer)

    def after_answer(self) -> str:
        """What the template writes after the last answer, without white space before it; empty where it does not show that."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return self.render_answers(messages).partition(_ANSWER_END)[2].lstrip()
        except DataError:
            return ""

    @cached_property
    def own_tokens(self) -> frozenset[str]:
        """The control tokens that the template writes around a question and its answer."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return frozenset(span.text for span in self.split(self._attempt(messages, None)) if span.is_control)

    def _answer(self, whole: str, coded: list[dict[str, Any]], tools: Any, index: int) -> tuple[int, int]:
        """Start and end of the answer of message `index` in the rendered conversation, without its closing.

        A turn may be content, tool calls, thoughts or all of them, and only the template knows how it writes these. So the
        turn is replaced by a mark: the text before and after the mark is the text before and after the answer. Where a
        template refuses the replacement, because of tool results after it, only the turns up to this one are rendered.
        What the template writes between the prompt of an answer and the mark (an empty thought, say) belongs to the answer,
        since the model is not prompted with it.
        """
        replaced = [*coded[:index], {"role": "assistant", "content": _ANSWER}, *coded[index + 1 :]]
        before, mark, after = self._attempt(replaced, tools).partition(_ANSWER)
        prompt = self._prompt(coded[:index], tools)
        if mark and whole.startswith(before) and whole[len(before) :].endswith(after):
            start, stop = len(before), len(whole) - len(after)
        else:
            turns = self._attempt(coded[: index + 1], tools).rstrip()
            turns = turns.removesuffix(next((token for token in self._control_tokens if turns.endswith(token)), ""))
            if not turns.startswith(prompt):
                # A turn of another form may have another header than the answer that stands for it: all of it is the model's.
                prompt = self._attempt(coded[:index], tools)
            if not (prompt and turns.startswith(prompt) and whole.startswith(turns)):
                raise _hidden(index)
            start, stop = len(prompt), len(turns)
        is_longer = prompt and len(prompt) < start and whole.startswith(prompt)
        return (len(prompt) if is_longer else start), stop

    @cached_property
    def _has_generation_prompt(self) -> bool:
        """Whether the template can end with the header of an answer; one that refuses to is taken to be able to."""
        question = [{"role": "user", "content": "a"}]
        plain, prompted = (self._attempt(question, None, add_generation_prompt=flag) for flag in (False, True))
        return plain != prompted or not plain

    def _header(self, prompt: str, coded: list[dict[str, Any]], tools: Any, variables: Mapping[str, Any] | None = None) -> str:
        """What the template writes between a conversation and the answer to it, where it has no generation prompt.

        Spaces at its end are the answer's: they belong to its first token.
        """
        answered = self._attempt([*coded, {"role": "assistant", "content": _ANSWER}], tools, variables=variables)
        before, mark, _ = answered.partition(_ANSWER)
        return before[len(prompt) :].rstrip(" ") if mark and before.startswith(prompt) else ""

    def _prompt(self, coded: list[dict[str, Any]], tools: Any) -> str:
        """What the model is prompted with after these turns; empty for none or where the template refuses them."""
        prompt = self._attempt(coded, tools, add_generation_prompt=True)
        return prompt if not prompt or self._has_generation_prompt else prompt + self._header(prompt, coded, tools)

    def _attempt(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The rendered conversation; empty for no messages or where the template refuses them."""
        try:
            return self._template(messages, tools, add_generation_prompt, variables) if messages else ""
        except DataError:
            return ""

    def _template(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        for name in _FIXED_ARGUMENTS & (variables or {}).keys():
            raise DataError(f"{name} is no variable of the chat template; leave it out")
        try:
            return self._source.render(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables or {}
            )
        except DataError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"the chat template refuses turns {roles} ({error}); order or name them as it wants") from error

    def _coded(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if not messages:
            raise DataError("0 messages in a conversation; it needs at least one")
        return [self._coded_message(message) for message in messages]

    def _coded_message(self, message: Message) -> dict[str, Any]:
        check_message(message)
        fields = {key: value for key, value in message.items() if value is not None}
        if "tool_calls" in fields:
            # Before coding: an escape in the JSON could spell a control token.
            fields["tool_calls"] = [_with_parsed_arguments(call) for call in fields["tool_calls"]]
        coded = {key: self._coded_value(value) for key, value in fields.items() if key != "role"}
        return {"role": fields["role"], "content": None} | coded

    def _coded_value(self, value: Any) -> Any:
        if isinstance(value, str):
            if any(mark in value for mark in (_CODE, _ANSWER, _ANSWER_END)):
                raise DataError(f"message {_short(value)} holds a Unicode noncharacter U+FDD0-U+FDD2; remove it")
            return self._literals.sub(lambda match: f"{_CODE}{self._codes[match[0]]}{_CODE}", value)
        if isinstance(value, Mapping):
            return {self._coded_value(key): self._coded_value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._coded_value(item) for item in value]
        return value


def _hidden(index: int) -> DataError:
    return DataError(
        f"the chat template does not show where message {index + 1}, an assistant's, starts and ends, so what to learn is "
        "unknown; use supervise: all, or another template"
    )


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with its arguments as an object, as templates expect, where they are OpenAI's JSON text of one."""
    if "function" in call:
        return {**call, "function": _with_parsed_arguments(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return dict(call)
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else dict(call)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
