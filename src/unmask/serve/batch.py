"""`run_batch`: a file of requests in OpenAI's batch format, answered without a server.

Owns the application that answers, how many lines are asked at a time, and resuming. Lines are asked by `batch_lines`;
`batch_ray` does the same on a cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from unmask.engine.llm import LanguageModel
from unmask.errors import DataError, TrainingError
from unmask.serve.app import create_app
from unmask.serve.batch_file import BatchAnswers, BatchCounts, BatchFile, BatchLine
from unmask.serve.batch_lines import answer_lines, ask, batch_client
from unmask.serve.config import ServerConfig

WAITING = 2
"""Requests sent for each that is decoded: while one ends, the next is prepared."""
READY_SECONDS = 1800.0
"""How long the engine may take to be made."""
_POLL_SECONDS = 0.05


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
    slots = asyncio.Semaphore(WAITING * config.max_concurrent)

    async def admit() -> bool:
        await slots.acquire()
        return not should_stop()

    async def answer(lines: Iterator[BatchLine], write: Callable[[dict[str, Any]], None]) -> None:
        async with asking(language_model, config) as ask_line:
            await answer_lines(lines, ask_line, write, admit, slots.release)

    return answer_missing(requests, out, lambda lines, write: asyncio.run(answer(lines, write)), on_progress)


def answer_missing(
    requests: BatchFile,
    out: Path,
    answer: Callable[[Iterator[BatchLine], Callable[[dict[str, Any]], None]], None],
    on_progress: Callable[[BatchCounts], None],
) -> BatchCounts:
    """Answer what `out` does not answer yet.

    Args:
        requests: the batch file.
        out: file of answers.
        answer: takes the lines to ask, and what writes the record of an answer.
        on_progress: called before the first answer and after each.

    Raises:
        DataError: `out` holds something else, or another job is writing it.
        CheckpointError: the disk is full.
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
            answer(requests.missing(answers), write)
        return BatchCounts.of(requests, answers)
    finally:
        answers.close()


@asynccontextmanager
async def asking(
    language_model: LanguageModel, config: ServerConfig
) -> AsyncIterator[Callable[[BatchLine], Awaitable[dict[str, Any]]]]:
    """What gives the record of a line's answer, while the application runs in this process.

    Raises:
        TrainingError: the engine does not get ready.
        UnmaskError: the engine cannot be made.
    """
    failures: list[BaseException] = []
    app = create_app(language_model, config, on_failure=failures.append)
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
        yield lambda line: ask(client, line, name, wait_ready)
