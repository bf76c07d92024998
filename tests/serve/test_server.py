"""The server's sockets."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx2
from live import live, served_model


def test_responses_on_a_kept_alive_connection_do_not_wait_for_acknowledgements(tmp_path: Path) -> None:
    with live(served_model(tmp_path)) as site, httpx2.Client() as client:
        assert client.get(f"{site.url}/health").status_code == 200
        (connection,) = site.server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
