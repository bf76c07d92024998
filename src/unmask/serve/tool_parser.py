"""`CallParser`: an incremental parser of tool calls in the text of an answer.

Owns the split of final text into content, names of called functions and the JSON text of their arguments. Knows neither tokens
nor schemas: text generated under `ToolFormat.grammar` parses by construction; in any other text,
what is no call is content, so that nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

import regex

from unmask.data.detokenizer import held_back

MARKER, END_MARKER = "<tool_call>", "</tool_call>"
_HEAD = r'\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
# OpenAI's object around a function.
_WRAP = r'(?:\{\s*"type"\s*:\s*"function"\s*,\s*"function"\s*:\s*)?'
_FIRST = re.compile(rf"\s*{MARKER}\s*\[?\s*{_HEAD}")
# Opening of an answer that is a call or a list of calls, in a code block or not.
_OPENING = regex.compile(rf"\s*(?:```(?:json)?\s*)?\[?\s*{_WRAP}{_HEAD}")
_NEXT = re.compile(rf"\s*(?:\}}\s*){{1,2}}[,;]?\s*{_HEAD}")
_NO_CALLS = re.compile(rf"\s*{MARKER}\s*\[\s*\]\s*{END_MARKER}")
_ENDING = re.compile(r"\s*(?:\}\s*){0,2}[\],;]?\s*(?:```)?\s*")
_TAG = re.compile(f"{MARKER}|{END_MARKER}")


@dataclass(frozen=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call has begun; `index` counts the calls of an answer from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | CallStart | CallArguments


class CallParser:
    """Splits one answer into content and calls; the joined events do not depend on how the text is chunked.

    A possible beginning of a call is held back until it is decided; white space before and after a call is dropped. A call is
    announced once its name is complete and an object follows for its arguments, whose text is passed on as it arrives. A call
    that breaks off before that is content.
    """

    def __init__(self, names: Container[str], *, marked: bool = True) -> None:
        """Begin an answer.

        Args:
            names: of the functions; a call of any other is content.
            marked: calls may stand between `<tool_call>` and `</tool_call>`, one or a list, anywhere. With and without, the
                whole answer may be a call or a list of calls.
        """
        self._names, self._marked = names, marked
        self._state = self._opening
        self._pending = ""
        self._events: list[Event] = []
        self.num_calls = 0
        self._just_called = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def push(self, text: str) -> list[Event]:
        """Take more text of the answer; the events that are certain now."""
        self._pending += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """The remaining events; the answer may have ended within a call."""
        pending = self._pending
        if self._state == self._after:
            rest = pending[self._ending_of(pending) :]
            dropped = (END_MARKER if self._marked else "").startswith(rest)
        else:
            dropped = self._just_called and pending.isspace()
        self._emit_content(0 if dropped else len(pending))
        self._pending = ""
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _emit_content(self, end: int) -> None:
        """Emit the first `end` pending characters as content."""
        if end:
            self._events.append(Content(self._pending[:end]))
            self._pending = self._pending[end:]
            self._just_called = False

    def _opening(self) -> bool:
        """State: at the beginning of the answer. Each state returns whether to process the pending text further."""
        head = _OPENING.match(self._pending, partial=True)
        if head is None or not (head.partial or head[1] in self._names):
            self._state = self._text
        elif not head.partial:
            self._begin(head)
        return self._state != self._opening

    def _text(self) -> bool:
        """State: before, between and after calls."""
        start = self._pending.find(MARKER) if self._marked else -1
        if start >= 0:
            self._state = self._head
        else:
            start = len(self._pending) - held_back(self._pending, (MARKER,) if self._marked else ())
        self._emit_content(len(self._pending[:start].rstrip()) if self._marked else start)
        return self._state == self._head

    def _head(self) -> bool:
        """State: up to the arguments; white space and the marker are held as well, and are content if this is no call."""
        if (head := _FIRST.match(self._pending)) and head[1] in self._names:
            self._begin(head)
            return True
        tag = _TAG.search(self._pending, self._pending.index(MARKER) + 1)
        if tag is None:
            return False
        if _NO_CALLS.match(self._pending):
            self._pending = self._pending[tag.end() :]
            self._just_called = True
        else:
            self._leave(tag)
        self._state = self._text
        return True

    def _begin(self, head: re.Match[str] | regex.Match[str]) -> None:
        self._pending = self._pending[head.end() :]
        self._events.append(CallStart(self.num_calls, head[1]))
        self.num_calls += 1
        self._depth = 0
        self._state = self._arguments

    def _arguments(self) -> bool:
        """State: within the arguments, up to the bracket that closes the first one."""
        end = len(self._pending)
        for position, char in enumerate(self._pending):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    end = position + 1
                    self._state = self._after
                    break
        if end:
            self._events.append(CallArguments(self.num_calls - 1, self._pending[:end]))
            self._pending = self._pending[end:]
        return self._state == self._after

    def _after(self) -> bool:
        """State: after the arguments: the end of the call, and either another call or the end of all calls."""
        if (head := _NEXT.match(self._pending)) and head[1] in self._names:
            self._begin(head)
            return True
        tag = _TAG.search(self._pending) if self._marked else None
        if tag is None:
            return False
        self._just_called = True
        if self._ending_of(self._pending) == tag.start():
            self._pending = self._pending[tag.end() if tag[0] == END_MARKER else tag.start() :]
        else:
            self._leave(tag)
        self._state = self._text
        return True

    def _leave(self, tag: re.Match[str]) -> None:
        """The pending text is no call: it is content up to its end tag, or to the start of the next call."""
        self._emit_content(tag.end() if tag[0] == END_MARKER else len(self._pending[: tag.start()].rstrip()))

    @staticmethod
    def _ending_of(text: str) -> int:
        ending = _ENDING.match(text)
        return ending.end() if ending else 0
