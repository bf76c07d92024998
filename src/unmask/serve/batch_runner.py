"""`BatchRunner`: the batches of a folder of files, answered by the server beside its clients' requests.

Owns the states of a batch, and how much of the engine batches may have. A batch belongs to the process that holds the
lock of its answers, and that goes on where another was killed. Knows no route.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

from starlette.types import ASGIApp

from unmask.errors import DataError, UnmaskError
from unmask.serve.batch_file import AnswersBusyError, BatchAnswers, BatchFile, BatchLine, BatchLineError
from unmask.serve.batch_lines import answer_lines, ask, batch_client
from unmask.serve.clients import Client, Clients
from unmask.serve.file_store import FileStore, OpenBatch
from unmask.serve.worker import Worker

MAX_LINES = 50_000
"""Requests of a batch, as with OpenAI."""
_MAX_RUNNING = 8
_POLL_SECONDS = 1.0
_ROOM_SECONDS = 0.02
_COUNT_SECONDS = 0.5
_log = logging.getLogger("unmask.serve")


class _StoppingError(Exception):
    """The server shuts down; the batch goes on with the next one."""


class BatchRunner:
    """Answers batches while the application runs.

    Args:
        app: the server.
        store: of files and batches.
        worker: of the engine.
        clients: batches of others wait until their keys are there again.
        name: of the model.
        max_concurrent: completions that the engine decodes together.
    """

    def __init__(
        self, app: ASGIApp, store: FileStore, worker: Worker, clients: Clients, *, name: str, max_concurrent: int
    ) -> None:
        self._app, self._store, self._worker, self._clients, self._name = app, store, worker, clients, name
        self._room = _Room(worker, max_concurrent)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def notify(self) -> None:
        """There is a new batch, or one to cancel."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled; what runs then is asked again by the next process."""
        try:
            while True:
                for batch in self._store.open_batches():
                    id_ = batch.object["id"]
                    known = self._clients.named(batch.owner) is not None
                    if known and id_ not in self._running and len(self._running) < _MAX_RUNNING:
                        self._running[id_] = asyncio.create_task(self._run_batch(batch))
                        self._running[id_].add_done_callback(lambda task, id_=id_: self._running.pop(id_))  # type: ignore[misc]
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_SECONDS):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_batch(self, batch: OpenBatch) -> None:
        id_ = batch.object["id"]
        try:
            with closing(await asyncio.to_thread(BatchAnswers, self._store.answers(id_))) as answers:
                await self._answer(batch, answers)
        except (AnswersBusyError, _StoppingError):
            return
        except UnmaskError as error:
            self._fail(id_, error)
        except Exception as error:
            _log.exception("batch %s failed", id_)
            self._fail(id_, error)

    async def _answer(self, batch: OpenBatch, answers: BatchAnswers) -> None:
        id_, endpoint = batch.object["id"], batch.object["endpoint"]
        requests = None
        if self._store.status(id_) != "cancelling":
            path, name = self._store.content(batch.object["input_file_id"]), batch.private["filename"]
            requests = await asyncio.to_thread(BatchFile.read, path, name=name, url=endpoint, max_lines=MAX_LINES)
            begun = {"status": "in_progress", "in_progress_at": _now(), "model": self._name}
            begun |= {"request_counts": {"total": len(requests.ids)}}
            self._store.change_batch(id_, begun, statuses=("validating",))
            # Of a process that was killed: failures of the server are asked again.
            self._store.change_batch(id_, {"status": "in_progress"}, statuses=("finalizing",))
            await self._ask_all(batch, requests, answers)
            self._count(id_, answers)
        status = self._store.status(id_)
        finished = requests is not None and len(answers.failed) == len(requests.ids)
        expired = _now() >= batch.object["expires_at"]
        if status == "in_progress" and (finished or expired):
            self._store.change_batch(id_, {"status": "finalizing", "finalizing_at": _now()}, statuses=("in_progress",))
            await self._finish(batch, requests, answers, "completed" if finished else "expired")
        elif status == "cancelling":
            await self._finish(batch, None, answers, "cancelled")

    async def _ask_all(self, batch: OpenBatch, requests: BatchFile, answers: BatchAnswers) -> None:
        id_, counted_at = batch.object["id"], 0.0

        def is_wanted() -> bool:
            is_open = self._store.status(id_) == "in_progress" and _now() < batch.object["expires_at"]
            return is_open and self._clients.named(batch.owner) is not None

        async def admit() -> bool:
            return await self._room.take(is_wanted)

        def write(record: dict[str, Any]) -> None:
            nonlocal counted_at
            answers.write(record)
            if time.monotonic() - counted_at > _COUNT_SECONDS:
                counted_at = time.monotonic()
                self._count(id_, answers)

        async def ask_line(line: BatchLine) -> dict[str, Any]:
            return await ask(client, line, self._name, self._wait_ready)

        self._count(id_, answers)
        # The client's own limits are for requests that somebody waits for.
        async with batch_client(self._app, {"unmask.client": Client(batch.owner)}) as client:
            await answer_lines(requests.missing(answers), ask_line, write, admit, self._room.release)

    async def _wait_ready(self) -> None:
        while self._worker.state == "loading":
            await asyncio.sleep(_ROOM_SECONDS)
        if self._worker.state == "stopping":
            raise _StoppingError

    def _count(self, id_: str, answers: BatchAnswers) -> None:
        self._store.change_batch(id_, _counts(answers))

    async def _finish(self, batch: OpenBatch, requests: BatchFile | None, answers: BatchAnswers, status: str) -> None:
        """Write the files of answers and errors, and say that the batch has ended."""
        id_, store = batch.object["id"], self._store
        answered = store.answers(id_)
        fields: dict[str, Any] = {"status": status, f"{status}_at": _now(), **_counts(answers)}
        with store.arriving(0) as output, store.arriving(0) as errors:
            await asyncio.to_thread(_divide, answered, requests, answers, output, errors)
            # Named by the batch: a process that was killed here and the next one write the same files.
            for kind, path in (("output", output), ("error", errors)):
                if path.stat().st_size:
                    file_id = f"file-{id_.removeprefix('batch_')}-{kind}"
                    seconds, filename = batch.private["output_seconds"], f"{id_}_{kind}.jsonl"
                    store.add_file(batch.owner, path, filename, "batch_output", seconds=seconds, id_=file_id)
                    fields[f"{kind}_file_id"] = file_id
        store.change_batch(id_, fields)
        answered.unlink(missing_ok=True)

    def _fail(self, id_: str, error: Exception) -> None:
        is_told = isinstance(error, DataError)
        message = str(error) if is_told else "the server failed at this batch; its log says more"
        line = error.line if isinstance(error, BatchLineError) else None
        shown = {"code": "invalid_request" if is_told else "server_error", "message": message, "line": line, "param": None}
        if not is_told:
            _log.error("batch %s failed: %s", id_, error)
        errors = {"object": "list", "data": [shown]}
        self._store.change_batch(id_, {"status": "failed", "failed_at": _now(), "errors": errors})
        self._store.answers(id_).unlink(missing_ok=True)


