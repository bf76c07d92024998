"""/v1/chat/completions: OpenAI's chat completion objects.

Owns the form of the response and of its stream.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.request import TokenLogprob
from unmask.serve.choice import Choice, ChoiceDelta, costs, token_entry
from unmask.serve.event_stream import stream_events
from unmask.serve.exchange import open_exchange
from unmask.serve.protocol import ChatRequest
from unmask.serve.served_model import PreparedRequests, ServedModel
from unmask.serve.state import AppState


async def chat(state: AppState, http: HttpRequest, body: ChatRequest) -> Response:
    """Answer a conversation.

    Raises:
        ApiError: a field out of range, or the request cannot be served.
    """
    prepared = await asyncio.to_thread(state.model.chat, body)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": state.model.name}
    if body.stream:
        return await stream_events(_events(state, http, body, head, prepared))
    async with open_exchange(state, http, prepared) as exchange:
        await exchange.finish()
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [_choice(choice, state.model, body) for choice in exchange.choices],
            "usage": exchange.usage,
            "diffusion": exchange.costs,
        }
    )


async def _events(
    state: AppState, http: HttpRequest, body: ChatRequest, head: dict[str, Any], prepared: PreparedRequests
) -> AsyncGenerator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        head["usage"] = None
    async with open_exchange(state, http, prepared, watch=body.diffusion.watch) as exchange:
        begun: set[int] = set()
        async for batch in exchange.deltas():
            for choice, delta, update in batch:
                if choice.index not in begun:
                    begun.add(choice.index)
                    yield _chunk(head, choice, {"role": "assistant", "content": ""}, body)
                for fields, logprobs in _openai_deltas(delta):
                    yield _chunk(head, choice, fields, body, state.model, logprobs)
                if body.diffusion.watch and update.step is not None:
                    yield {**head, "choices": [], "diffusion": choice.watch_event(update.step)}
                if choice.completion is not None:
                    yield {**_chunk(head, choice, {}, body), "diffusion": costs([choice], exchange.seconds)}
    if with_usage:
        yield {**head, "choices": [], "usage": exchange.usage}


def _openai_deltas(delta: ChoiceDelta) -> Iterable[tuple[dict[str, Any], tuple[TokenLogprob, ...]]]:
    """OpenAI's deltas; log-probabilities go with text, even if it is empty."""
    if delta.text or delta.logprobs:
        yield {"content": delta.text}, delta.logprobs
    for call in delta.tool_calls:
        yield {"tool_calls": [call]}, ()


def _chunk(
    head: dict[str, Any],
    choice: Choice,
    delta: dict[str, Any],
    body: ChatRequest,
    model: ServedModel | None = None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> dict[str, Any]:
    fields: dict[str, Any] = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
    if not delta:
        fields["finish_reason"] = choice.finish_reason
    if model is not None and body.logprobs and "content" in delta:
        fields["logprobs"] = _logprobs(model, logprobs)
    return {**head, "choices": [fields]}


def _choice(choice: Choice, model: ServedModel, body: ChatRequest) -> dict[str, Any]:
    calls = [call.model_dump() for call in choice.tool_calls]
    content = choice.text if choice.text or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _logprobs(model, choice.logprobs) if body.logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def _logprobs(model: ServedModel, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            **token_entry(model, entry.token, entry.logprob),
            "top_logprobs": [token_entry(model, token, logprob) for token, logprob in entry.alternatives],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}
