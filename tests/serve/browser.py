"""A server whose answers a test scripts, with the API of the real one, for a browser.

Owns the loopback server's life, the steps of a block that falls into place, and a reader's visit. Knows no model.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from playwright.sync_api import Browser, Locator, Page

import unmask.serve.app as real
from unmask.engine.sampling_params import ResolvedParams, SamplingParams
from unmask.serve.server import listen, url_of

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
        wrong: place -> what stands there until it is edited, two steps before the block's end.
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
            places = range(start, min(start + self.block_size, len(self.tokens)))
            order = list(dict.fromkeys(place for pair in zip(places, reversed(places), strict=True) for place in pair))
            rounds = [order[:count] for count in range(0, len(order) + 2, 2)]
            editing = not self.wrong.keys().isdisjoint(places)
            rounds += [order] * 3 if editing else []  # the edit, a look at it, the end
            done = start
            for left, decided in zip(reversed(range(len(rounds))), rounds, strict=True):
                before = done
                while done in decided and (left == 0 or not editing):
                    done += 1
                tokens = [self._token(place, place in decided, place < done, left) for place in places]
                forwards += 1
                view = {"index": 0, "start": start, "committed": done, "forwards": forwards, "tokens": tokens}
                yield "".join(self.tokens[before:done]), view

    def _token(self, place: int, decided: bool, final: bool, left: int) -> dict[str, Any]:
        text = self.tokens[place]
        if not decided:
            return {"text": text if place % 2 else "", "state": "masked", "confidence": 0.4 if place % 2 else 0.0}
        if place in self.wrong and left > 0:
            shown = text if left <= 2 else self.wrong[place]
            return {"text": shown, "state": "edited" if left == 2 else "provisional", "confidence": 0.9}
        return {"text": text, "state": "committed" if final else "provisional", "confidence": 0.98}


class FakeServer:
    """Set `script` before a request.

    Attributes:
        key: the API key it wants, if any.
        diffusion: whether it says that its model is one.
        bodies: requests that came.
        gone: set when a client has left an answer.
        released: set it to let a held answer go on.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.script = Script()
        self.key: str | None = None
        self.diffusion = True
        self.bodies: list[Any] = []
        self.gone, self.released = threading.Event(), threading.Event()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Response:
            is_open = request.url.path == "/" or request.url.path.startswith("/page/")
            if self.key and not is_open and request.headers.get("authorization") != f"Bearer {self.key}":
                return _refusal(401, "the API key is missing or wrong")
            response = await call_next(request)
            response.headers["content-security-policy"] = real.PAGE_POLICY
            return response

        @app.get("/")
        async def index() -> FileResponse:
            return FileResponse(PAGE / "index.html")

        @app.get("/page/{name:path}")
        async def part(name: str) -> FileResponse:
            return FileResponse(PAGE / name)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            defaults = ResolvedParams(block_size=8, threshold=0.95, mode="speculative")
            declared = [option for option in SamplingParams.options().values() if "page" in option.surfaces]
            options = [option for option in declared if self.diffusion or option.panel in ("Sampling", "Output")]
            model = {
                "id": "tiny",
                "object": "model",
                "max_model_len": 512,
                "capabilities": dict.fromkeys(("diffusion", "speculative", "infill", "editing"), self.diffusion),
                "diffusion": {"block_size": 8, "threshold": 0.95} if self.diffusion else None,
                "options": [option.to_json(getattr(defaults, option.name)) for option in options],
            }
            return {"object": "list", "data": [model]}

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
            count, edits = len(script.tokens), len(script.wrong)
            speed = {"tokens_per_forward": count / forwards, "tokens_per_second": 88.1, "seconds": 0.26}
            end = {"index": 0, "delta": {}, "finish_reason": "stop"}
            yield _event(choices=[end], diffusion={"forwards": forwards, "edits": edits, "cached_tokens": 0, **speed})
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
def running(fake: FakeServer) -> Iterator[str]:
    """Serve on a free loopback port, in a thread, until the block ends; its URL."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_config=None, access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the test server did not start"
            time.sleep(0.01)
        yield url_of(listener)
    finally:
        fake.released.set()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the test server did not stop"


@dataclass
class Visit:
    """One reader's browser: a page, and what went wrong on it."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)

    def expect(self, words: str) -> None:
        """Take a problem that this test has brought about off the list; the browser may tell it more than once."""
        assert any(words in problem for problem in self.problems), f"no {words!r} in {self.problems}"
        self.problems[:] = [problem for problem in self.problems if words not in problem]

    def ask(self, text: str) -> None:
        """Write a message and send it as a reader does."""
        self.page.locator("#input").fill(text)
        self.page.locator("#input").press("Enter")

    def answer(self, state: str = "done") -> Locator:
        """The last answer, once it is in this state."""
        answer = self.page.locator(f"#messages > li.answer:last-child[data-state={state}]")
        answer.wait_for()
        return answer


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """Open the page in a browser that has never seen it; at the end nothing may have gone wrong that was not expected."""
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 720}, **options})
    context.set_default_timeout(8000)
    page = context.new_page()
    visit = Visit(page, url)
    page.on("console", lambda message: visit.problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.problems.append(str(error)))
    page.on(
        "request", lambda request: visit.problems.append(request.url) if not request.url.startswith((url, "blob:")) else None
    )
    try:
        page.goto(url)
        yield visit
        assert not visit.problems, visit.problems
    finally:
        context.close()
