"""`Exchange`: one client's request while the engine works on it.

Owns the wait for the engine, the client's disconnect, and what metrics and log learn about the request. Every API passes
through here: it prepares its body, opens an exchange, and writes what comes of it in its own form.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from unmask.engine.engine import Update
from unmask.engine.request import decoding_seconds
from unmask.serve.adapters import ServedAdapters
from unmask.serve.choice import Choice, ChoiceDelta
from unmask.serve.clients import Client
from unmask.serve.config import ServerConfig
from unmask.serve.errors import ApiError, bad_request, internal
from unmask.serve.metrics import Metrics
from unmask.serve.protocol.fields import ignored_fields
from unmask.serve.served_model import PreparedRequests, ServedModel
from unmask.serve.worker import EngineFailedError, Submission, Worker

_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True)
class AppState:
    """The model, the engine's worker, the metrics, the config and the adapters of one application; at `app.state.unmask`."""

    model: ServedModel
    worker: Worker
    metrics: Metrics
    config: ServerConfig
    adapters: ServedAdapters

    def named(self, name: str) -> AppState:
        """The same with the model of this name: the base, or one with an adapter.

        Raises:
            ApiError: there is none.
        """
        model = self.adapters.find(name)
        if model is None:
            known = ", ".join(repr(each.name) for each in (self.model, *self.adapters.models))
            message = f"model {name[:80]!r} is not served here; use {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return replace(self, model=model)


async def _current_state(request: HttpRequest) -> AppState:
    state: AppState = request.app.state.unmask
    return state


CurrentState = Annotated[AppState, Depends(_current_state)]


async def _state_with_room(http: HttpRequest, state: CurrentState) -> AppState:
    """Refuses a request before its body is parsed where the queue is full: overload costs nothing."""
    if not http.scope["unmask.background"]:
        state.worker.check_room()
    return state


StateWithRoom = Annotated[AppState, Depends(_state_with_room)]


async def prepare(
    state: AppState, http: HttpRequest, body: _Body, prepare_body: Callable[[ServedModel, _Body], PreparedRequests]
) -> PreparedRequests:
    """Engine requests of a body, made in a thread. Fields that are ignored are named in a header and in the log.

    Args:
        state: of the application.
        http: the request.
        body: of any API.
        prepare_body: `prepare_chat`, for instance; APIs of other forms translate their body first.

    Raises:
        ApiError: naming the field at fault.
    """
    note_ignored(state, http, body)
    return await asyncio.to_thread(prepare_body, state.model, body)


def note_ignored(state: AppState, http: HttpRequest, body: BaseModel) -> None:
    """Name the fields of a body that are ignored in a response header and in the log.

    Raises:
        ApiError: there is one, and the server is strict.
    """
    ignored = ignored_fields(body)
    if ignored and state.config.strict:
        raise bad_request(f"{ignored[0]}: unknown field; leave it out", ignored[0])
    if ignored:
        http.scope["unmask.details"]["ignored_fields"] = ignored


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one client's request.

    Attributes:
        prompt: each prompt counted once.
        completion: end-of-sequence tokens counted.
        cached: of the prompts, those found in the KV cache.
    """

    prompt: int
    completion: int
    cached: int


class Exchange:
    """One client's request, from submission to its last byte.

    Attributes:
        choices: the completions.
    """

    def __init__(self, state: AppState, http: HttpRequest, prepared: PreparedRequests, submission: Submission) -> None:
        self._model, self._metrics, self._http, self._submission = state.model, state.metrics, http, submission
        self._prompt_tokens, self._logs_text = prepared.prompt_tokens, state.config.log_prompts
        self.choices = [Choice(i, request, prepared, state.model) for i, request in enumerate(prepared.requests)]
        self._note(prompt_tokens=prepared.prompt_tokens, model=state.model.name)
        state.metrics.prompt_tokens.inc(prepared.prompt_tokens)

    @property
    def seconds(self) -> float:
        """Since the request was submitted."""
        return time.perf_counter() - self._submission.started

    @property
    def tokens(self) -> TokenCounts:
        """Tokens of prompts and completions so far."""
        completion = 0
        # Later samples of a prompt also find in the cache what its first sample has just computed.
        cached: dict[tuple[int | None, ...], int] = {}
        for choice in self.choices:
            completion += choice.num_tokens
            if choice.completion is not None:
                count = choice.completion.costs.cached_tokens
                cached[choice.request.ids] = min(count, cached.get(choice.request.ids, count))
        return TokenCounts(self._prompt_tokens, completion, min(sum(cached.values()), self._prompt_tokens))

    def costs(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Forwards, speeds and seconds of finished choices, summed: our field `diffusion` of responses."""
        done = [choice.completion for choice in choices if choice.completion is not None]
        tokens, forwards = sum(len(each.ids) for each in done), sum(each.forwards for each in done)
        queue_seconds = min((each.costs.queue_seconds for each in done), default=0.0)
        seconds = decoding_seconds([each.costs for each in done])
        return {
            "forwards": forwards,
            "tokens_per_forward": round(tokens / max(forwards, 1), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-6), 2),
            "seconds": round(seconds, 4),
            "queue_seconds": round(queue_seconds, 4),
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
    client: Client = http.scope["unmask.client"]
    reserved, used = prepared.prompt_tokens + sum(request.num_wanted for request in prepared.requests), 0
    client.take_tokens(reserved)
    try:
        submission = state.worker.submit(prepared.requests, watch=watch, background=http.scope["unmask.background"])
        exchange = Exchange(state, http, prepared, submission)
        watcher = asyncio.create_task(_abort_on_disconnect(http, submission))
        try:
            yield exchange
        finally:
            submission.abort("disconnect")
            watcher.cancel()
            exchange.close()
            used = exchange.tokens.prompt + exchange.tokens.completion
    finally:
        client.give_tokens(reserved - used)


async def _abort_on_disconnect(http: HttpRequest, submission: Submission) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    submission.abort("disconnect")
