"""`Exchange`: one client's request while the engine works on it, and `respond`: its response, whole or streamed.

Owns the wait for the engine, the client's disconnect, and what metrics and log learn about the request. Knows no endpoint:
a `ResponseForm` writes the choices.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from fastapi import Depends
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.engine import Update
from unmask.serve.choice import Choice, ChoiceDelta
from unmask.serve.config import ServerConfig
from unmask.serve.errors import internal
from unmask.serve.event_stream import stream_events
from unmask.serve.metrics import Metrics
from unmask.serve.protocol import GeneratingRequest
from unmask.serve.served_model import PreparedRequests, ServedModel
from unmask.serve.worker import EngineFailedError, Submission, Worker


@dataclass(frozen=True)
class AppState:
    """The model, the engine's worker, the metrics and the config of one application; kept at `app.state.unmask`."""

    model: ServedModel
    worker: Worker
    metrics: Metrics
    config: ServerConfig


async def _current_state(request: HttpRequest) -> AppState:
    state: AppState = request.app.state.unmask
    return state


CurrentState = Annotated[AppState, Depends(_current_state)]


async def _state_with_room(state: CurrentState) -> AppState:
    """Refuses a request before its body is parsed where the queue is full: overload costs nothing."""
    state.worker.check_room()
    return state


StateWithRoom = Annotated[AppState, Depends(_state_with_room)]


@dataclass(frozen=True)
class ResponseForm(ABC):
    """How an endpoint of OpenAI's API writes the `choices` of one response.

    Attributes:
        id_prefix: of response ids.
        object: type of a whole response.
        chunk_object: type of a stream's events.
    """

    model: ServedModel
    prepared: PreparedRequests
    with_logprobs: bool

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A finished choice."""

    @abstractmethod
    def chunks(self, choice: Choice, delta: ChoiceDelta, *, is_first: bool) -> Iterable[dict[str, Any]]:
        """What a stream says about an update; once the choice has finished, the last chunk has its `finish_reason`."""


class Exchange:
    """One client's request, from submission to its last byte.

    Attributes:
        choices: the completions.
    """

    def __init__(self, state: AppState, http: HttpRequest, prepared: PreparedRequests, submission: Submission) -> None:
        self._model, self._metrics, self._http, self._submission = state.model, state.metrics, http, submission
        self._prompt_tokens, self._logs_text = prepared.prompt_tokens, state.config.log_prompts
        self.choices = [Choice(i, request, prepared, state.model) for i, request in enumerate(prepared.requests)]
        self._note(prompt_tokens=prepared.prompt_tokens)
        state.metrics.prompt_tokens.inc(prepared.prompt_tokens)

    @property
    def seconds(self) -> float:
        """Since the request was submitted."""
        return time.perf_counter() - self._submission.started

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`: each prompt counted once, end-of-sequence tokens counted."""
        tokens = 0
        # Later samples of a prompt also find in the cache what its first sample has just computed.
        cached: dict[tuple[int | None, ...], int] = {}
        for choice in self.choices:
            if choice.completion is not None:
                tokens += len(choice.completion.ids)
                count = choice.completion.costs.cached_tokens
                cached[choice.request.ids] = min(count, cached.get(choice.request.ids, count))
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": min(sum(cached.values()), self._prompt_tokens)},
        }

    def costs(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Forwards, speeds and seconds of finished choices, summed: our field `diffusion` beside OpenAI's `usage`."""
        done = [choice.completion for choice in choices if choice.completion is not None]
        tokens, forwards = sum(len(each.ids) for each in done), sum(each.forwards for each in done)
        seconds = self.seconds
        return {
            "forwards": forwards,
            "tokens_per_forward": round(tokens / max(forwards, 1), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-6), 2),
            "seconds": round(seconds, 4),
            "cached_tokens": sum(each.costs.cached_tokens for each in done),
            "edits": sum(each.costs.edits for each in done),
        }

    async def deltas(self) -> AsyncIterator[list[tuple[Choice, ChoiceDelta, Update]]]:
        """What each engine update adds to the choices, until all have ended.

        Raises:
            ApiError: the request cannot be finished.
            AbortedError: the client has disconnected.
        """
        try:
            async for updates in self._submission.updates():
                yield [(self.choices[i], self.choices[i].take(update), update) for i, update in updates]
        except EngineFailedError as error:
            raise internal(self._http.scope["unmask.id"]) from error

    async def finish(self) -> None:
        """Wait until all choices have ended."""
        async for _ in self.deltas():
            pass

    def close(self) -> None:
        """Report costs to metrics and log, however the request ended."""
        first = self._submission.first_token_seconds
        if first is not None:
            self._metrics.first_token.observe(first)
            self._note(first_token_seconds=round(first, 4))
        done = [choice.completion for choice in self.choices if choice.completion is not None]
        self._note(
            completion_tokens=sum(len(completion.ids) for completion in done),
            finish_reasons=[choice.finish_reason for choice in self.choices],
            queue_seconds=round(max((completion.costs.queue_seconds for completion in done), default=0.0), 4),
            **self.costs(self.choices),
        )
        if self._logs_text:
            prompts = {choice.request.ids for choice in self.choices}
            decode = self._model.tokenizer.decode
            self._note(
                prompts=[decode([token for token in ids if token is not None], skip_special=False) for ids in prompts],
                answers=[choice.text for choice in self.choices],
            )

    def _note(self, **details: Any) -> None:
        """Add details to the log line of this request."""
        self._http.scope["unmask.details"].update(details)


