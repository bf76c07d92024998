"""The application: which paths there are, and how errors look.

Owns the routes and the worker's life. What an endpoint says is in its own file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from unmask import __version__
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.serve import chat, completions, protocol
from unmask.serve.errors import ApiError, bad_request
from unmask.serve.exchange import Backend
from unmask.serve.guard import Guard
from unmask.serve.metrics import Metrics
from unmask.serve.served import ServedModel, Settings
from unmask.serve.worker import Worker

_PAGE = Path(str(files("unmask.serve"))) / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {"content-security-policy": PAGE_POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}


class ErrorObject(BaseModel):
    """What went wrong: OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is an error."""

    error: ErrorObject


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "A field is missing, unknown, out of range, or the prompt is too long",
        401: "No API key, or a wrong one",
        403: "This host or web origin may not use the server",
        404: "No such path or model",
        408: "The body took too long to arrive",
        413: "The body is larger than the server takes",
        415: "The body is not JSON",
        429: "The queue is full; Retry-After says when to try again",
        500: "A bug",
        503: "The model is being prepared, or the server is stopping",
        504: "The request took longer than it may",
    }.items()
}
_PLAIN_ERRORS: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 403, 500)}
router = APIRouter()


async def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend


Served = Annotated[Backend, Depends(_backend)]


async def _generating(backend: Served) -> Backend:
    """Before a body is worked on: a flood is refused at no cost."""
    backend.worker.check_room()
    return backend


Generating = Annotated[Backend, Depends(_generating)]


@router.post("/v1/chat/completions", responses=_ERRORS, response_class=JSONResponse)
async def post_chat(http: Request, body: protocol.ChatRequest, backend: Generating) -> Response:
    """Answer a conversation."""
    return await chat.chat(backend, http, body)


@router.post("/v1/completions", responses=_ERRORS, response_class=JSONResponse)
async def post_completions(http: Request, body: protocol.CompletionRequest, backend: Generating) -> Response:
    """Continue texts."""
    return await completions.complete(backend, http, body)


@router.post("/v1/infill", responses=_ERRORS, response_class=JSONResponse)
async def post_infill(http: Request, body: protocol.InfillRequest, backend: Generating) -> Response:
    """Fill the holes of a text, with what stands on both sides of each in view."""
    return await completions.infill(backend, http, body)


@router.post("/v1/tokenize", responses=_ERRORS)
async def post_tokenize(body: protocol.TokenizeRequest, backend: Served) -> dict[str, Any]:
    """Token ids of a text, or of a conversation as the model would see it."""
    model = backend.model
    if body.model is not None:
        model.check_name(body.model)
    encode = partial(model.plain_ids, body.prompt) if body.prompt is not None else partial(model.chat_ids, body.messages or [])
    ids = await asyncio.to_thread(encode)
    return {"tokens": ids, "count": len(ids), "max_model_len": model.context}


@router.get("/v1/models", responses=_PLAIN_ERRORS)
async def get_models(backend: Served) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [backend.model.describe()]}


@router.get("/v1/models/{name:path}", responses={**_PLAIN_ERRORS, 404: _ERRORS[404]})
async def get_model(name: str, backend: Served) -> dict[str, Any]:
    """The model of this name."""
    backend.model.check_name(name)
    return backend.model.describe()


@router.get("/health", responses={403: _ERRORS[403]})
async def get_health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/ready", responses={403: _ERRORS[403], 503: {"description": "Not yet, or no longer"}})
async def get_ready(backend: Served) -> JSONResponse:
    """Requests are served."""
    state = backend.worker.state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics", responses=_PLAIN_ERRORS, response_class=Response)
async def get_metrics(backend: Served) -> Response:
    """Counters and histograms in Prometheus' text format."""
    return Response(backend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def get_page() -> FileResponse:
    """The chat page."""
    return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)


def create_app(
    language_model: LanguageModel,
    settings: Settings | None = None,
    *,
    loopback: bool = True,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """The server as an ASGI application; its engine runs while the application does (lifespan).

    Args:
        language_model: with a tokenizer.
        settings: how it behaves.
        loopback: it is reached from this machine only: without keys or `allow_hosts`, only loopback names are served, so that
            no web page can pass itself off as this server's.
        on_failure: called when the engine cannot be made.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    settings = settings if settings is not None else Settings()
    metrics = Metrics()
    model = ServedModel(language_model, settings)

    app = FastAPI(
        title="unmask",
        version=__version__,
        lifespan=lambda app: _engine_running(app, model, metrics, on_failure if on_failure is not None else _raise),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(router)
    app.mount("/page", _Page(directory=_PAGE), name="page")
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(ApiError)(_on_error)
    app.exception_handler(HTTPException)(_on_http_error)
    hosts = settings.allow_hosts or (("localhost", "127.0.0.1", "[::1]") if loopback and not settings.api_keys else ())
    paths = {getattr(route, "path", "") for route in router.routes}
    app.add_middleware(
        Guard,
        metrics=metrics,
        paths=paths,
        api_keys=settings.api_keys,
        hosts=hosts,
        origins=settings.allow_origins,
        max_body=settings.max_body,
    )
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


@asynccontextmanager
async def _engine_running(
    app: FastAPI, model: ServedModel, metrics: Metrics, on_failure: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    """The engine's thread, while the application runs."""
    settings = model.settings

    def make_engine() -> Engine:
        model.warm()
        decode, backend = model.tokenizer.decode, model.language_model.backend(wait=True)
        return Engine(backend, decode=decode, num_tokens=settings.cache_tokens, max_num_seqs=settings.max_concurrent)

    worker = Worker(
        make_engine,
        max_requests=settings.max_concurrent + settings.max_queue,
        timeout=settings.timeout,
        metrics=metrics,
        on_failure=on_failure,
    )
    metrics.observe_engine(lambda: worker.engine_now)
    app.state.backend = Backend(model, worker, metrics, settings)
    try:
        yield
    finally:
        await worker.close(0.0)


class _Page(StaticFiles):
    """The page's files, under a policy that lets them load nothing from elsewhere."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(_PAGE_HEADERS)
        return response


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: f"no such path: {request.scope['path'][:200]}",
        405: f"{request.method} is not allowed here",
    }.get(error.status_code, str(error.detail))
    return await _on_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _on_invalid(request: Request, error: Exception) -> Response:
    """The first thing wrong with the body, named as OpenAI names it."""
    assert isinstance(error, RequestValidationError)
    # Where a field may be of several kinds, each says what is wrong: the kind that it is of knows best.
    first = max(error.errors(), key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:] if _is_field(part))
    name = place.removeprefix(".") or None
    if first["type"] == "json_invalid":
        return await _on_error(request, bad_request(f"the body is not JSON: {first['ctx']['error']}"))
    given = first["input"]
    shown = f"{json.dumps(given)[:80]}: " if isinstance(given, str | int | float) else ""
    reason = first["msg"].removeprefix("Value error, ")
    reason = {"extra_forbidden": "unknown field; leave it out", "missing": "it is missing"}.get(first["type"], shown + reason)
    name = first.get("ctx", {}).get("param", name)
    return await _on_error(request, bad_request(reason if name is None else f"{name}: {reason}", name))


def _is_field(part: Any) -> bool:
    """Whether a part of a place is a field's name or an index, not one of the kinds that a field may be of."""
    return isinstance(part, int) or (part.isidentifier() and part[:1].islower() and part not in _KINDS)


_KINDS = frozenset({"str", "int", "float", "bool", "constrained-str", "literal"})


def _raise(error: BaseException) -> None:
    raise error
