"""The FastAPI application: its routes, middleware and error responses.

Owns the lifetime of the worker and the routes that generate nothing; `APIS` lists those that do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from unmask import __version__
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.serve.adapters import ServedAdapters
from unmask.serve.api import (
    adapters,
    anthropic,
    batches,
    chat,
    completions,
    files,
    gateways,
    infill,
    llamacpp,
    ollama,
    responses,
    tokenize,
)
from unmask.serve.api.responses_store import ResponseStore
from unmask.serve.audit import AuditLog
from unmask.serve.batch_runner import BatchRunner
from unmask.serve.clients import RATE_HEADERS, Clients
from unmask.serve.config import ServerConfig
from unmask.serve.errors import COMMON_ERROR_RESPONSES, ERROR_RESPONSES, ApiError, ErrorForm, openai_error
from unmask.serve.exchange import AppState, CurrentState
from unmask.serve.file_store import FileStore
from unmask.serve.guard import Guard
from unmask.serve.kv_events import KVEventPublisher
from unmask.serve.metrics import Metrics
from unmask.serve.served_model import ServedModel
from unmask.serve.validation import invalid_body
from unmask.serve.worker import Worker


class Api(NamedTuple):
    """An API that clients speak.

    Attributes:
        router: its endpoints.
        prefix: of the paths whose errors have `error_form`.
        error_form: how it writes errors.
        is_untyped: its clients may send JSON under another content-type, or under none.
    """

    router: APIRouter
    prefix: str = ""
    error_form: ErrorForm = openai_error
    is_untyped: bool = False


APIS = (
    Api(chat.router),
    Api(completions.router),
    Api(responses.router),
    Api(anthropic.router, "/v1/messages", anthropic.anthropic_error),
    Api(infill.router),
    Api(llamacpp.router),
    Api(ollama.router, "/api/", ollama.ollama_error, is_untyped=True),
    Api(tokenize.router),
    Api(gateways.router),
    Api(adapters.router),
    Api(files.router),
    Api(batches.router),
)
_PAGE = Path(str(resources.files("unmask.serve"))) / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {"content-security-policy": PAGE_POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
router = APIRouter()


@router.get("/v1/models", responses=COMMON_ERROR_RESPONSES)
async def get_models(http: Request, state: CurrentState) -> dict[str, Any]:
    """The served model, once under each of its names, and with each of its adapters."""
    adapted = state.adapters.models
    if anthropic.VERSION_HEADER in http.headers:
        return anthropic.model_page(state.model, *adapted)
    data = [state.model.describe(name) for name in state.model.names]
    return {"object": "list", "data": [*data, *(model.describe(model.name) for model in adapted)]}


@router.get("/v1/models/{name:path}", responses={**COMMON_ERROR_RESPONSES, 404: ERROR_RESPONSES[404]})
async def get_model(http: Request, name: str, state: CurrentState) -> dict[str, Any]:
    """The model of this name."""
    model = state.named(name).model
    if anthropic.VERSION_HEADER in http.headers:
        return anthropic.model_info(model)
    return model.describe(name if model.parent is None else model.name)


@router.get("/health", responses={403: ERROR_RESPONSES[403]})
async def get_health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/ready", responses={403: ERROR_RESPONSES[403], 503: {"description": "Not yet or no longer"}})
async def get_ready(state: CurrentState) -> JSONResponse:
    """The model is loaded and requests are served."""
    status = state.worker.state
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/metrics", responses=COMMON_ERROR_RESPONSES, response_class=Response)
async def get_metrics(state: CurrentState) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def get_page() -> FileResponse:
    """The chat page."""
    return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)


def _raise(error: BaseException) -> None:
    raise error


def create_app(
    language_model: LanguageModel,
    config: ServerConfig,
    *,
    loopback: bool = True,
    on_failure: Callable[[BaseException], None] = _raise,
) -> FastAPI:
    """The server as an ASGI application; its engine runs during the application's lifespan.

    Args:
        language_model: with a tokenizer.
        config: limits, keys and names.
        loopback: the server listens on a loopback address: without API keys or `allow_hosts`, only loopback names are accepted
            as Host, which protects against DNS rebinding.
        on_failure: called when the engine cannot be made.

    Raises:
        CheckpointError: an adapter of the config is refused.
        ConfigError: the model has no tokenizer; a file or folder cannot be used; an address of KV events is wrong or in use, or
            their packages are missing.
    """
    model = ServedModel(language_model, config)
    served_adapters = ServedAdapters(model)
    publisher = KVEventPublisher.of(config)
    metrics = Metrics(model.name, config.max_loras if config.loras or config.lora_folder is not None else None)
    limits = {"requests_per_minute": config.requests_per_minute, "tokens_per_minute": config.tokens_per_minute}
    clients = Clients(config.keys, **limits)
    audit = None if config.audit_log is None else AuditLog(config.audit_log)

    app = FastAPI(
        title="unmask",
        version=__version__,
        lifespan=lambda app: _running(app, served_adapters, metrics, clients, publisher, audit, on_failure),
        exception_handlers={
            RequestValidationError: _on_invalid,
            ValidationError: _on_invalid,
            ApiError: _on_error,
            HTTPException: _on_http_error,
        },
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.clients = clients
    app.state.responses = ResponseStore()
    app.state.files = None if config.files is None else FileStore(config.files, config.max_stored)
    for each in _routers():
        app.include_router(each)
    app.mount("/page", _PageFiles(directory=_PAGE), name="page")
    _add_middleware(app, config, metrics, clients, audit, loopback=loopback)
    return app


def _routers() -> tuple[APIRouter, ...]:
    return (router, *(api.router for api in APIS))


def _add_middleware(
    app: FastAPI, config: ServerConfig, metrics: Metrics, clients: Clients, audit: AuditLog | None, *, loopback: bool
) -> None:
    """The guard around the routes and, for pages of other origins, CORS around both."""
    app.add_middleware(
        Guard,
        metrics=metrics,
        paths={route.path for each in _routers() for route in each.routes if isinstance(route, APIRoute)},
        error_forms={api.prefix: api.error_form for api in APIS if api.prefix},
        untyped=[api.prefix for api in APIS if api.is_untyped],
        clients=clients,
        hosts=config.allow_hosts or (("localhost", "127.0.0.1", "[::1]") if loopback and not config.keys else ()),
        origins=config.allow_origins,
        max_body=config.max_body,
        uploads={files.PATH: files.max_body(config.max_file)},
        audit=audit,
    )
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-unmask-ignored-fields", "retry-after", *RATE_HEADERS],
        )


@asynccontextmanager
async def _running(
    app: FastAPI,
    served_adapters: ServedAdapters,
    metrics: Metrics,
    clients: Clients,
    publisher: KVEventPublisher | None,
    audit: AuditLog | None,
    on_failure: Callable[[BaseException], None],
) -> AsyncIterator[None]:
    """Runs the worker, and what answers batches, while the application runs."""
    model = served_adapters.base
    config = model.config

    def make_engine() -> Engine:
        model.tokenizer.check_rows(model.language_model.config.vocab_size)
        # The vocabulary's bytes take half a second, which few first requests need.
        Thread(target=model.token_bytes, args=(0,), name="vocabulary", daemon=True).start()
        engine_options: dict[str, Any] = {"num_tokens": config.cache_tokens, "max_num_seqs": config.max_concurrent}
        if publisher is not None:
            publisher.clear()
            engine_options["on_cache_events"] = publisher.publish
        return model.language_model.engine(**engine_options)

    worker = Worker(
        make_engine,
        max_requests=config.max_concurrent + config.max_queue,
        timeout=config.timeout,
        metrics=metrics,
        on_failure=on_failure,
    )
    metrics.observe_engine(lambda: worker.current_engine)
    app.state.unmask = AppState(model, worker, metrics, config, served_adapters)
    try:
        async with _batches_running(app, worker, clients, model):
            yield
    finally:
        await worker.close(0.0)
        for each in (publisher, audit):
            if each is not None:
                each.close()


@asynccontextmanager
async def _batches_running(app: FastAPI, worker: Worker, clients: Clients, model: ServedModel) -> AsyncIterator[None]:
    """Answers batches where the server keeps files."""
    store: FileStore | None = app.state.files
    if store is None:
        yield
        return
    runner = BatchRunner(app, store, worker, clients, name=model.name, max_concurrent=model.config.max_concurrent)
    app.state.batches, task = runner, asyncio.create_task(runner.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.close()


class _PageFiles(StaticFiles):
    """The page's files, with a content security policy that allows nothing from other origins."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(_PAGE_HEADERS)
        return response


async def _on_error(request: Request, error: ApiError) -> Response:
    return error.response(request.scope)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    message = {
        404: f"no such path: {request.scope['path'][:200]}",
        405: f"{request.method} is not allowed here",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response(request.scope)


async def _on_invalid(request: Request, error: RequestValidationError | ValidationError) -> Response:
    return invalid_body(error).response(request.scope)
