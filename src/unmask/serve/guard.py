"""`Guard`: the ASGI middleware for request ids, access control, rate and body limits, metrics, access and audit log.

Owns the outermost layer of the application. Knows paths and headers, never the content of bodies.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmask.serve.audit import AuditLog
from unmask.serve.clients import Clients
from unmask.serve.errors import ApiError, ErrorForm, internal, openai_error
from unmask.serve.metrics import Metrics
from unmask.serve.worker import AbortedError

OPEN_PATHS = ("/", "/health", "/ready")
"""Paths that need no API key, besides all below /page/."""
CLIENT_CLOSED = 499
MAX_HEADER = 1000
"""Characters of the header that names ignored fields."""
BODY_SECONDS = 60.0
"""How long a body may take to arrive, and longer by ..."""
BODY_RATE = 2**16
"""... a second for so many bytes."""
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
        clients: who may send requests.
        hosts: accepted values of the Host header; without any, all are accepted.
        origins: web origins besides the server's own that may send requests.
        max_body: bytes of a body.
        uploads: bytes of the bodies of other paths, which are forms with files.
        audit: has a line for every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Collection[str],
        error_forms: Mapping[str, ErrorForm],
        untyped: Sequence[str] = (),
        clients: Clients,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        max_body: int,
        uploads: Mapping[str, int],
        audit: AuditLog | None = None,
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._error_forms, self._untyped = dict(error_forms), tuple(untyped)
        self._clients, self._uploads, self._audit = clients, dict(uploads), audit
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
        scope.setdefault("unmask.client", self._clients.everybody)
        forms = self._error_forms.items()
        scope["unmask.error_form"] = next((form for prefix, form in forms if scope["path"].startswith(prefix)), openai_error)
        response = _Response(scope, receive, send)
        try:
            if not scope["unmask.background"]:
                self._check(scope, headers)
            body = _LimitedBody(receive, self._uploads.get(scope["path"], self._max_body))
            await self._app(scope, body.receive, response.send)
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
        """Find out who asks. Raises: ApiError: the request is not accepted."""
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
        if self._clients.need_key and not is_open:
            client = self._clients.find(_sent_keys(headers))
            if client is None:
                raise _no_key()
            scope["unmask.client"] = client
        self._check_body(scope, headers)

    def _check_body(self, scope: Scope, headers: Headers) -> None:
        is_upload = scope["path"] in self._uploads
        if scope["method"] == "POST":
            scope["unmask.client"].take_request()
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            is_empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
            if is_empty and not is_upload:
                return
            if is_upload and media_type != "multipart/form-data":
                raise ApiError(415, "the body must be a form with a file; send content-type: multipart/form-data")
            if not is_upload and not _is_json(media_type):
                raise ApiError(415, "the body must be JSON; send content-type: application/json")
        length = headers.get("content-length", "")
        max_bytes = self._uploads.get(scope["path"], self._max_body)
        if length.isdecimal() and int(length[:20]) > max_bytes:
            raise ApiError(413, _too_large(max_bytes))

    def _count(self, scope: Scope, response: _Response) -> None:
        route = scope.get("route")
        path = route.path if isinstance(route, APIRoute) else scope["path"] if scope["path"] in self._paths else "other"
        seconds = time.perf_counter() - response.started
        if self._audit is not None:
            self._audit.write(scope, path, response.status, seconds)
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
            message_text = f"the body took longer than {BODY_SECONDS:g} s to arrive; send it again, faster"
            raise HTTPException(408, message_text) from error
        self._complete = not message.get("more_body", False)
        length = len(message.get("body", b""))
        self._remaining -= length
        self._deadline += length / BODY_RATE
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
            if self._scope["method"] == "POST":
                headers.update(self._scope["unmask.client"].headers())
            if ignored := self._scope["unmask.details"].get("ignored_fields"):
                headers["x-unmask-ignored-fields"] = ",".join(ascii(name)[1:-1] for name in ignored)[:MAX_HEADER]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Send an error response, unless a response has begun."""
        if self._begun:
            raise error
        await error.response(self._scope)(self._scope, self._receive, self.send)


def _sent_keys(headers: Headers) -> tuple[str, str]:
    """The keys of a request, in OpenAI's header and in Anthropic's."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key", ""), key.strip() if scheme.lower() == "bearer" else ""


def _no_key() -> ApiError:
    message = "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key"
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _is_json(media_type: str) -> bool:
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def _too_large(max_bytes: int) -> str:
    return f"the body is larger than {max_bytes} bytes; send less, or raise the server's limit"