def _counts(answers: BatchAnswers) -> dict[str, Any]:
    """Fields of the batch that change with its answers; the total stays."""
    num_failed = sum(answers.failed.values())
    counts = {"completed": len(answers.failed) - num_failed, "failed": num_failed}
    return {"request_counts": counts, "usage": answers.usage.to_json()}


class _Room:
    """How many lines of batches are asked at once: most of the engine where it has nothing else to do, a part of it beside
    other requests, and none more while these wait."""

    def __init__(self, worker: Worker, max_concurrent: int) -> None:
        self._worker, self._max_concurrent = worker, max_concurrent
        self._alone, self._beside = max(1, max_concurrent * 3 // 4), max(1, max_concurrent // 4)
        self._num_asked = 0
        self._turn = asyncio.Lock()  # first come, first served: batches take turns

    async def take(self, is_wanted: Callable[[], bool]) -> bool:
        """Wait for room for one line; False: it is not wanted any more, which is asked before it waits and now and then."""
        asked_at = -_COUNT_SECONDS
        async with self._turn:
            while True:
                if (now := time.monotonic()) - asked_at >= _COUNT_SECONDS:
                    if not is_wanted():
                        break
                    asked_at = now
                others = self._worker.num_requests - self._worker.num_background
                allowed = self._beside if others else self._alone
                if self._num_asked < allowed and others + self._num_asked < self._max_concurrent:
                    self._num_asked += 1
                    return True
                await asyncio.sleep(_ROOM_SECONDS)
        self._num_asked += 1  # given back as one that was taken
        return False

    def release(self) -> None:
        """A line is answered."""
        self._num_asked -= 1


def _divide(answered: Path, requests: BatchFile | None, answers: BatchAnswers, output: Path, errors: Path) -> None:
    """Write the answers to one file and the errors, requests that were not asked among them, to another."""
    with answered.open("rb") as source, output.open("wb") as good, errors.open("wb") as bad:
        for line in source:
            custom_id = json.loads(line)["custom_id"]
            (bad if answers.failed[custom_id] else good).write(line)
        for request in () if requests is None else requests.missing(answers):
            _write_expired(request.custom_id, bad)


def _write_expired(custom_id: str, file: BinaryIO) -> None:
    message = "the request was not asked before the completion window ended"
    record = {"id": None, "custom_id": custom_id, "response": None, "error": {"code": "batch_expired", "message": message}}
    file.write(json.dumps(record).encode() + b"\n")


def _now() -> int:
    return int(time.time())
