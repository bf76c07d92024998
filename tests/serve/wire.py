"""Raw sockets to a live server, for requests that a client library would not send."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from live import NAME


def chat_body(**fields: Any) -> dict[str, Any]:
    """A chat request that runs to its last token (greedy, and no end before)."""
    tokens = fields.setdefault("max_tokens", 8)
    fields.setdefault("diffusion", {}).setdefault("min_new_tokens", tokens)
    return {"model": NAME, "messages": [{"role": "user", "content": "Hello, how are you?"}], **fields}


def request_bytes(
    body: bytes | Mapping[str, Any], path: str = "/v1/chat/completions", method: str = "POST", **headers: str | None
) -> bytes:
    """A whole request; a header given as None is left out."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent_headers: dict[str, str | None] = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(content)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent_headers.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


class Wire:
    """A connection that sends and reads bytes.

    Args:
        url: of the server.
        receive_buffer: bytes that the kernel takes while nobody reads.
    """

    def __init__(self, url: str, receive_buffer: int | None = None) -> None:
        place = urlsplit(url)
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect((place.hostname, place.port))
        self.read = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *details: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def until(self, mark: bytes) -> bytes:
        """Read until something comes."""
        while mark not in self.read:
            data = self.socket.recv(65536)
            assert data, f"closed before {mark!r} came: {self.read[-300:]!r}"
            self.read += data
        return self.read

    def rest(self) -> bytes:
        """Read until the server closes."""
        try:
            while data := self.socket.recv(65536):
                self.read += data
        except ConnectionResetError:
            pass
        return self.read

    def rest_is_there(self) -> bytes | None:
        """What the server has sent until it closed; None: it has not."""
        self.socket.setblocking(False)
        try:
            return self.rest()
        except BlockingIOError:
            return None

    def status(self) -> int:
        """Of the (next) answer."""
        return int(self.until(b"\r\n").split(b" ", 2)[1])

    def answer(self) -> tuple[int, bytes]:
        """Status and body of an answer that has a length; what follows stays to be read."""
        head, _, body = self.until(b"\r\n\r\n").partition(b"\r\n\r\n")
        lines = [line.partition(b":") for line in head.lower().split(b"\r\n")[1:]]
        length = next(int(value) for name, _, value in lines if name == b"content-length")
        while len(body) < length:
            data = self.socket.recv(65536)
            assert data, "closed inside an answer"
            body += data
        self.read = body[length:]
        return int(head.split(b" ", 2)[1]), body[:length]
