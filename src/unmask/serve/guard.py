"""`Guard`: the ASGI middleware for request ids, access control, body limits, metrics and the access log.

Owns the outermost layer of the application. Knows paths and headers, never the content of bodies.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmask.serve.errors import ApiError, ErrorForm, internal, openai_error
from unmask.serve.metrics import Metrics
from unmask.serve.worker import AbortedError

OPEN_PATHS = ("/", "/health", "/ready")
"""Paths that need no API key, besides all below /page/."""
CLIENT_CLOSED = 499
MAX_HEADER = 1000
"""Characters of the header that names ignored fields."""
BODY_SECONDS = 60.0
"""How long a body may take to arrive."""
_log = logging.getLogger("unmask.serve")
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PORT = re.compile(r":\d+$")


class Guard:
    """ASGI middleware.

    Args:
        app: the wrapped application.
        metrics: counts responses and their times.
        paths: paths of the application; all others are counted as one.
        error_forms: how errors are written, by the prefix of the path; elsewhere as OpenAI does.
        untyped: prefixes of paths whose bodies are JSON whatever their content-type says.
        api_keys: accepted keys; without any, no key is needed.
        hosts: accepted values of the Host header; without any, all are accepted.
        origins: web origins besides the server's own that may send requests.
        max_body: bytes of a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Collection[str],
        error_forms: Mapping[str, ErrorForm],
        untyped: Sequence[str] = (),
        api_keys: Sequence[str] = (),
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        max_body: int,
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._error_forms, self._untyped = dict(error_forms), tuple(untyped)
        self._keys = [key.encode() for key in api_keys]
        self._hosts, self._origins, self._max_body = frozenset(hosts), frozenset(origins), max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(self._untyped):
            others = [header for header in scope["headers"] if header[0] != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        headers = Headers(scope=scope)
        # Answered as GET; the body is left out where the response is written, by the request's own scope.
        scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        client_id = headers.get("x-request-id", "")
        scope["unmask.id"] = client_id if _CLIENT_ID.fullmatch(client_id) else secrets.token_hex(12)
        scope["unmask.details"] = {}
        scope.setdefault("unmask.background", False)  # True: a line of a batch, which this process asks itself
        forms = self._error_forms.items()
        scope["unmask.error_form"] = next((form for prefix, form in forms if scope["path"].startswith(prefix)), openai_error)
        response = _Response(scope, receive, send)
        try:
            if not scope["unmask.background"]:
                self._check(scope, headers)
            await self._app(scope, _LimitedBody(receive, self._max_body).receive, response.send)
        except ApiError as error:
            await response.fail(error)
        except AbortedError:
            response.status = CLIENT_CLOSED
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in a Rust library is no Exception
            _log.exception("request %s failed", scope["unmask.id"])
            await response.fail(internal(scope["unmask.id"]))
        finally:
            self._count(scope, response)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises: ApiError: the request is not accepted."""
        host = _PORT.sub("", headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            raise ApiError(
                403, f"host {host[:80]!r} is not accepted; add it to the server's allow_hosts, or set an API key", code="host"
            )
        origin = headers.get("origin")
        own = origin is None or origin.partition("://")[2] == headers.get("host", "")
        if not own and not {origin, "*"} & self._origins:
            raise ApiError(
                403, f"origin {str(origin)[:80]!r} is not accepted; add it to the server's allow_origins", code="origin"
            )
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith("/page/")
        if self._keys and not is_open and not self._has_key(headers):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            raise ApiError(415, "the body must be JSON; send content-type: application/json")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body:
            raise ApiError(413, _too_large(self._max_body))

    def _has_key(self, headers: Headers) -> bool:
        """Whether a header holds an accepted key (OpenAI's or Anthropic's); compared in constant time."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = [headers.get("x-api-key", "").encode(), key.strip().encode() if scheme.lower() == "bearer" else b""]
        matches = [hmac.compare_digest(each, known) for each in sent for known in self._keys]
        return any(matches)

    def _count(self, scope: Scope, response: _Response) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        seconds = time.perf_counter() - response.started
        self._metrics.responses.labels(path, str(response.status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        level = logging.DEBUG if path in ("/health", "/ready", "/metrics", "other") and response.status < 500 else logging.INFO
        details: Mapping[str, Any] = {
            "request_id": scope["unmask.id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": response.status,
            "total_seconds": round(seconds, 4),
            **scope["unmask.details"],
        }
        _log.log(level, "request", extra={"details": details})


class _LimitedBody:
    """A request body that fails with 413 when it is too long and with 408 when it takes too long."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive, self._remaining, self._max_bytes = receive, max_bytes, max_bytes
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self._complete = False

    async def receive(self) -> Message:
        # HTTPException is the only error that FastAPI passes on while it reads a body.
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body took longer than {BODY_SECONDS:g} s to arrive; send it again") from error
        self._complete = not message.get("more_body", False)
        self._remaining -= len(message.get("body", b""))
        if self._remaining < 0:
            raise HTTPException(413, _too_large(self._max_bytes))
        return message


class _Response:
    """The response of one request: records its status and adds the request id to its headers."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.started = time.perf_counter()
        self.status = CLIENT_CLOSED
        self._begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._scope["unmask.id"]
            headers["request-id"] = self._scope["unmask.id"]  # as Anthropic names it
            headers["x-content-type-options"] = "nosniff"
            if ignored := self._scope["unmask.details"].get("ignored_fields"):
                headers["x-unmask-ignored-fields"] = ",".join(ascii(name)[1:-1] for name in ignored)[:MAX_HEADER]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Send an error response, unless a response has begun."""
        if self._begun:
            raise error
        await error.response(self._scope)(self._scope, self._receive, self.send)


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def _too_large(max_bytes: int) -> str:
    return f"the body is larger than {max_bytes} bytes; send less, or raise the server's max_body"
