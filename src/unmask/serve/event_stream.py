"""Server-sent events as OpenAI's API streams them: `data: JSON` lines, ended by `data: [DONE]`.

Owns the framing and how an error ends a stream. Knows no endpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unmask.serve.errors import ApiError, internal
from unmask.serve.worker import AbortedError

_log = logging.getLogger("unmask.serve")


async def stream_events(events: AsyncGenerator[dict[str, Any]]) -> Response:
    """A streaming response. Waits for the first event, so that an error before it becomes a proper HTTP error.

    Raises:
        ApiError: the request failed before its first event.
    """
    return _EventStream(await anext(events), events)


class _EventStream(Response):
    """Sends events as they come; an error becomes the last event."""

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], events: AsyncGenerator[dict[str, Any]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines(scope["unmask.id"]):
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self, request_id: str) -> AsyncGenerator[bytes]:
        yield _line(self._first)
        try:
            async for event in self._events:
                yield _line(event)
        except ApiError as error:
            yield _line(error.body())
        except AbortedError:
            raise
        except Exception:
            _log.exception("request %s failed", request_id)
            yield _line(internal(request_id).body())
        else:
            yield b"data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
