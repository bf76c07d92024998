"""/v1/responses: OpenAI's Responses.

Owns its routes, and the conversations that requests refer to. `responses_writer` writes objects and events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.serve.api.answer_parts import respond_in_parts
from unmask.serve.api.responses_store import ResponseStore
from unmask.serve.api.responses_writer import ResponseWriter
from unmask.serve.clients import Owner
from unmask.serve.errors import ERROR_RESPONSES, ApiError, bad_request
from unmask.serve.event_stream import NAMED_SSE, Event
from unmask.serve.exchange import CurrentState, StateWithRoom, note_ignored
from unmask.serve.prepare_chat import prepare_chat, prompt_ids
from unmask.serve.protocol.responses import InputItem, ResponsesRequest
from unmask.serve.served_model import PreparedRequests, ServedModel

router = APIRouter()


async def _response_store(http: HttpRequest) -> ResponseStore:
    store: ResponseStore = http.app.state.responses
    return store


Stored = Annotated[ResponseStore, Depends(_response_store)]


@router.post("/v1/responses", responses=ERROR_RESPONSES, response_class=JSONResponse)
async def post_response(
    http: HttpRequest, body: ResponsesRequest, state: StateWithRoom, store: Stored, owner: Owner
) -> Response:
    """Answer a conversation, given as items."""
    note_ignored(state, http, body)
    state = state.named(body.model)
    items = _conversation(store, owner, body)
    prepared = await asyncio.to_thread(_prepared, state.model, body, items)

    def keep(response: Event) -> None:
        if body.store is not False:
            store.put(owner, response, [item.model_dump(exclude_none=True) for item in items])

    writer = ResponseWriter(body, state.model, prepared, keep)
    framing = replace(NAMED_SSE, error=writer.failed) if body.stream else None
    return await respond_in_parts(state, http, prepared, writer, framing)


@router.post("/v1/responses/input_tokens", responses=ERROR_RESPONSES)
async def post_input_tokens(
    http: HttpRequest, body: ResponsesRequest, state: CurrentState, store: Stored, owner: Owner
) -> dict[str, Any]:
    """The number of tokens that a conversation has for the model."""
    note_ignored(state, http, body)
    model = state.named(body.model).model

    def count(items: Sequence[InputItem]) -> int:
        with body.naming_fields():
            return len(prompt_ids(model, body.chat(items)))

    return {
        "object": "response.input_tokens",
        "input_tokens": await asyncio.to_thread(count, _conversation(store, owner, body)),
    }


@router.get("/v1/responses/{response_id}", responses=ERROR_RESPONSES)
async def get_response(response_id: str, store: Stored, owner: Owner) -> dict[str, Any]:
    """A response of before."""
    response = store.get(owner, response_id)
    if response is None:
        raise _no_response(response_id)
    return response


@router.delete("/v1/responses/{response_id}", responses=ERROR_RESPONSES)
async def delete_response(response_id: str, store: Stored, owner: Owner) -> dict[str, Any]:
    """Forget a response."""
    if not store.delete(owner, response_id):
        raise _no_response(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def _no_response(response_id: str) -> ApiError:
    return ApiError(404, f"response {response_id[:80]!r} is not stored here, or no longer", param="response_id")


def _conversation(store: ResponseStore, owner: str, body: ResponsesRequest) -> list[InputItem]:
    """The items of earlier responses and of the input, with references resolved.

    Raises:
        ApiError: something is not stored, or no longer.
    """
    earlier: list[dict[str, Any]] | None = []
    if body.previous_response_id is not None:
        earlier = store.conversation(owner, body.previous_response_id)
    if earlier is None:
        message = (
            f"response {str(body.previous_response_id)[:80]!r} is not stored here, or no longer; send the whole conversation"
        )
        raise bad_request(message, "previous_response_id", "previous_response_not_found")
    items = [InputItem.model_validate(item) for item in earlier]
    for index, item in enumerate(body.items):
        if item.kind != "item_reference":
            items.append(item)
            continue
        output = store.item(owner, item.id or "")
        if output is None:
            message = f"item {str(item.id)[:80]!r} is not stored here, or no longer; send the item itself"
            raise bad_request(message, f"input[{index}].id")
        items.append(InputItem.model_validate(output))
    return items


def _prepared(model: ServedModel, body: ResponsesRequest, items: Sequence[InputItem]) -> PreparedRequests:
    """The engine request; with `truncation` auto, of as many of the last items as fit the context."""
    with body.naming_fields():
        while True:
            try:
                return prepare_chat(model, body.chat(items))
            except ApiError as error:
                fewer = _truncated(items)
                if body.truncation != "auto" or error.code != "context_length_exceeded" or len(fewer) == len(items):
                    raise
                items = fewer


def _truncated(items: Sequence[InputItem]) -> list[InputItem]:
    """Items without the oldest eighth of those that are no instructions, and without outputs whose calls are gone."""
    instructions = [item for item in items if item.role in ("system", "developer")]
    others = [item for item in items if item.role not in ("system", "developer")]
    del others[: min(len(others) - 1, max(1, len(others) // 8))]
    while len(others) > 1 and others[0].kind in ("function_call_output", "reasoning"):
        del others[0]
    return [*instructions, *others]
