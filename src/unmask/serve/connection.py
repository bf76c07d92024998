"""`Connection`: an HTTP connection with timeouts for slow clients, and a bound on their number.

Owns the timeouts of head, body and reading, which uvicorn lacks. Knows no application.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""From a request's first byte (for the first request: from the connection) to the end of its headers."""
READ_SECONDS = 60.0
"""Between two pieces of a body; the guard bounds the time of all of it."""
SEND_SECONDS = 60.0
"""How long a client may read nothing of what is ready to be sent."""
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(H11Protocol):
    """HTTP/1.1 connection that is closed when its client neither sends nor reads; its request ends as at a disconnect.

    Args:
        max_connections: of all; one more closes the one that has waited for a request longest.
    """

    _read_timeout: _Timeout
    _write_timeout: _Timeout

    def __init__(self, *args: Any, max_connections: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_connections = max_connections
        self._waiting_since = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Writing counts as paused while anything is unsent: the timeout then covers a client that reads nothing, however
        # little there is to read, and at most one event is buffered here while later ones are merged in the job.
        transport.set_write_buffer_limits(high=0)
        self._read_timeout, self._write_timeout = _Timeout(transport), _Timeout(transport)
        self._read_timeout.start(HEAD_SECONDS)
        if len(self.connections) > self._max_connections:
            self._make_room(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._read_timeout.stop()
        self._write_timeout.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        had_head = self.conn.their_state is h11.SEND_BODY
        super().data_received(data)
        self._waiting_since = time.monotonic()
        if self.conn.their_state is h11.SEND_BODY:
            if not self.cycle.response_complete:  # else nobody wants the rest, and it has the time that is left
                self._read_timeout.stop()
            self._read_timeout.start(READ_SECONDS)
        elif self.conn.their_state is h11.IDLE:
            if had_head:
                self._read_timeout.stop()
            self._read_timeout.start(HEAD_SECONDS)
        else:
            self._read_timeout.stop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timeout.start(SEND_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timeout.stop()

    def _make_room(self, transport: asyncio.Transport) -> None:
        """Close the connection that owes a request, or the rest of one, for longest; this one where all wait for responses."""
        others = [each for each in self.connections if isinstance(each, Connection) and each is not self]
        owing = [each for each in others if each._owes_request()]
        if owing:
            oldest = min(owing, key=lambda each: each._waiting_since)
            self.connections.discard(oldest)  # which the loop does only later
            oldest.transport.abort()
        else:
            transport.write(_FULL)
            transport.close()

    def _owes_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete or self.conn.their_state is h11.SEND_BODY


class _Timeout:
    """Closes a connection when too much time passes between start and stop."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
