"""/v1/chat/completions: OpenAI's chat objects from answers.

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
from unmask.serve.answer import Answer, News, costs, token_entry, usage
from unmask.serve.exchange import Backend, open_exchange, stream
from unmask.serve.protocol import ChatRequest
from unmask.serve.served import Prepared, ServedModel


async def chat(backend: Backend, http: HttpRequest, body: ChatRequest) -> Response:
    """Answer a conversation.

    Raises:
        ApiError: a field out of range, or the request cannot be served.
    """
    prepared = await asyncio.to_thread(backend.model.chat, body)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": backend.model.name}
    if body.stream:
        return await stream(_events(backend, http, body, head, prepared))
    async with open_exchange(backend, http, prepared) as exchange:
        await exchange.finish()
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [_choice(answer, backend.model, body) for answer in exchange.answers],
            "usage": usage(exchange.answers, prepared.prompt_tokens),
            "diffusion": costs(exchange.answers, exchange.seconds),
        }
    )


async def _events(
    backend: Backend, http: HttpRequest, body: ChatRequest, head: dict[str, Any], prepared: Prepared
) -> AsyncGenerator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    if wants_usage:
        head["usage"] = None
    async with open_exchange(backend, http, prepared, watch=body.diffusion.watch) as exchange:
        begun: set[int] = set()
        async for batch in exchange.news():
            for answer, news, update in batch:
                if answer.index not in begun:
                    begun.add(answer.index)
                    yield _chunk(head, answer, {"role": "assistant", "content": ""}, body)
                for delta, logprobs in _deltas(news):
                    yield _chunk(head, answer, delta, body, backend.model, logprobs)
                if body.diffusion.watch and update.step is not None:
                    yield {**head, "choices": [], "diffusion": answer.watched(update.step)}
                if answer.completion is not None:
                    yield {**_chunk(head, answer, {}, body), "diffusion": costs([answer], exchange.seconds)}
    if wants_usage:
        yield {**head, "choices": [], "usage": usage(exchange.answers, prepared.prompt_tokens)}


def _deltas(news: News) -> Iterable[tuple[dict[str, Any], tuple[TokenLogprob, ...]]]:
    """OpenAI's deltas; log-probabilities go with text, even with none."""
    if news.text or news.logprobs:
        yield {"content": news.text}, news.logprobs
    for call in news.calls:
        yield {"tool_calls": [call]}, ()


def _chunk(
    head: dict[str, Any],
    answer: Answer,
    delta: dict[str, Any],
    body: ChatRequest,
    model: ServedModel | None = None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}
    if not delta:
        choice["finish_reason"] = answer.finish_reason
    if model is not None and body.logprobs and "content" in delta:
        choice["logprobs"] = _logprobs(model, logprobs)
    return {**head, "choices": [choice]}


def _choice(answer: Answer, model: ServedModel, body: ChatRequest) -> dict[str, Any]:
    calls = [call.to_json() for call in answer.calls]
    content = answer.text if answer.text or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": answer.index,
        "message": message,
        "logprobs": _logprobs(model, answer.logprobs) if body.logprobs else None,
        "finish_reason": answer.finish_reason,
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
