"""Batches: a file of requests in OpenAI's batch format, answered by the server's application in this process.

Owns the file formats, what is asked at a time, and resuming. An answer is what the server would send: `app` prepares, decodes
and writes it.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI

from unmask.engine.llm import LanguageModel
from unmask.errors import DataError
from unmask.files import disk_errors
from unmask.serve.app import create_app
from unmask.serve.config import ServerConfig

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/infill")
"""Paths that a line may ask."""
WAITING = 2
"""Requests sent for each that is decoded: while one ends, the next is prepared."""
_UNLIMITED = 2**31
_ID_PREFIX = "batch_req_"
_BEGINNING = f'{{"id": "{_ID_PREFIX}'.encode()
"""Of every line of answers."""


@dataclass(frozen=True)
class BatchLine:
    """A request of a batch file.

    Attributes:
        custom_id: the client's, by which its answer is found.
        url: one of `ENDPOINTS`.
        body: of the request.
    """

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class BatchCounts:
    """How far a batch is: lines in all, answered, and among these refused or failed."""

    total: int
    done: int
    failed: int


@dataclass(frozen=True)
class BatchFile:
    """A batch file that has been checked as a whole.

    Attributes:
        path: of the file.
        ids: every `custom_id`.
        models: the names that bodies give their model.
    """

    path: Path
    ids: frozenset[str]
    models: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> BatchFile:
        """Check a file.

        Raises:
            DataError: an unreadable or empty file, or a line that is not a request with a `custom_id` of its own.
        """
        ids: set[str] = set()
        models: set[str] = set()
        for number, line in _read_lines(path):
            if line.custom_id in ids:
                raise DataError(f"{path}, line {number}: custom_id {line.custom_id!r:.80} is there twice; ids are unique")
            ids.add(line.custom_id)
            if isinstance(name := line.body.get("model"), str):
                models.add(name)
        if not ids:
            raise DataError(f"{path} holds no request; a batch file has one a line")
        return cls(path, frozenset(ids), frozenset(models))

    def lines(self) -> Iterator[BatchLine]:
        """The requests, one at a time; raises DataError as `read`."""
        return (line for _, line in _read_lines(self.path))


def _read_lines(path: Path) -> Iterator[tuple[int, BatchLine]]:
    """The requests of a file with the numbers of their lines, from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, _batch_line(text, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"cannot read {path}: {reason}") from error


def _batch_line(text: str, where: str) -> BatchLine:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({str(error)[:80]}); a batch file has one request a line") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: {values!r:.40} is not an object with custom_id, method, url and body")
    custom_id, method, url, body = (values.get(key) for key in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise DataError(f"{where}: custom_id is {custom_id!r:.40}; it must be a text, by which the answer is found")
    if method not in (None, "POST"):
        raise DataError(f"{where}: method is {method!r:.40}; it must be POST")
    if url not in ENDPOINTS:
        raise DataError(f"{where}: url is {url!r:.80}; it must be one of {', '.join(ENDPOINTS)}")
    if not isinstance(body, dict):
        raise DataError(f"{where}: body is {body!r:.40}; it must be an object, the body of a request")
    return BatchLine(custom_id, url, body)


class BatchAnswers:
    """The file of answers: what is there already, and where the next one goes."""

    def __init__(self, path: Path) -> None:
        """Open the file, for this job alone; a torn last line, of a killed run, is cut off.

        Raises:
            DataError: a file that holds something else, or that another job is writing.
            CheckpointError: it cannot be written.
        """
        self._path = path
        self.failed: dict[str, bool] = {}
        """Of every answer by its custom_id, whether it is an error."""
        with disk_errors(path), ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = stack.enter_context(path.open("ab"))
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"another job is writing {path}; wait for it, or choose another file") from error
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            lines = content[:whole].splitlines()
            for number, text in enumerate(lines, 1):
                self._read(text, number)
            torn = content[whole:]
            if not (torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)):
                raise self._foreign(len(lines) + 1)
            if torn:
                os.truncate(path, whole)
            stack.pop_all()

    def _read(self, text: bytes, number: int) -> None:
        try:
            record = json.loads(text)
            self.failed[record["custom_id"]] = record["response"]["status_code"] != 200
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(number) from error

    def _foreign(self, number: int) -> DataError:
        return DataError(f"{self._path}, line {number}: not an answer of a batch; choose another file")

    def write(self, record: dict[str, Any]) -> None:
        """Append an answer; raises CheckpointError on a full disk."""
        # Half of a surrogate pair, which a request may hold, is written as JSON's escape.
        text = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
        with disk_errors(self._path):
            self._file.write(text + b"\n")
            self._file.flush()
        self.failed[record["custom_id"]] = record["response"]["status_code"] != 200

    def close(self) -> None:
        """Write everything to the disk."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())
            self._file.close()


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
    """
    answers = BatchAnswers(out)
    try:
        strangers = answers.failed.keys() - requests.ids
        if strangers:
            raise DataError(f"{out} answers {min(strangers)!r:.80}, which {requests.path} does not ask; choose another file")

        def counts() -> BatchCounts:
            return BatchCounts(len(requests.ids), len(answers.failed), sum(answers.failed.values()))

        def write(record: dict[str, Any]) -> None:
            answers.write(record)
            on_progress(counts())

        on_progress(counts())
        if len(answers.failed) < len(requests.ids):
            config = replace(config, max_queue=_UNLIMITED, timeout=float("inf"))
            waiting = (line for line in requests.lines() if line.custom_id not in answers.failed)
            asyncio.run(_answer_all(create_app(language_model, config), waiting, write, config, should_stop))
        return counts()
    finally:
        answers.close()


async def _answer_all(
    app: FastAPI,
    lines: Iterator[BatchLine],
    write: Callable[[dict[str, Any]], None],
    config: ServerConfig,
    should_stop: Callable[[], bool],
) -> None:
    async with _client(app) as client:
        name = app.state.unmask.model.name
        running: set[asyncio.Task[dict[str, Any]]] = set()
        exhausted = False
        try:
            while True:
                while not exhausted and len(running) < WAITING * config.max_concurrent and not should_stop():
                    line = next(lines, None)
                    if line is None:
                        exhausted = True
                    else:
                        running.add(asyncio.create_task(_answer(client, line, name)))
                if not running:
                    return
                finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    write(task.result())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def _client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application, which runs meanwhile."""
    # What fails within the application is the answer to one request (500), not the end of the batch.
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client,
    ):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)
        yield client


async def _answer(client: httpx2.AsyncClient, line: BatchLine, name: str) -> dict[str, Any]:
    """The record of a line's answer; a body without a model means the one that there is."""
    if line.body.get("stream"):
        message = "stream is true; the answers of a batch are whole, leave it out"
        status, request_id, body = 400, "", {"error": {"message": message, "type": "invalid_request_error", "param": "stream"}}
    else:
        # As it is in the file: a client would refuse NaN, and half of a surrogate pair.
        asked = json.dumps({"model": name, **line.body}).encode()
        response = await client.post(line.url, content=asked, headers={"content-type": "application/json"})
        status, request_id, body = response.status_code, response.headers.get("x-request-id", ""), _body(response)
    answered = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"{_ID_PREFIX}{secrets.token_hex(12)}", "custom_id": line.custom_id, "response": answered, "error": None}


def _body(response: httpx2.Response) -> Any:
    """The body of a response; of one that is no JSON, because the application failed, its text as an error."""
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": response.text, "type": "server_error", "param": None}}
