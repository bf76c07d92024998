"""`Server`: the uvicorn server with a graceful shutdown.

Owns sockets and signals. At the first SIGINT or SIGTERM nothing new is accepted; running requests have the grace period to
finish and fail after it, and connections still open then are closed. A second SIGINT ends everything at once. SIGHUP reads the
keys file again, where there is one.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError
from unmask.serve.app import create_app
from unmask.serve.clients import Clients
from unmask.serve.config import ServerConfig
from unmask.serve.connection import Connection

_OTHER_DESCRIPTORS = 256
"""Open files beside connections."""
_FLUSH_SECONDS = 5.0
"""Time for clients to read the rest of their responses once the engine has stopped."""
_log = logging.getLogger("unmask.serve")


class Server(uvicorn.Server):
    """A uvicorn server that shuts the worker down with itself.

    Args:
        app: from `create_app`.
        grace: seconds that running requests have to finish.
        max_connections: open at once.
        on_hangup: called at SIGHUP; None: the signal does what it did before.
    """

    def __init__(
        self, app: FastAPI, grace: float, max_connections: int = 2048, on_hangup: Callable[[], None] | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=functools.partial(Connection, max_connections=max_connections),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(grace + 2 * _FLUSH_SECONDS),
        )
        super().__init__(config)
        self._app, self._grace, self._on_hangup = app, grace, on_hangup

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's start; SIGHUP is heeded from here on."""
        if self._on_hangup is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's shutdown waits until all connections are closed; `_close` closes them meanwhile."""
        closing = asyncio.create_task(self._close())
        await super().shutdown(sockets)
        await closing
        if self.force_exit:
            # Uvicorn skips this when forced, and the application would end with a traceback.
            await self.lifespan.shutdown()
        # Uvicorn would raise the signals again after the shutdown that they asked for.
        self._captured_signals.clear()

    async def _close(self) -> None:
        worker = self._app.state.unmask.worker
        ending = asyncio.create_task(worker.close(self._grace))
        while not ending.done() and not self.force_exit:
            await asyncio.sleep(0.02)
        deadline = asyncio.get_running_loop().time() + _FLUSH_SECONDS
        while self.server_state.connections and not self.force_exit and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.force_exit:
            await worker.close(0.0)
        await ending


def run(language_model: LanguageModel, config: ServerConfig, listener: socket.socket, *, loopback: bool) -> bool:
    """Serve a model until a signal arrives.

    Args:
        language_model: with a tokenizer.
        config: limits, keys and names.
        listener: from `listen`.
        loopback: the listener has a loopback address.

    Returns:
        True after a graceful shutdown; False where a second signal cut running requests short.

    Raises:
        UnmaskError: the engine cannot be made.
    """
    failures: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(language_model, config, loopback=loopback, on_failure=on_failure)
    on_hangup = None if config.keys_file is None else functools.partial(_reload_keys, app.state.clients, config)
    server = Server(app, config.shutdown_grace, _with_descriptors(config.max_connections), on_hangup)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    return not server.force_exit


def _reload_keys(clients: Clients, config: ServerConfig) -> None:
    """Read the keys file again; where it is wrong, the log says so and the keys stay."""
    try:
        keys = config.current_keys()
    except ConfigError as error:
        _log.error("the keys stay as they were: %s", error)
        return
    clients.replace(keys)
    _log.info("keys_file read again", extra={"details": {"keys": len(keys)}})


def _with_descriptors(max_connections: int) -> int:
    """Raise the process's limit of open files for so many connections, as far as the system allows; how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return max(1, raised - _OTHER_DESCRIPTORS)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free port.

    Made before the model is loaded, so that a port in use is reported at once; clients that connect meanwhile wait.

    Raises:
        ConfigError: the address is not available.
    """
    # asyncio sets TCP_NODELAY only on sockets of this very protocol; without it, every response on a kept-alive connection
    # waits 40 ms for the client's delayed acknowledgement.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {host}:{port} ({error.strerror}); use another port or host") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of the server for clients on this machine."""
    host, port = listener.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"
