"""Conversations as text: the chat template applied so that message text cannot pass for the template's control tokens.

Owns rendering and the cutting of the result into control tokens, answers and plain text. Knows no token ids.

Before rendering, every spelling of a control token inside a message is replaced by a code made of Unicode noncharacters,
which cannot be in text; so every control token in the rendered text is the template's own. The codes are turned
back when the text between control tokens is cut out, and that text is encoded as plain text only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from unmask.errors import DataError

_CODE, _ANSWER, _ANSWER_END = "\ufdd0", "\ufdd1", "\ufdd2"
_CODES = re.compile(f"{_CODE}(\\d+){_CODE}")
_MARKS = re.compile(f"([{_ANSWER}{_ANSWER_END}])")
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered conversation.

    Attributes:
        text: its text, or the spelling of one control token.
        is_control: it is a control token.
        is_answer: an assistant writes it: an answer, or the control token that closes one and white space before that.
    """

    text: str
    is_control: bool
    is_answer: bool


class Renderer:
    """One tokenizer's chat template."""

    def __init__(self, apply_chat_template: Callable[..., Any], control_tokens: Iterable[str]) -> None:
        """Remember the template.

        Args:
            apply_chat_template: the method of the Hugging Face tokenizer.
            control_tokens: spellings of the control tokens.
        """
        self._apply = apply_chat_template
        self._control_tokens = sorted(control_tokens, key=lambda token: (-len(token), token))
        self._places = {token: place for place, token in enumerate(self._control_tokens)}
        pattern = "|".join(re.escape(token) for token in self._control_tokens)
        self._literals = re.compile(f"({pattern})" if pattern else "(?!)()")

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> tuple[str, bool]:
        """The conversation as text with coded literals, and whether there is any such literal in it."""
        coded = self._coded(messages)
        text = self._template(coded, add_generation_prompt)
        return text, _CODE in text

    def render_answers(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text with coded literals and a mark before and after each answer.

        Raises:
            DataError: there is no answer, or the template rewrites one so that its marks do not survive.
        """
        coded = self._coded(messages)
        num_answers = sum(_is_answer(message) for message in coded)
        if num_answers == 0:
            raise DataError("0 assistant turns with content in a conversation; it needs one to learn from")
        plain = self._template(coded, add_generation_prompt=False)
        for outside_space in (False, True):
            marked = self._template([_marked(message, outside_space) for message in coded], add_generation_prompt=False)
            if _MARKS.sub("", marked) == plain:
                break
        else:
            raise DataError(
                f"the chat template rewrites one of {num_answers} answers, so what to learn is unknown; "
                "use supervise: all, or a template that leaves answers as they are"
            )
        marks = "".join(_MARKS.findall(marked))
        if marks != (_ANSWER + _ANSWER_END) * num_answers:
            raise DataError(f"the chat template leaves out some of {num_answers} answers; use another template")
        return marked

    def split(self, text: str) -> Iterator[Span]:
        """Cut rendered text into control tokens, answers and other text, none of it empty."""
        in_answer = closes_answer = False
        parts = self._literals.split(text)
        for place, part in enumerate(parts):
            if part in self._places:
                yield Span(part, is_control=True, is_answer=closes_answer or in_answer)
                closes_answer = False
                continue
            is_before_control = place + 1 < len(parts)
            for piece in _MARKS.split(part):
                if piece in (_ANSWER, _ANSWER_END):
                    in_answer = piece == _ANSWER
                    closes_answer = not in_answer
                elif piece:
                    closes_answer = closes_answer and piece.isspace() and is_before_control
                    decoded = _CODES.sub(lambda match: self._control_tokens[int(match[1])], piece)
                    yield Span(decoded, is_control=False, is_answer=in_answer or closes_answer)

    def closing_token(self) -> str | None:
        """The control token with which the template closes an answer, if it does."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            spans = list(self.split(self.render_answers(messages)))
        except DataError:
            return None
        return next((span.text for span in spans if span.is_control and span.is_answer), None)

    def _template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return str(self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"the chat template refuses turns {roles} ({reason}); order or name them as it wants") from error

    def _coded(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if not messages:
            raise DataError("0 messages in a conversation; it needs at least one")
        return [self._coded_message(message) for message in messages]

    def _coded_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"role {role!r} of a message is not one of {', '.join(sorted(_ROLES))}; use one of them")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and len(message) > 2):
            raise DataError(f"content {_short(content)} of a {role} message is not a text; give a string")
        rest = {key: self._coded_value(value) for key, value in message.items() if key != "role" and value is not None}
        return {"role": role, "content": None} | rest

    def _coded_value(self, value: Any) -> Any:
        if isinstance(value, str):
            if any(mark in value for mark in (_CODE, _ANSWER, _ANSWER_END)):
                raise DataError(f"message {_short(value)} holds a Unicode noncharacter U+FDD0-U+FDD2; remove it")
            return self._literals.sub(lambda match: f"{_CODE}{self._places[match[0]]}{_CODE}", value)
        if isinstance(value, Mapping):
            return {self._coded_value(key): self._coded_value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._coded_value(item) for item in value]
        return value


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message["content"] is not None


def _marked(message: dict[str, Any], outside_space: bool) -> dict[str, Any]:
    """Marks around an answer; inside its surrounding white space when the template trims that."""
    if not _is_answer(message):
        return message
    content: str = message["content"]
    core = content.strip() if outside_space else content
    lead = content[: len(content) - len(content.lstrip())] if outside_space else ""
    trail = content[len(content.rstrip()) :] if outside_space and core else ""
    return message | {"content": f"{lead}{_ANSWER}{core}{_ANSWER_END}{trail}"}


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
