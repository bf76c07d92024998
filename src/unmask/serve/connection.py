"""One client's socket: how long it may take over what it sends and what it reads.

Owns the limits that uvicorn has none for. Knows no application.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

READ_SECONDS = 90.0
"""Most seconds from a request's first byte (the first one's: from the connection) to its last."""
SEND_SECONDS = 60.0
"""A client that takes nothing of what is ready for so long is given up."""


class Connection(H11Protocol):
    """HTTP/1.1 that cuts the connection of a client which neither sends nor reads; its request then ends as at a disconnect."""

    _reading: _Limit
    _sending: _Limit

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        # Writing counts as paused while anything is unsent: the limit sees a client that reads nothing, even if it is little,
        # and no more than one event waits here while those behind it are merged.
        transport.set_write_buffer_limits(high=0)
        self._reading, self._sending = _Limit(transport, READ_SECONDS), _Limit(transport, SEND_SECONDS)
        self._reading.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._reading.stop()
        self._sending.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._reading.start()
        else:
            self._reading.stop()

    def pause_writing(self) -> None:
        """Something is unsent."""
        super().pause_writing()
        self._sending.start()

    def resume_writing(self) -> None:
        """All is sent."""
        super().resume_writing()
        self._sending.stop()


class _Limit:
    """Cuts a connection when too much time passes between start and stop."""

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
