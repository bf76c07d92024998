"""Between the worker and the wire: waits for a job while its client is there, and streams events.

Owns disconnects, the first event (an error before it is a proper HTTP error) and the form of a stream. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unmask.engine.engine import Update
from unmask.serve.answer import Answer, News, costs
from unmask.serve.errors import ApiError, internal
from unmask.serve.metrics import Metrics
from unmask.serve.served import Prepared, ServedModel, Settings
from unmask.serve.worker import AbortedError, EngineFailedError, Job, Worker

_log = logging.getLogger("unmask.serve")


@dataclass(frozen=True)
class Backend:
    """What routes work with."""

    model: ServedModel
    worker: Worker
    metrics: Metrics
    settings: Settings


class Exchange:
    """One client's request from submission to last byte.

    Attributes:
        answers: its choices.
        seconds: since it was submitted.
    """

    def __init__(self, backend: Backend, http: HttpRequest, prepared: Prepared, job: Job) -> None:
        self.model, self._metrics, self._http, self._job = backend.model, backend.metrics, http, job
        self.prepared, self._logs_text = prepared, backend.settings.log_prompts
        self.answers = [Answer(i, request, prepared, self.model) for i, request in enumerate(prepared.requests)]
        self.note(prompt_tokens=prepared.prompt_tokens)
        backend.metrics.prompt_tokens.inc(prepared.prompt_tokens)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._job.started

    def note(self, **details: Any) -> None:
        """Put details into the log's line about this request."""
        self._http.scope["unmask.details"].update(details)

    async def news(self) -> AsyncIterator[list[tuple[Answer, News, Update]]]:
        """What has happened to the answers, until all have ended.

        Raises:
            ApiError: it cannot be finished.
            AbortedError: the client has gone.
        """
        try:
            async for updates in self._job.updates():
                yield [(self.answers[i], self.answers[i].take(update), update) for i, update in updates]
        except EngineFailedError as error:
            raise internal(self._http.scope["unmask.id"]) from error

    async def finish(self) -> None:
        """Wait for all of it."""
        async for _ in self.news():
            pass

    def close(self) -> None:
        """It has ended, one way or another: note what it came to."""
        first = self._job.first_token_seconds
        if first is not None:
            self._metrics.first_token.observe(first)
            self.note(first_token_seconds=round(first, 4))
        done = [answer.completion for answer in self.answers if answer.completion is not None]
        tokens = sum(len(each.ids) for each in done)
        self.note(
            completion_tokens=tokens,
            finish_reasons=[answer.finish_reason for answer in self.answers],
            queue_seconds=round(max((each.costs.queue_seconds for each in done), default=0.0), 4),
            **costs(self.answers, self.seconds),
        )
        if self._logs_text:
            requests = {answer.request.ids for answer in self.answers}
            decode = self.model.tokenizer.decode
            self.note(
                prompts=[decode([token for token in ids if token is not None], skip_special=False) for ids in requests],
                answers=[answer.text for answer in self.answers],
            )


@asynccontextmanager
async def open_exchange(
    backend: Backend, http: HttpRequest, prepared: Prepared, *, watch: bool = False
) -> AsyncIterator[Exchange]:
    """Submit a job; when the client goes, or this is left early, the job ends and its pages are free."""
    job = backend.worker.submit(prepared.requests, watch=watch)
    watcher = asyncio.create_task(_watch_client(http, job))
    try:
        exchange = Exchange(backend, http, prepared, job)
        try:
            yield exchange
        finally:
            exchange.close()
    finally:
        job.abort("disconnect")
        watcher.cancel()


async def _watch_client(http: HttpRequest, job: Job) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    job.abort("disconnect")


async def stream(events: AsyncGenerator[dict[str, Any]]) -> Response:
    """A response of server-sent events, ended by OpenAI's `[DONE]`.

    Raises:
        ApiError: there is not even a first event.
    """
    return _EventStream(await anext(events), events)


class _EventStream(Response):
    """Sends events as they come; an error among them is the last one."""

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], events: AsyncGenerator[dict[str, Any]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines(scope["unmask.id"]):
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self, request_id: str) -> AsyncGenerator[bytes]:
        yield _line(self._first)
        try:
            async for event in self._events:
                yield _line(event)
        except ApiError as error:
            yield _line(error.body())
        except AbortedError:
            raise
        except Exception:
            _log.exception("request %s failed", request_id)
            yield _line(internal(request_id).body())
        else:
            yield b"data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
