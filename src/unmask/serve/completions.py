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
from unmask.serve.choice import Choice, costs, token_entry
from unmask.serve.event_stream import stream_events
from unmask.serve.exchange import open_exchange
from unmask.serve.protocol import CompletionRequest, InfillRequest
from unmask.serve.served_model import PreparedRequests, ServedModel
from unmask.serve.state import AppState


async def complete(state: AppState, http: HttpRequest, body: CompletionRequest) -> Response:
    """Continue one or several texts.

    Raises:
        ApiError: a field out of range, or the request cannot be served.
    """
    prepared = await asyncio.to_thread(state.model.completion, body)
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": state.model.name,
    }
    if body.stream:
        return await stream_events(_events(state, http, body, head, prepared))
    async with open_exchange(state, http, prepared) as exchange:
        await exchange.finish()
    choices = [
        _choice(choice, _echo(choice, prepared) + choice.text, state.model, body, choice.logprobs)
        for choice in exchange.choices
    ]
    return JSONResponse({**head, "choices": choices, "usage": exchange.usage, "diffusion": exchange.costs})


async def infill(state: AppState, http: HttpRequest, body: InfillRequest) -> Response:
    """Fill the holes of a text.

    Raises:
        ApiError: no hole, an autoregressive model, or a field out of range.
    """
    prepared = await asyncio.to_thread(state.model.infilling, body)
    async with open_exchange(state, http, prepared) as exchange:
        await exchange.finish()
    completions = [choice.completion for choice in exchange.choices if choice.completion is not None]
    best = best_filling(prepared.requests, completions, state.model.tokenizer, exchange.seconds)
    return JSONResponse(
        {
            "object": "infill",
            "model": state.model.name,
            "text": best.text,
            "fills": best.fills,
            "tokens_per_hole": best.tokens_per_hole,
            "score": best.score,
            "forwards": best.forwards,
            "seconds": round(best.seconds, 4),
            "usage": exchange.usage,
        }
    )


async def _events(
    state: AppState, http: HttpRequest, body: CompletionRequest, head: dict[str, Any], prepared: PreparedRequests
) -> AsyncGenerator[dict[str, Any]]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        head = {**head, "usage": None}
    async with open_exchange(state, http, prepared, watch=body.diffusion.watch) as exchange:
        begun: set[int] = set()
        async for batch in exchange.deltas():
            for choice, delta, update in batch:
                text = delta.text
                if choice.index not in begun:
                    begun.add(choice.index)
                    text = _echo(choice, prepared) + text
                if text or delta.logprobs or choice.completion is not None:
                    event = {**head, "choices": [_choice(choice, text, state.model, body, delta.logprobs)]}
                    if choice.completion is not None:
                        event["diffusion"] = costs([choice], exchange.seconds)
                    yield event
                if body.diffusion.watch and update.step is not None:
                    yield {**head, "choices": [], "diffusion": choice.watch_event(update.step)}
    if with_usage:
        yield {**head, "choices": [], "usage": exchange.usage}


def _echo(choice: Choice, prepared: PreparedRequests) -> str:
    """The prompt's text if the client asked for it (`echo`)."""
    per_prompt = len(prepared.requests) // max(len(prepared.echoed_prompts), 1)
    return prepared.echoed_prompts[choice.index // per_prompt] if prepared.echoed_prompts else ""


def _choice(
    choice: Choice, text: str, model: ServedModel, body: CompletionRequest, entries: Sequence[TokenLogprob]
) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        before = choice.logprobs[: len(choice.logprobs) - len(entries)]
        offset = sum(len(model.token_bytes(entry.token).decode(errors="replace")) for entry in before)
        logprobs = _logprobs(model, entries, offset)
    return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _logprobs(model: ServedModel, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The completions API's four lists; `text_offset` counts characters of the completion."""
    chosen = [_with_unique_name(token_entry(model, entry.token, entry.logprob)) for entry in entries]
    offsets = []
    for each in chosen:
        offsets.append(offset)
        offset += len(bytes(each["bytes"]).decode(errors="replace"))
    alternatives = [
        [_with_unique_name(token_entry(model, token, logprob)) for token, logprob in entry.alternatives] for entry in entries
    ]
    return {
        "tokens": [each["token"] for each in chosen],
        "token_logprobs": [each["logprob"] for each in chosen],
        "top_logprobs": [{each["token"]: each["logprob"] for each in row} for row in alternatives],
        "text_offset": offsets,
    }


def _with_unique_name(entry: dict[str, Any]) -> dict[str, Any]:
    """A token that is part of a character is named by its bytes, as in OpenAI's API: these names are keys."""
    spelling = bytes(entry["bytes"])
    name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling) if "\ufffd" in entry["token"] else entry["token"]
    return {**entry, "token": name}
