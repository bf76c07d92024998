"""Ollama's API: /api/chat and /api/generate, and what its clients ask about the model.

Owns the form of the responses, of the stream (a JSON object per line) and of errors. Bodies are translated into our own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.quantization import BITS
from unmask.engine.request import TokenLogprob
from unmask.models.dtypes import parse_dtype
from unmask.serve.choice import Choice, logprob_entry
from unmask.serve.errors import OTHER_ERROR_RESPONSES, ApiError, bad_request
from unmask.serve.event_stream import JSON_LINES, Event, stream_events
from unmask.serve.exchange import AppState, CurrentState, Exchange, StateWithRoom, open_exchange, prepare
from unmask.serve.prepare_chat import prepare_chat
from unmask.serve.prepare_text import prepare_completion
from unmask.serve.protocol.messages import ToolCall
from unmask.serve.protocol.ollama import LATEST, OllamaChatRequest, OllamaGenerateRequest, OllamaModelRequest, OllamaRequest
from unmask.serve.served_model import PreparedRequests, ServedModel

router = APIRouter()
VERSION = "0.12.11"
"""Of Ollama's API as it is spoken here; clients refuse older servers."""
_RESPONSES: dict[int | str, dict[str, Any]] = {**OTHER_ERROR_RESPONSES, 200: {"content": {JSON_LINES.media_type: {}}}}


def ollama_error(error: ApiError) -> dict[str, Any]:
    """Ollama's error object."""
    return {"error": str(error)}


@router.post("/api/chat", responses=_RESPONSES, response_class=JSONResponse)
async def post_chat(http: HttpRequest, body: OllamaChatRequest, state: StateWithRoom) -> Response:
    """Answer a conversation; without messages, load or unload the model, which is always there."""
    return await _respond(state, http, body, _chat_message, _prepare_chat if body.messages else None)


@router.post("/api/generate", responses=_RESPONSES, response_class=JSONResponse)
async def post_generate(http: HttpRequest, body: OllamaGenerateRequest, state: StateWithRoom) -> Response:
    """Answer a prompt, continue it (`raw`), or fill in what stands between it and a suffix."""
    return await _respond(state, http, body, _response_text, _prepare_generate if body.prompt or body.suffix else None)


@router.get("/api/tags", responses=OTHER_ERROR_RESPONSES)
async def get_tags(state: CurrentState) -> dict[str, Any]:
    """The served model, and with its adapters."""
    return {"models": [_listed(model) for model in (state.model, *state.adapters.models)]}


@router.get("/api/ps", responses=OTHER_ERROR_RESPONSES)
async def get_ps(state: CurrentState) -> dict[str, Any]:
    """The loaded models: the same."""
    loaded = {"expires_at": "2318-01-01T00:00:00Z", "size_vram": 0, "context_length": state.model.context}
    return {"models": [{**_listed(model), **loaded} for model in (state.model, *state.adapters.models)]}


@router.get("/api/version", responses=OTHER_ERROR_RESPONSES)
async def get_version() -> dict[str, str]:
    """The version of the API."""
    return {"version": VERSION}


@router.post("/api/show", responses=OTHER_ERROR_RESPONSES)
async def post_show(body: OllamaModelRequest, state: CurrentState) -> dict[str, Any]:
    """What is known about the model."""
    model = _named(state, body.model or body.name).model
    config = model.language_model.config
    sizes = {
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "vocab_size": config.vocab_size,
    }
    about = {f"{config.family}.{name}": value for name, value in sizes.items()}
    count = model.language_model.num_parameters
    return {
        "modelfile": f"FROM {model.name}",
        "parameters": "",
        "template": model.tokenizer.chat_template,
        "details": _details(model),
        "model_info": {"general.architecture": config.family, "general.parameter_count": count, **about},
        "capabilities": ["completion", *(["tools"] if model.tokenizer.has_chat_template else [])],
        "modified_at": _time(model.created),
    }


@router.post("/api/embed", responses=OTHER_ERROR_RESPONSES)
@router.post("/api/embeddings", responses=OTHER_ERROR_RESPONSES)
async def post_embed(body: OllamaModelRequest, state: CurrentState) -> Response:
    """Refuses: there are no embeddings here."""
    _named(state, body.model or body.name)
    raise bad_request("this model does not support embeddings; it generates text only")


def _prepare_chat(model: ServedModel, body: OllamaChatRequest) -> PreparedRequests:
    return prepare_chat(model, body.to_chat(model.name))


def _prepare_generate(model: ServedModel, body: OllamaGenerateRequest) -> PreparedRequests:
    if body.raw or body.suffix or not model.tokenizer.has_chat_template:
        return prepare_completion(model, body.to_completion(model.name), default_tokens=model.config.max_tokens)
    return prepare_chat(model, body.to_chat(model.name))


