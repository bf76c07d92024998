"""`respond_in_parts`: answers that are ordered lists of texts and tool calls, whole or streamed: Responses and Messages.

Owns the order of the parts and the events of their growth; an `AnswerWriter` writes them in its API's form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.request import TokenLogprob
from unmask.serve.choice import Choice, ChoiceDelta
from unmask.serve.event_stream import Event, Framing, stream_events
from unmask.serve.exchange import AppState, Exchange, open_exchange
from unmask.serve.protocol.messages import ToolCall
from unmask.serve.served_model import PreparedRequests


@dataclass
class Part:
    """A text, or a tool call.

    Attributes:
        index: among the parts of the answer.
        text: so far; of a call, the JSON text of its arguments.
        call: id and name of the call; None: a text.
        logprobs: of the text's tokens, if they were asked for.
        is_complete: False while it grows, and for good where the answer broke off within it.
    """

    index: int
    text: str = ""
    call: ToolCall | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    is_complete: bool = False


@dataclass(frozen=True)
class PartEvent:
    """A part begins, grows by `text`, or ends."""

    kind: Literal["begin", "delta", "end"]
    part: Part
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class AnswerParts:
    """The parts of one choice, in the order in which they were written.

    Attributes:
        parts: so far; only the last one can grow.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, choice: Choice, delta: ChoiceDelta) -> Iterator[PartEvent]:
        """What an update of the choice adds."""
        self._logprobs += delta.logprobs
        if delta.text:
            if self._open is None or self._open.call is not None:
                yield from self._begin()
            yield from self._grow(delta.text)
        for call in delta.tool_calls:
            if "id" in call:
                yield from self._begin(choice.tool_calls[call["index"]])
            if call["function"]["arguments"]:
                yield from self._grow(call["function"]["arguments"])
        if choice.completion is not None:
            yield from self._end(is_complete=choice.completion.finish_reason == "stop")

    @property
    def _open(self) -> Part | None:
        """The part that still grows."""
        return self.parts[-1] if self.parts else None

    def _begin(self, call: ToolCall | None = None) -> Iterator[PartEvent]:
        yield from self._end(is_complete=True)
        self.parts.append(Part(len(self.parts), call=call))
        yield PartEvent("begin", self.parts[-1])

    def _grow(self, text: str) -> Iterator[PartEvent]:
        part = self.parts[-1]
        part.text += text
        # Log-probabilities of tokens without text yet, half characters, go with the next text.
        logprobs, self._logprobs = tuple(self._logprobs) if part.call is None else (), []
        part.logprobs += logprobs
        yield PartEvent("delta", part, text, logprobs)

    def _end(self, *, is_complete: bool) -> Iterator[PartEvent]:
        if self._open is not None:
            self._open.is_complete = is_complete
            yield PartEvent("end", self._open)


class AnswerWriter(ABC):
    """Writes one answer as an API's object and as its events.

    Attributes:
        answer: the object, in its present state.
    """

    answer: dict[str, Any]

    @abstractmethod
    def begin(self) -> Iterator[Event]:
        """The first events."""

    @abstractmethod
    def grow(self, event: PartEvent) -> Iterator[Event]:
        """Events of a part."""

    @abstractmethod
    def end(self, choice: Choice, exchange: Exchange) -> Iterator[Event]:
        """The last events, when all parts have ended."""


async def respond_in_parts(
    state: AppState, http: HttpRequest, prepared: PreparedRequests, writer: AnswerWriter, framing: Framing | None
) -> Response:
    """The response of one completion.

    Args:
        state: of the application.
        http: the request.
        prepared: one engine request.
        writer: of the API.
        framing: of the stream; None: the whole answer is sent, which is what the writer has after the events of a stream.

    Raises:
        ApiError: the request cannot be served.
    """
    events = _events(state, http, prepared, writer)
    if framing is not None:
        return await stream_events(events, framing)
    async with aclosing(events):
        async for _ in events:
            pass
    return JSONResponse(writer.answer)


async def _events(
    state: AppState, http: HttpRequest, prepared: PreparedRequests, writer: AnswerWriter
) -> AsyncGenerator[Event]:
    parts = AnswerParts()
    async with open_exchange(state, http, prepared) as exchange:
        for event in writer.begin():
            yield event
        async for batch in exchange.deltas():
            for choice, delta, _ in batch:
                for part_event in parts.take(choice, delta):
                    for event in writer.grow(part_event):
                        yield event
        (choice,) = exchange.choices
        for event in writer.end(choice, exchange):
            yield event
