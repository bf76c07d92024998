"""`ApiError`: an HTTP status and OpenAI's error object.

Owns the mapping from our errors to OpenAI's. Knows no route.
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
    """An error response.

    Args:
        status: HTTP status.
        message: value, rule and remedy in one line.
        param: name of the field at fault.
        code: stable name for programs.
        headers: further response headers.
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
    """400: a wrong field or body."""
    return ApiError(400, message, param=param, code=code)


def timed_out(seconds: float) -> ApiError:
    """504: the request exceeded the server's timeout. A retry would take as long, so clients are told not to."""
    message = f"the request exceeded the server's timeout of {seconds:g} s; request fewer tokens"
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


def loading() -> ApiError:
    """503: the server is starting."""
    message = "the model is loading; try again in a few seconds"
    return ApiError(503, message, code="loading", headers={"retry-after": "2"})


def stopping() -> ApiError:
    """503: the server is shutting down."""
    return ApiError(503, "the server is shutting down; try again later", code="stopping", headers={"retry-after": "5"})


def internal(request_id: str) -> ApiError:
    """500: a bug. The client only learns the request id, under which the log has the traceback."""
    return ApiError(500, f"internal error; see the server log, request id {request_id}", code="internal_error")
