"""Lines of a batch, asked of the server's application in this process.

Owns how lines are asked, and that many are at once. An answer is what the server would send: the application prepares, decodes
and writes it. `unmask batch` and the server's own batches (`batch_runner`) both ask through here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.types import ASGIApp, Receive, Scope, Send

from unmask.serve.batch_file import ID_PREFIX, BatchLine


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
async def batch_client(app: ASGIApp, marks: Mapping[str, Any] | None = None) -> AsyncIterator[httpx2.AsyncClient]:
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
