"""/v1/messages: Anthropic's Messages.

Owns its routes, errors and model objects. `anthropic_writer` writes messages and events.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.serve.api.answer_parts import respond_in_parts
from unmask.serve.api.anthropic_writer import MessageWriter
from unmask.serve.errors import OTHER_ERROR_RESPONSES, ApiError
from unmask.serve.event_stream import NAMED_SSE
from unmask.serve.exchange import CurrentState, StateWithRoom, note_ignored, prepare
from unmask.serve.prepare_chat import prepare_chat, prompt_ids
from unmask.serve.protocol.anthropic import CountTokensRequest, MessagesRequest
from unmask.serve.served_model import PreparedRequests, ServedModel

VERSION_HEADER = "anthropic-version"
"""Clients of Anthropic's API send it with every request."""
router = APIRouter()
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object, which is also the event `error` of a stream."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def model_info(model: ServedModel) -> dict[str, Any]:
    """Anthropic's model object."""
    created = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return {
        "id": model.name,
        "type": "model",
        "display_name": model.name,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": model.context - 1,
        "max_tokens": model.context - 1,
    }


def model_page(*models: ServedModel) -> dict[str, Any]:
    """Anthropic's list of models."""
    data = [model_info(model) for model in models]
    return {"data": data, "has_more": False, "first_id": models[0].name, "last_id": models[-1].name}


@router.post("/v1/messages", responses=OTHER_ERROR_RESPONSES, response_class=JSONResponse)
async def post_messages(http: HttpRequest, body: MessagesRequest, state: StateWithRoom) -> Response:
    """Answer a conversation."""
    state = state.named(body.model)
    prepared = await prepare(state, http, body, _prepared)
    writer = MessageWriter(body, state.model, prepared)
    return await respond_in_parts(state, http, prepared, writer, NAMED_SSE if body.stream else None)


@router.post("/v1/messages/count_tokens", responses=OTHER_ERROR_RESPONSES)
async def post_count_tokens(http: HttpRequest, body: CountTokensRequest, state: CurrentState) -> dict[str, int]:
    """The number of tokens that a conversation has for the model."""
    note_ignored(state, http, body)
    return {"input_tokens": await asyncio.to_thread(_num_tokens, state.named(body.model).model, body)}


def _prepared(model: ServedModel, body: MessagesRequest) -> PreparedRequests:
    """The engine request. `max_tokens` is a limit that may exceed what the context leaves, as clients have large defaults."""
    with body.naming_fields():
        chat = body.chat().model_copy(update={"max_completion_tokens": None})
        return prepare_chat(model, chat, default_tokens=body.max_tokens)


def _num_tokens(model: ServedModel, body: CountTokensRequest) -> int:
    with body.naming_fields():
        return len(prompt_ids(model, body.chat()))
