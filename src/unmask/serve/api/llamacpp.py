"""llama.cpp's /infill, which editors' plugins call while somebody types.

Owns the lengths that are tried, and the form of the response and of its stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.errors import UnmaskError
from unmask.serve.api.choices import mean_logprob
from unmask.serve.choice import Choice
from unmask.serve.errors import ERROR_RESPONSES, bad_request
from unmask.serve.event_stream import SSE, Event, Framing, stream_events
from unmask.serve.exchange import AppState, Exchange, StateWithRoom, open_exchange, prepare
from unmask.serve.prepare_text import prepare_completion
from unmask.serve.protocol.llamacpp import LlamaInfillRequest
from unmask.serve.served_model import PreparedRequests, ServedModel

router = APIRouter()
LENGTHS = (4, 8, 16, 32, 64)
"""Tokens of a hole that are tried, up to `n_predict`: a diffusion model fills a hole whole, and does not end early."""
_CONTROL = 8
"""Room for control tokens in a prompt."""
_FRAMING = Framing(SSE.media_type, SSE.frame)


@router.post("/infill", responses=ERROR_RESPONSES, response_class=JSONResponse)
async def post_llama_infill(http: HttpRequest, body: LlamaInfillRequest, state: StateWithRoom) -> Response:
    """Fill in what stands between a prefix and a suffix; a model that is not served here is the base, as it was not chosen."""
    if body.model is not None and state.adapters.find(body.model) is not None:
        state = state.named(body.model)
    if body.n_predict == 0 or not (body.prefix or body.input_suffix):
        return JSONResponse({"content": "", "stop": True, "model": state.model.name, "tokens_predicted": 0})
    prepared = await prepare(state, http, body, _prepare)
    if body.stream:
        return await stream_events(_events(state, http, body, prepared), _FRAMING)
    async with open_exchange(state, http, prepared) as exchange:
        await exchange.finish()
    choice = max(exchange.choices, key=mean_logprob)
    return JSONResponse(_selected(_end(state.model.name, exchange, choice) | {"content": choice.text}, body.response_fields))


def _prepare(model: ServedModel, body: LlamaInfillRequest) -> PreparedRequests:
    """One engine request, or one per length of the hole; a prefix that is too long loses its beginning."""
    most = body.n_predict if body.n_predict > 0 else LENGTHS[-1]
    fills = bool(body.input_suffix) and model.language_model.capabilities.infill
    lengths = [length for length in LENGTHS if fills and length <= most] or [most]
    try:
        before, after = (model.tokenizer.encode(text) for text in (body.prefix, body.input_suffix))
    except UnmaskError as error:
        raise bad_request(str(error), "input_prefix") from error
    if not fills:  # what a hole does not see, filling leaves out itself, of the suffix too
        before = before[-max(model.context - most - len(after) - _CONTROL, 1) :]
    if not body.input_suffix:
        before = [*model.tokenizer.prefix_ids, *before]  # filling adds them itself
    bodies = [body.to_completion(model.name, before, length) for length in lengths]
    prepared = [prepare_completion(model, each) for each in bodies]
    return PreparedRequests([request for each in prepared for request in each.requests], prepared[0].prompt_tokens)


async def _events(
    state: AppState, http: HttpRequest, body: LlamaInfillRequest, prepared: PreparedRequests
) -> AsyncGenerator[Event]:
    """Text as it becomes final; where several lengths are tried, all of the likeliest at the end."""
    about = {"index": 0, "stop": False, "model": state.model.name}
    async with open_exchange(state, http, prepared) as exchange:
        async for batch in exchange.deltas():
            for _, delta, _ in batch:
                if delta.text and len(exchange.choices) == 1:
                    yield {**about, "content": delta.text}
        choice = max(exchange.choices, key=mean_logprob)
        if len(exchange.choices) > 1:
            yield {**about, "content": choice.text}
        yield _selected(_end(state.model.name, exchange, choice), body.response_fields)


def _end(model: str, exchange: Exchange, choice: Choice) -> dict[str, Any]:
    """Why a text ends and what it cost."""
    completion, prompt = choice.completion, exchange.tokens.prompt
    assert completion is not None
    count, milliseconds = len(completion.ids), (completion.costs.prefill_seconds * 1e3, completion.costs.denoise_seconds * 1e3)
    ended = "limit" if completion.finish_reason == "length" else "eos" if completion.stop is None else "word"
    parts = zip(("prompt", "predicted"), (prompt, count), milliseconds, strict=True)
    timings = {
        f"{name}_{unit}": round(value, 3)
        for name, tokens, took in parts
        for unit, value in (
            ("n", tokens),
            ("ms", took),
            ("per_token_ms", took / max(tokens, 1)),
            ("per_second", tokens / max(took / 1e3, 1e-6)),
        )
    }
    return {
        "index": 0,
        "content": "",
        "id_slot": 0,
        "stop": True,
        "model": model,
        "tokens_predicted": count,
        "tokens_evaluated": prompt,
        "tokens_cached": exchange.tokens.cached,
        "truncated": False,
        "has_new_line": "\n" in choice.text,
        "stop_type": ended,
        "stopping_word": completion.stop or "",
        "timings": timings,
    }


def _selected(answer: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The fields that a client wants, those of `timings` by their path; all without a list."""
    flat = answer | {f"timings/{name}": value for name, value in answer["timings"].items()}
    return answer if names is None else {name: flat[name] for name in names if name in flat}
