"""Around every request: its id, who may come in, how it is counted and logged.

Owns the outermost layer of the application. Knows paths and headers, never bodies.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmask.serve.errors import ApiError, internal
from unmask.serve.metrics import Metrics
from unmask.serve.worker import AbortedError

OPEN_PATHS = ("/", "/health", "/ready")
"""Reached without a key, as is all below /page/."""
CLIENT_CLOSED = 499
BODY_SECONDS = 60.0
"""Most seconds that a body may take to arrive."""
_log = logging.getLogger("unmask.serve")
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PORT = re.compile(r":\d+$")


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        metrics: responses and their times are counted there.
        paths: known to the application; others are counted as one.
        api_keys: any opens the API; none: it is open.
        hosts: names that the Host header may hold; none: any.
        origins: web origins beside the server's own that may send requests.
        max_body: most bytes of a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Collection[str],
        api_keys: Sequence[str] = (),
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        max_body: int,
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._keys = [key.encode() for key in api_keys]
        self._hosts, self._origins, self._max_body = frozenset(hosts), frozenset(origins), max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        scope["unmask.id"] = given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(12)
        scope["unmask.details"] = {}
        visit = _Visit(scope, send)
        try:
            self._check(scope, headers)
            await self._app(scope, _Body(receive, self._max_body).receive, visit.send)
        except ApiError as error:
            await visit.fail(error)
        except AbortedError:
            visit.status = CLIENT_CLOSED
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the libraries in Rust is no Exception
            _log.exception("request %s failed", scope["unmask.id"])
            await visit.fail(internal(scope["unmask.id"]))
        finally:
            self._count(scope, visit)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises: ApiError: this request may not come in."""
        host = _PORT.sub("", headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            raise ApiError(403, f"host {host[:80]!r} is not served; use --allow-host, or an API key", code="host")
        origin = headers.get("origin")
        own = origin is None or origin.partition("://")[2] == headers.get("host", "")
        if not own and not {origin, "*"} & self._origins:
            raise ApiError(403, f"origin {str(origin)[:80]!r} may not use this server; use --allow-origin", code="origin")
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith("/page/")
        if self._keys and not is_open and not self._knows(headers.get("authorization", "")):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            raise ApiError(415, "the body must be JSON; send content-type: application/json")
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told[:20]) > self._max_body:
            raise ApiError(413, _too_large(self._max_body))

    def _knows(self, authorization: str) -> bool:
        """Whether it holds a key; takes the same time whichever it is."""
        scheme, _, key = authorization.partition(" ")
        sent = key.strip().encode()
        found = [hmac.compare_digest(sent, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)

    def _count(self, scope: Scope, visit: _Visit) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        seconds = time.perf_counter() - visit.started
        self._metrics.responses.labels(path, str(visit.status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        level = logging.DEBUG if path in ("/health", "/ready", "/metrics", "other") and visit.status < 500 else logging.INFO
        details: Mapping[str, Any] = {
            "request_id": scope["unmask.id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": visit.status,
            "total_seconds": round(seconds, 4),
            **scope["unmask.details"],
        }
        _log.log(level, "request", extra={"details": details})


class _Body:
    """A body that ends in 413 where it gets too long, and in 408 where it takes too long."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left, self._most = receive, most, most
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self._complete = False

    async def receive(self) -> Message:
        # HTTPException is the one kind of error that FastAPI lets through while it reads a body.
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body took longer than {BODY_SECONDS:g} s to arrive; send it again") from error
        self._complete = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, _too_large(self._most))
        return message


class _Visit:
    """One request's way out: its status, and the id in its headers."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._id, self._send = scope["unmask.id"], send
        self.started = time.perf_counter()
        self.status = CLIENT_CLOSED
        self._begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun."""
        if self._begun:
            raise error
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _too_large(most: int) -> str:
    return f"the body is larger than {most} bytes; send less, or raise --max-body"
