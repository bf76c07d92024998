"""`Exchange`: one client's request while the engine works on it.

Owns the wait for the engine, the client's disconnect, and what metrics and log learn about the request. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request as HttpRequest

from unmask.engine.engine import Update
from unmask.serve.choice import Choice, ChoiceDelta, usage
from unmask.serve.choice import costs as costs_of
from unmask.serve.errors import internal
from unmask.serve.served_model import PreparedRequests
from unmask.serve.state import AppState
from unmask.serve.worker import EngineFailedError, Submission


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
        """OpenAI's `usage`, of all choices."""
        return usage(self.choices, self._prompt_tokens)

    @property
    def costs(self) -> dict[str, Any]:
        """Forwards, speeds and seconds of all choices."""
        return costs_of(self.choices, self.seconds)

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
            **self.costs,
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
    watcher = asyncio.create_task(_abort_on_disconnect(http, submission))
    try:
        exchange = Exchange(state, http, prepared, submission)
        try:
            yield exchange
        finally:
            exchange.close()
    finally:
        submission.abort("disconnect")
        watcher.cancel()


async def _abort_on_disconnect(http: HttpRequest, submission: Submission) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    submission.abort("disconnect")
