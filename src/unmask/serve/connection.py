"""`Connection`: an HTTP connection with timeouts for slow clients.

Owns the read and write timeouts, which uvicorn lacks. Knows no application.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

READ_SECONDS = 90.0
"""From a request's first byte (for the first request: from the connection) to its last."""
SEND_SECONDS = 60.0
"""How long a client may read nothing of what is ready to be sent."""


class Connection(H11Protocol):
    """HTTP/1.1 connection that is closed when its client neither sends nor reads; its request ends as at a disconnect."""

    _read_timeout: _Timeout
    _write_timeout: _Timeout

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Writing counts as paused while anything is unsent: the timeout then covers a client that reads nothing, however
        # little there is to read, and at most one event is buffered here while later ones are merged in the job.
        transport.set_write_buffer_limits(high=0)
        self._read_timeout, self._write_timeout = _Timeout(transport, READ_SECONDS), _Timeout(transport, SEND_SECONDS)
        self._read_timeout.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._read_timeout.stop()
        self._write_timeout.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._read_timeout.start()
        else:
            self._read_timeout.stop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timeout.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timeout.stop()


class _Timeout:
    """Closes a connection when too much time passes between start and stop."""

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport, self._seconds = transport, seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._transport.abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
