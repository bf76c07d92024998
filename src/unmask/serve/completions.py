"""/v1/completions and /v1/infill: plain text, continued or filled in.

Owns the form of the responses and of the stream.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.infill import best_filling
from unmask.engine.request import TokenLogprob
from unmask.serve.answer import Answer, costs, token_entry, usage
from unmask.serve.exchange import Backend, open_exchange, stream
from unmask.serve.protocol import CompletionRequest, InfillRequest
from unmask.serve.served import Prepared, ServedModel


async def complete(backend: Backend, http: HttpRequest, body: CompletionRequest) -> Response:
    """Continue one or several texts.

    Raises:
        ApiError: a field out of range, or the request cannot be served.
    """
    prepared = await asyncio.to_thread(backend.model.completion, body)
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": backend.model.name,
    }
    if body.stream:
        return await stream(_events(backend, http, body, head, prepared))
    async with open_exchange(backend, http, prepared) as exchange:
        await exchange.finish()
    choices = [
        _choice(each, _echo(each, prepared) + each.text, backend.model, body, each.logprobs) for each in exchange.answers
    ]
    return JSONResponse(
        {
            **head,
            "choices": choices,
            "usage": usage(exchange.answers, prepared.prompt_tokens),
            "diffusion": costs(exchange.answers, exchange.seconds),
        }
    )


async def infill(backend: Backend, http: HttpRequest, body: InfillRequest) -> Response:
    """Fill the holes of a text.

    Raises:
        ApiError: no hole, an autoregressive model, or a field out of range.
    """
    prepared = await asyncio.to_thread(backend.model.infilling, body)
    async with open_exchange(backend, http, prepared) as exchange:
        await exchange.finish()
    completions = [answer.completion for answer in exchange.answers if answer.completion is not None]
    best = best_filling(prepared.requests, completions, backend.model.tokenizer, exchange.seconds)
    return JSONResponse(
        {
            "object": "infill",
            "model": backend.model.name,
            "text": best.text,
            "fills": best.fills,
            "tokens_per_hole": best.tokens_per_hole,
            "score": best.score,
            "forwards": best.forwards,
            "seconds": round(best.seconds, 4),
            "usage": usage(exchange.answers, prepared.prompt_tokens),
        }
    )


async def _events(
    backend: Backend, http: HttpRequest, body: CompletionRequest, head: dict[str, Any], prepared: Prepared
) -> AsyncGenerator[dict[str, Any]]:
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    if wants_usage:
        head = {**head, "usage": None}
    async with open_exchange(backend, http, prepared, watch=body.diffusion.watch) as exchange:
        begun: set[int] = set()
        async for batch in exchange.news():
            for answer, news, update in batch:
                text = news.text
                if answer.index not in begun:
                    begun.add(answer.index)
                    text = _echo(answer, prepared) + text
                if text or news.logprobs or answer.completion is not None:
                    choice = _choice(answer, text, backend.model, body, news.logprobs)
                    event = {**head, "choices": [choice]}
                    if answer.completion is not None:
                        event["diffusion"] = costs([answer], exchange.seconds)
                    yield event
                if body.diffusion.watch and update.step is not None:
                    yield {**head, "choices": [], "diffusion": answer.watched(update.step)}
    if wants_usage:
        yield {**head, "choices": [], "usage": usage(exchange.answers, prepared.prompt_tokens)}


def _echo(answer: Answer, prepared: Prepared) -> str:
    """The prompt's text where it was asked for."""
    per_prompt = len(prepared.requests) // max(len(prepared.prompts), 1)
    return prepared.prompts[answer.index // per_prompt] if prepared.prompts else ""


def _choice(
    answer: Answer, text: str, model: ServedModel, body: CompletionRequest, entries: Sequence[TokenLogprob]
) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        before = answer.logprobs[: len(answer.logprobs) - len(entries)]
        logprobs = _logprobs(model, entries, sum(len(model.spell(entry.token).decode(errors="replace")) for entry in before))
    return {"index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def _logprobs(model: ServedModel, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The older API's four lists; `text_offset` counts characters of the completion."""
    told = [_named(token_entry(model, entry.token, entry.logprob)) for entry in entries]
    offsets = []
    for each in told:
        offsets.append(offset)
        offset += len(bytes(each["bytes"]).decode(errors="replace"))
    others = [[_named(token_entry(model, token, logprob)) for token, logprob in entry.alternatives] for entry in entries]
    return {
        "tokens": [each["token"] for each in told],
        "token_logprobs": [each["logprob"] for each in told],
        "top_logprobs": [{other["token"]: other["logprob"] for other in row} for row in others],
        "text_offset": offsets,
    }


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    """A token that is part of a character goes by its bytes, as in OpenAI's API: these names are keys."""
    spelled = bytes(entry["bytes"])
    name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled) if "\ufffd" in entry["token"] else entry["token"]
    return {**entry, "token": name}