@asynccontextmanager
async def open_exchange(
    state: AppState, http: HttpRequest, prepared: PreparedRequests, *, watch: bool = False
) -> AsyncIterator[Exchange]:
    """Submit requests; when the client disconnects or the block is left early, they end and their cache blocks are free."""
    submission = state.worker.submit(prepared.requests, watch=watch)
    exchange = Exchange(state, http, prepared, submission)
    watcher = asyncio.create_task(_abort_on_disconnect(http, submission))
    try:
        yield exchange
    finally:
        submission.abort("disconnect")
        watcher.cancel()
        exchange.close()


async def _abort_on_disconnect(http: HttpRequest, submission: Submission) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    submission.abort("disconnect")


async def respond(state: AppState, http: HttpRequest, body: GeneratingRequest, form: ResponseForm) -> Response:
    """The response of an endpoint of OpenAI's API, streamed if the body asks for it.

    Raises:
        ApiError: the request cannot be served.
    """
    head = {"id": f"{form.id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": state.model.name}
    if body.stream:
        return await stream_events(_events(state, http, body, form, {**head, "object": form.chunk_object}))
    async with open_exchange(state, http, form.prepared) as exchange:
        await exchange.finish()
    choices = [form.choice(choice) for choice in exchange.choices]
    costs = exchange.costs(exchange.choices)
    return JSONResponse({**head, "object": form.object, "choices": choices, "usage": exchange.usage, "diffusion": costs})


async def _events(
    state: AppState, http: HttpRequest, body: GeneratingRequest, form: ResponseForm, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any]]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        head["usage"] = None
    async with open_exchange(state, http, form.prepared, watch=body.diffusion.watch) as exchange:
        begun: set[int] = set()
        async for batch in exchange.deltas():
            for choice, delta, update in batch:
                chunks = form.chunks(choice, delta, is_first=choice.index not in begun)
                begun.add(choice.index)
                ending: dict[str, Any] | None = None
                for chunk in chunks:
                    event = {**head, "choices": [chunk]}
                    if chunk["finish_reason"] is None:
                        yield event
                    else:
                        ending = {**event, "diffusion": exchange.costs([choice])}
                # What was seen comes before the event that ends the choice.
                if body.diffusion.watch and update.step is not None:
                    yield {**head, "choices": [], "diffusion": choice.watch_event(update.step)}
                if ending is not None:
                    yield ending
    if with_usage:
        yield {**head, "choices": [], "usage": exchange.usage}
