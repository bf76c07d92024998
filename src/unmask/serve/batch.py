"""Batches: requests of a file in OpenAI's batch format, answered by the server's application in this process.

Owns how lines are asked and resumed. An answer is what the server would send: the application prepares, decodes and writes it.
`unmask batch` and the server's own batches (`batch_runner`) ask through here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from unmask.engine.llm import LanguageModel
from unmask.errors import DataError, TrainingError
from unmask.serve.app import create_app
from unmask.serve.batch_file import ID_PREFIX, BatchAnswers, BatchFile, BatchLine
from unmask.serve.config import ServerConfig

WAITING = 2
"""Requests sent for each that is decoded: while one ends, the next is prepared."""
READY_SECONDS = 1800.0
"""How long the engine may take to be made."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class BatchCounts:
    """How far a batch is: lines in all, answered, and among these refused or failed."""

    total: int
    done: int
    failed: int

    @classmethod
    def of(cls, requests: BatchFile, answers: BatchAnswers) -> BatchCounts:
        """The counts of a file and its answers."""
        return cls(len(requests.ids), len(answers.failed), sum(answers.failed.values()))


def run_batch(
    language_model: LanguageModel,
    requests: BatchFile,
    out: Path,
    config: ServerConfig,
    *,
    on_progress: Callable[[BatchCounts], None] = lambda counts: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> BatchCounts:
    """Answer all requests of a batch file that `out` does not answer yet, many at a time, in any order.

    Args:
        language_model: with a tokenizer.
        requests: the batch file.
        out: answers, a line each, as OpenAI's: `id`, `custom_id`, `response` (`status_code`, `request_id`, `body`), `error`.
        config: limits; `max_concurrent` requests are decoded together, and none times out.
        on_progress: called after every answer.
        should_stop: asked before every request; True: those that run are finished, and the counts returned.

    Raises:
        DataError: `out` holds something else, or another job is writing it.
        CheckpointError: the disk is full.
        TrainingError: the engine does not get ready.
        UnmaskError: the engine cannot be made.
    """
    answers = BatchAnswers(out)
    try:
        strangers = answers.failed.keys() - requests.ids
        if strangers:
            raise DataError(f"{out} answers {min(strangers)!r:.80}, which {requests.path} does not ask; choose another file")

        def write(record: dict[str, Any]) -> None:
            answers.write(record)
            on_progress(BatchCounts.of(requests, answers))

        on_progress(BatchCounts.of(requests, answers))
        if len(answers.failed) < len(requests.ids):
            waiting = (line for line in requests.lines() if line.custom_id not in answers.failed)
            asyncio.run(_run(language_model, config, waiting, write, should_stop))
        return BatchCounts.of(requests, answers)
    finally:
        answers.close()


async def _run(
    language_model: LanguageModel,
    config: ServerConfig,
    lines: Iterator[BatchLine],
    write: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool],
) -> None:
    failures: list[BaseException] = []
    app = create_app(language_model, config, on_failure=failures.append)
    slots = asyncio.Semaphore(WAITING * config.max_concurrent)

    async def admit() -> bool:
        await slots.acquire()
        return not should_stop()

    async with app.router.lifespan_context(app), batch_client(app) as client:

        async def wait_ready() -> None:
            deadline = time.monotonic() + READY_SECONDS
            while (await client.get("/ready")).status_code != 200:
                if failures:
                    raise failures[0]
                if time.monotonic() > deadline:
                    raise TrainingError(f"the engine is not ready after {READY_SECONDS:g} s; try a smaller model")
                await asyncio.sleep(_POLL_SECONDS)

        await wait_ready()
        name = app.state.unmask.model.name
        await answer_lines(lines, lambda line: ask(client, line, name, wait_ready), write, admit, slots.release)


async def answer_lines(
    lines: Iterator[BatchLine],
    ask_line: Callable[[BatchLine], Awaitable[dict[str, Any]]],
    write: Callable[[dict[str, Any]], None],
    admit: Callable[[], Awaitable[bool]],
    release: Callable[[], None],
) -> None:
    """Ask lines together and write their answers as they come; an exception ends what runs.

    Args:
        lines: what is asked.
        ask_line: gives the record of a line's answer.
        write: takes it.
        admit: waits until one more line may be asked; False: no more are, and those that run are finished.
        release: called when a line that was admitted is done.
    """

    async def answer(line: BatchLine) -> None:
        try:
            write(await ask_line(line))
        finally:
            release()

    try:
        async with asyncio.TaskGroup() as group:
            for line in lines:
                if not await admit():
                    release()
                    return
                group.create_task(answer(line))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


@asynccontextmanager
async def batch_client(app: FastAPI, marks: Mapping[str, Any] | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an application that runs in this process, whose requests come after all others.

    Args:
        app: the application, running.
        marks: entries of the ASGI scope of its requests.
    """
    entries = {"unmask.background": True, **(marks or {})}

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, **entries}, receive, send)

    # What fails within the application is the answer to one request (500), not the end of the batch.
    transport = httpx2.ASGITransport(marked, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
        yield client


async def ask(
    client: httpx2.AsyncClient, line: BatchLine, name: str, wait_ready: Callable[[], Awaitable[None]]
) -> dict[str, Any]:
    """The record of a line's answer.

    Args:
        client: from `batch_client`.
        line: of a batch file; a body without a model means the one that there is.
        name: of that model.
        wait_ready: awaited while the engine is made anew; raises where it will not be.
    """
    if line.body.get("stream"):
        message = "stream is true; the answers of a batch are whole, leave it out"
        status, request_id, body = 400, "", {"error": {"message": message, "type": "invalid_request_error", "param": "stream"}}
    else:
        # As it is in the file: a client would refuse NaN, and half of a surrogate pair.
        asked = json.dumps({"model": name, **line.body}).encode()
        headers = {"content-type": "application/json"}
        while (response := await client.post(line.url, content=asked, headers=headers)).status_code == 503:
            await wait_ready()
        status, request_id, body = response.status_code, response.headers.get("x-request-id", ""), _body(response)
    answered = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"{ID_PREFIX}{secrets.token_hex(12)}", "custom_id": line.custom_id, "response": answered, "error": None}


def _body(response: httpx2.Response) -> Any:
    """The body of a response; of one that is no JSON, because the application failed, its text as an error."""
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": response.text, "type": "server_error", "param": None}}