_Write = Callable[[str, Sequence[ToolCall]], dict[str, Any]]


def _chat_message(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        functions = [{"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in calls]
        message["tool_calls"] = [{"function": {"index": i, **function}} for i, function in enumerate(functions)]
    return {"message": message}


def _response_text(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    return {"response": text}


@dataclass(frozen=True)
class _Writer:
    """Writes the parts of an answer.

    Attributes:
        model: the served one.
        name: of the model, as the client spells it.
        write: the fields that hold text and tool calls.
        with_logprobs: of the tokens, in OpenAI's form.
    """

    model: ServedModel
    name: str
    write: _Write
    with_logprobs: bool

    def part(self, text: str = "", calls: Sequence[ToolCall] = (), logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """Text, or complete tool calls."""
        entries = {"logprobs": [logprob_entry(self.model, entry) for entry in logprobs]} if self.with_logprobs else {}
        return {"model": self.name, "created_at": _time(), **self.write(text, calls), **entries, "done": False}

    def end(self, exchange: Exchange, **parts: Any) -> dict[str, Any]:
        """The last part, or the whole answer: why it ends, and what it cost."""
        (choice,) = exchange.choices
        assert choice.completion is not None
        costs, tokens = choice.completion.costs, exchange.tokens
        reason = {"done": True, "done_reason": choice.completion.finish_reason}
        counts = {"prompt_eval_count": tokens.prompt, "eval_count": tokens.completion}
        seconds = {
            "total_duration": exchange.seconds,
            "load_duration": costs.queue_seconds,
            "prompt_eval_duration": costs.prefill_seconds,
            "eval_duration": costs.denoise_seconds,
        }
        durations = {name: max(1, round(value * 1e9)) for name, value in seconds.items()}
        return {**self.part(**parts), **reason, **durations, **counts}


async def _respond(
    state: AppState,
    http: HttpRequest,
    body: OllamaRequest,
    write: _Write,
    prepare_body: Callable[[ServedModel, Any], PreparedRequests] | None,
) -> Response:
    state = _named(state, body.model)
    writer = _Writer(state.model, body.model, write, bool(body.logprobs))
    if prepare_body is None:
        return JSONResponse({**writer.part(), "done": True, "done_reason": "unload" if body.unloads else "load"})
    prepared = await prepare(state, http, body, prepare_body)
    if body.stream is not False:
        return await stream_events(_events(state, http, prepared, writer), JSON_LINES)
    async with open_exchange(state, http, prepared) as exchange:
        await exchange.finish()
    (choice,) = exchange.choices
    return JSONResponse(writer.end(exchange, text=choice.text, calls=_complete(choice), logprobs=choice.logprobs))


async def _events(state: AppState, http: HttpRequest, prepared: PreparedRequests, writer: _Writer) -> AsyncGenerator[Event]:
    async with open_exchange(state, http, prepared) as exchange:
        async for batch in exchange.deltas():
            for _, delta, _ in batch:
                if delta.text or delta.logprobs:
                    yield writer.part(delta.text, logprobs=delta.logprobs)
        (choice,) = exchange.choices
        if calls := _complete(choice):
            yield writer.part(calls=calls)
        yield writer.end(exchange)


def _complete(choice: Choice) -> list[ToolCall]:
    """The tool calls of an answer, without one that its end has cut off: Ollama's arguments are objects."""
    return [call for call in choice.tool_calls if _is_json(call.function.arguments)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _named(state: AppState, name: str) -> AppState:
    """As `AppState.named`; a name of the base may have the tag `latest`, or not have it."""
    known = {each.removesuffix(LATEST): each for each in reversed(state.model.names)}
    return state.named(known.get(name.removesuffix(LATEST), name))


def _listed(model: ServedModel) -> dict[str, Any]:
    language_model = model.language_model
    dtype = language_model.weights_dtype
    bits = BITS.get(dtype) or 8 * parse_dtype(dtype).itemsize
    name = model.name if ":" in model.name else model.name + LATEST
    return {
        "name": name,
        "model": name,
        "modified_at": _time(model.created),
        "size": language_model.num_parameters * bits // 8,
        "digest": sha256(model.name.encode()).hexdigest(),
        "details": _details(model),
    }


def _details(model: ServedModel) -> dict[str, Any]:
    language_model = model.language_model
    count, family = language_model.num_parameters, language_model.config.family
    return {
        "parent_model": "" if model.parent is None else model.parent.name,
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M",
        "quantization_level": language_model.weights_dtype,
    }


def _time(seconds: float | None = None) -> str:
    """A time as Ollama writes it; default: now."""
    time = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return time.isoformat().replace("+00:00", "Z")
