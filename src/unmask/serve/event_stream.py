"""Streamed responses: server-sent events and JSON lines.

Owns the framing, and how an error ends a stream. Knows no endpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unmask.serve.errors import ApiError, ErrorForm, internal
from unmask.serve.worker import AbortedError

Event = Mapping[str, Any]
_log = logging.getLogger("unmask.serve")


@dataclass(frozen=True)
class Framing:
    """How the events of a stream become bytes.

    Attributes:
        media_type: of the response.
        frame: bytes of one event.
        end: bytes after the last event of a stream without an error.
        error: the event that an error becomes; None: the body of the API's error responses.
    """

    media_type: str
    frame: Callable[[Event], bytes]
    end: bytes = b""
    error: ErrorForm | None = None


def _json(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


SSE = Framing("text/event-stream", lambda event: b"data: " + _json(event) + b"\n\n", end=b"data: [DONE]\n\n")
"""Server-sent events as OpenAI's chat completions: `data: JSON`, ended by `data: [DONE]`."""
NAMED_SSE = Framing(
    "text/event-stream", lambda event: b"event: " + event["type"].encode() + b"\ndata: " + _json(event) + b"\n\n"
)
"""Server-sent events that are named by their field `type`, as in Anthropic's API and OpenAI's Responses."""
JSON_LINES = Framing("application/x-ndjson", lambda event: _json(event) + b"\n")
"""One JSON object per line, as Ollama."""


async def stream_events(events: AsyncGenerator[Event], framing: Framing = SSE) -> Response:
    """A streaming response. Waits for the first event, so that an error before it becomes a proper HTTP error.

    Args:
        events: at least one; closed with the response, however that ends.
        framing: of the API.

    Raises:
        ApiError: the request failed before its first event.
    """
    first = await anext(events)
    try:
        return _EventStream(first, events, framing)
    except BaseException:
        await events.aclose()
        raise


class _EventStream(Response):
    """Sends events as they come; an error becomes the last event."""

    def __init__(self, first: Event, events: AsyncGenerator[Event], framing: Framing) -> None:
        self.media_type = framing.media_type
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events, self._framing = framing.frame(first), events, framing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._frames(scope):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self, scope: Scope) -> AsyncGenerator[bytes]:
        yield self._first
        try:
            async for event in self._events:
                yield self._framing.frame(event)
        except ApiError as error:
            yield self._error(error, scope)
        except AbortedError:
            raise
        except Exception:
            _log.exception("request %s failed", scope["unmask.id"])
            yield self._error(internal(scope["unmask.id"]), scope)
        else:
            if self._framing.end:
                yield self._framing.end

    def _error(self, error: ApiError, scope: Scope) -> bytes:
        form = self._framing.error
        return self._framing.frame(error.body(scope) if form is None else form(error))
