"""`respond`: responses of OpenAI's endpoints whose answers are `choices`, whole or streamed.

Owns what chat completions and completions have in common; a `ResponseForm` writes the choices.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.serve.choice import Choice, ChoiceDelta
from unmask.serve.event_stream import stream_events
from unmask.serve.exchange import AppState, TokenCounts, open_exchange
from unmask.serve.protocol.fields import GeneratingRequest
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
    choices = [form.choice(choice) for choice in exchange.choices]
    about = {"usage": usage(exchange.tokens), "diffusion": exchange.costs(exchange.choices)}
    return JSONResponse({**head, "object": form.object, "choices": choices, **about})


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
        yield {**head, "choices": [], "usage": usage(exchange.tokens)}
