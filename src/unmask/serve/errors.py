"""`ApiError`: an error response, in the form of the API that the client speaks.

Owns the errors, and OpenAI's form; the other APIs bring theirs along (`ErrorForm`). Knows no route.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse
from starlette.types import Scope

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorObject


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "A field is missing, unknown, out of range, or the prompt is too long",
        401: "No API key, or a wrong one",
        403: "The Host or Origin header is not accepted",
        404: "Unknown path or model",
        408: "The body took too long to arrive",
        413: "The body is larger than the server accepts",
        415: "The body is not JSON",
        429: "The queue is full; Retry-After says when to try again",
        500: "A bug",
        503: "The model is loading, or the server is shutting down",
        504: "The request exceeded the server's timeout",
    }.items()
}
"""What the OpenAPI document says about them."""
COMMON_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {status: ERROR_RESPONSES[status] for status in (401, 403, 500)}
"""Those of routes that take no body."""
OTHER_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": response["description"]} for status, response in ERROR_RESPONSES.items()
}
"""Likewise, of an API whose errors have another form."""


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

    def body(self, scope: Scope) -> dict[str, Any]:
        """The body of the response to a request, in the form that the guard has chosen by its path."""
        form: ErrorForm = scope["unmask.error_form"]
        return form(self)

    def response(self, scope: Scope) -> JSONResponse:
        """The response to a request."""
        return JSONResponse(self.body(scope), self.status, headers=self.headers)


ErrorForm = Callable[[ApiError], dict[str, Any]]
"""How an API writes the body of an error."""


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


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
