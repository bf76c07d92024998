"""Running the application: sockets, signals, and the way down.

Owns the uvicorn server. The first SIGINT or SIGTERM lets what runs finish within the grace and takes nothing new; the second
SIGINT ends at once.
"""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from unmask.engine.model import LanguageModel
from unmask.errors import ConfigError
from unmask.serve.app import create_app
from unmask.serve.served import Settings


class Server(uvicorn.Server):
    """One that tells the worker as soon as it is asked to stop."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace: float) -> None:
        super().__init__(config)
        self._app, self._grace = app, grace
        self._closing: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._app.state.backend.worker.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._app.state.backend.worker.close(self._grace))
        await super().shutdown(sockets)
        await closing


def run(language_model: LanguageModel, settings: Settings, listener: socket.socket, *, loopback: bool) -> None:
    """Serve a model until a signal comes.

    Args:
        language_model: with a tokenizer.
        settings: how the server behaves.
        listener: from `listen`.
        loopback: only this machine reaches it.

    Raises:
        UnmaskError: the engine cannot be made.
    """
    failures: list[Exception] = []

    def on_failure(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(language_model, settings, loopback=loopback, on_failure=on_failure)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.shutdown_grace) + 5,
    )
    server = Server(config, app, settings.shutdown_grace)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, made before anything slow, so that a taken port is known at once; port 0 picks a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port} ({error.strerror}); use another --port or --host") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
