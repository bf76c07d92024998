"""A server that says what a test scripts, in the words of the real one, for a browser to talk to.

Owns the loopback server's life, and the steps of a block that falls into place. Knows no model.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

import unmask.serve.app as real

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)
PAGE = Path(real.__file__).parent / "page"
Chunk = dict[str, Any]


@dataclass
class Script:
    """What the fake model answers.

    Attributes:
        tokens: the answer, token by token.
        block_size: tokens that form together; each step decides two of them, the outer ones first.
        wrong: place -> what stands there until the block's last step edits it.
        hold: wait at this step, the first is 0, until the test releases it or the client has gone.
        delay: seconds between steps.
        breaks: "error" or "cut": how the stream ends after the first block, if it does.
        status, headers, message: an error instead of an answer.
    """

    tokens: tuple[str, ...] = ("The", " capital", " of", " France", " is", " Paris", ".")
    block_size: int = 4
    wrong: dict[int, str] = field(default_factory=dict)
    hold: int | None = None
    delay: float = 0.0
    breaks: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "no"

    def steps(self) -> Iterator[tuple[str, Chunk]]:
        """Per forward: the text that became final, and what a watcher sees."""
        forwards = 0
        for start in range(0, len(self.tokens), self.block_size):
            places = list(range(start, min(start + self.block_size, len(self.tokens))))
            order = [place for pair in zip(places, reversed(places), strict=True) for place in pair]
            order = list(dict.fromkeys(order))
            rounds = [order[:count] for count in range(0, len(order) + 2, 2)]
            rounds += [order] if any(place in self.wrong for place in places) else []
            done = start
            for number, decided in enumerate(rounds):
                last = number == len(rounds) - 1
                editing = any(place in self.wrong for place in places)
                before = done
                while not (editing and not last) and done in decided:
                    done += 1
                shown = [self._token(place, place in decided, place < done, last) for place in places]
                forwards += 1
                view = {"index": 0, "start": start, "committed": done, "forwards": forwards, "tokens": shown}
                yield "".join(self.tokens[before:done]), view

    def _token(self, place: int, decided: bool, final: bool, last: bool) -> dict[str, Any]:
        text = self.tokens[place]
        if not decided:
            return {"text": text if place % 2 else "", "state": "masked", "confidence": 0.4 if place % 2 else 0.0}
        if place in self.wrong:
            return {"text": text if last else self.wrong[place], "state": "edited" if last else "provisional", "confidence": 0.9}
        return {"text": text, "state": "committed" if final else "provisional", "confidence": 0.98}


@dataclass
class FakeServer:
    """Set `script` before a request; `bodies` are the requests that came."""

    script: Script = field(default_factory=Script)
    key: str | None = None
    diffusion: bool = True
    bodies: list[Any] = field(default_factory=list)
    url: str = ""
    gone: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Response:
            is_open = request.url.path == "/" or request.url.path.startswith("/page/")
            if self.key and not is_open and request.headers.get("authorization") != f"Bearer {self.key}":
                return _refusal(401, "the API key is missing or wrong")
            response = await call_next(request)
            response.headers["content-security-policy"] = real._PAGE_POLICY
            return response

        @app.get("/")
        async def index() -> FileResponse:
            return FileResponse(PAGE / "index.html")

        @app.get("/page/{name:path}")
        async def part(name: str) -> FileResponse:
            return FileResponse(PAGE / name)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            diffusion = {"block_size": 8, "threshold": 0.95} if self.diffusion else None
            return {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 512, "diffusion": diffusion}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            if self.script.status != 200:
                return _refusal(self.script.status, self.script.message, self.script.headers)
            return StreamingResponse(self._stream(body), media_type="text/event-stream")

        return app

    async def _stream(self, body: Any) -> AsyncIterator[str]:
        script = self.script
        try:
            forwards = 0
            for text, view in script.steps():
                if script.hold == forwards:
                    while not self.released.is_set():
                        await asyncio.sleep(0.01)
                forwards += 1
                if text:
                    yield _event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])
                if body.get("diffusion", {}).get("watch"):
                    yield _event(choices=[], diffusion=view)
                if script.breaks and view["committed"] >= script.block_size:
                    yield _event(error={"message": "the engine failed"}) if script.breaks == "error" else ""
                    return
                await asyncio.sleep(script.delay)
            count = len(script.tokens)
            costs = {"forwards": forwards, "tokens_per_forward": count / forwards, "tokens_per_second": 88.1, "edits": len(script.wrong)}
            end = {"index": 0, "delta": {}, "finish_reason": "stop"}
            yield _event(choices=[end], **({"diffusion": {**costs, "seconds": 0.26}} if self.diffusion else {}))
            yield _event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.gone.set()
            raise


def _event(**chunk: Any) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status, headers)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free loopback port, in a thread; its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive(), "the test server did not stop"
