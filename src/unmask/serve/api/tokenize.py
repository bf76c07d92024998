"""/v1/tokenize: token ids of texts and conversations."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from unmask.serve.errors import ERROR_RESPONSES
from unmask.serve.exchange import CurrentState, note_ignored
from unmask.serve.prepare_chat import chat_ids
from unmask.serve.protocol.text import TokenizeRequest

router = APIRouter()


@router.post("/v1/tokenize", responses=ERROR_RESPONSES)
async def post_tokenize(http: HttpRequest, body: TokenizeRequest, state: CurrentState) -> dict[str, Any]:
    """Token ids of a text, or of a conversation as the model would see it."""
    note_ignored(state, http, body)
    model = state.model
    if body.model is not None:
        model.check_name(body.model)
    encode = partial(model.plain_ids, body.prompt) if body.prompt is not None else partial(chat_ids, model, body.messages or [])
    ids = await asyncio.to_thread(encode)
    return {"tokens": ids, "count": len(ids), "max_model_len": model.context}
