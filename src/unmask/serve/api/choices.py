"""`respond`: responses of OpenAI's endpoints whose answers are `choices`, whole or streamed.

Owns what chat completions and completions have in common; a `ResponseForm` writes the choices.
"""

from __future__ import annotations

import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.serve.choice import Choice, ChoiceDelta
from unmask.serve.event_stream import stream_events
from unmask.serve.exchange import AppState, TokenCounts, open_exchange
from unmask.serve.protocol.fields import GeneratingRequest, StreamOptions
from unmask.serve.served_model import PreparedRequests, ServedModel


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


def usage(tokens: TokenCounts) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
    }


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
    best = _best(exchange.choices, form.prepared.best_of, body.n or 1)
    choices = [{**form.choice(choice), "index": index} for index, choice in enumerate(best)]
    about = {"usage": usage(exchange.tokens), "diffusion": exchange.costs(exchange.choices)}
    return JSONResponse({**head, "object": form.object, "choices": choices, **about})


def _best(choices: Sequence[Choice], best_of: int | None, n: int) -> list[Choice]:
    """Of each prompt's choices the `n` with the highest mean log-probability, best first."""
    if best_of is None:
        return list(choices)
    prompts = [choices[first : first + best_of] for first in range(0, len(choices), best_of)]
    return [choice for samples in prompts for choice in sorted(samples, key=mean_logprob, reverse=True)[:n]]


def mean_logprob(choice: Choice) -> float:
    """Of a finished choice's tokens, where log-probabilities were asked for."""
    entries = choice.completion.logprobs if choice.completion is not None else None
    return sum(entry.logprob for entry in entries) / len(entries) if entries else -math.inf


async def _events(
    state: AppState, http: HttpRequest, body: GeneratingRequest, form: ResponseForm, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any]]:
    options = body.stream_options or StreamOptions()
    if options.include_usage:
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
                    if options.continuous_usage_stats and options.include_usage:
                        event["usage"] = usage(exchange.tokens)
                    if chunk["finish_reason"] is None:
                        yield event
                    else:
                        ending = {**event, "diffusion": exchange.costs([choice])}
                # What was seen comes before the event that ends the choice.
                if body.diffusion.watch and update.step is not None:
                    yield {**head, "choices": [], "diffusion": choice.watch_event(update.step)}
                if ending is not None:
                    yield ending
    if options.include_usage:
        yield {**head, "choices": [], "usage": usage(exchange.tokens)}
