"""What a client can be told: an HTTP status and OpenAI's error object.

Owns the mapping from our errors to theirs. Knows no route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: value, rule and remedy in one line.
        param: name of the field at fault.
        code: a name that programs can rely on.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake in a field."""
    return ApiError(400, message, param=param, code=code)


def timed_out(seconds: float) -> ApiError:
    """A request that took longer than it may. Asking again would take as long: clients are told not to."""
    message = f"the request took longer than {seconds:g} s; ask for fewer tokens, or raise --timeout"
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


def loading() -> ApiError:
    """The server comes up."""
    message = "the model is being prepared; try again in some seconds"
    return ApiError(503, message, code="loading", headers={"retry-after": "2"})


def stopping() -> ApiError:
    """The server goes down."""
    return ApiError(503, "the server is stopping; try again soon", code="stopping", headers={"retry-after": "5"})


def internal(request_id: str) -> ApiError:
    """A bug of ours: the client learns nothing of it but where to find it."""
    return ApiError(500, f"internal error; the server's log has it under request id {request_id}", code="internal_error")
