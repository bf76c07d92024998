"""Running the application: sockets, signals, and the way down.

Owns the uvicorn server. The first SIGINT or SIGTERM closes the door: what runs may finish within the grace and is failed then,
and connections that stay open after that are cut. A second SIGINT cuts all of it at once.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError
from unmask.serve.app import create_app
from unmask.serve.connection import Connection
from unmask.serve.served import Settings

_FLUSH_SECONDS = 5.0
"""What clients get to read the ends of their answers when the engine is down."""


class Server(uvicorn.Server):
    """One that brings the worker down with itself, within the grace.

    Args:
        app: from `create_app`.
        grace: seconds that running requests get to finish.
    """

    def __init__(self, app: FastAPI, grace: float) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(grace + 2 * _FLUSH_SECONDS),
        )
        super().__init__(config)
        self._app, self._grace = app, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's, which waits until all connections have closed, while ours sees to it that they do."""
        closing = asyncio.create_task(self._close())
        await super().shutdown(sockets)
        await closing
        if self.force_exit:
            # Uvicorn has left this out: the application would be cut off in the middle, with a traceback.
            await self.lifespan.shutdown()
        # Uvicorn would end the process by the signals once more: they have been obeyed.
        self._captured_signals.clear()

    async def _close(self) -> None:
        worker = self._app.state.backend.worker
        ending = asyncio.create_task(worker.close(self._grace))
        while not ending.done() and not self.force_exit:
            await asyncio.sleep(0.02)
        left = asyncio.get_running_loop().time() + _FLUSH_SECONDS
        while self.server_state.connections and not self.force_exit and asyncio.get_running_loop().time() < left:
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.force_exit:
            await worker.close(0.0)
        await ending


def run(language_model: LanguageModel, settings: Settings, listener: socket.socket, *, loopback: bool) -> bool:
    """Serve a model until a signal comes.

    Args:
        language_model: with a tokenizer.
        settings: how the server behaves.
        listener: from `listen`.
        loopback: only this machine reaches it.

    Returns:
        Whether it stopped as asked: False where a second signal cut short what ran.

    Raises:
        UnmaskError: the engine cannot be made.
    """
    failures: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(language_model, settings, loopback=loopback, on_failure=on_failure)
    server = Server(app, settings.shutdown_grace)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    return not server.force_exit


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything slow, so that a taken port is known at once; port 0 picks a free one.

    Who connects before the model is loaded waits.

    Raises:
        ConfigError: the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {host}:{port} ({error.strerror}); use another --port or --host") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
