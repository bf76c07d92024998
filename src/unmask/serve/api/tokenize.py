"""/v1/tokenize and /v1/detokenize, also without /v1 as in vLLM: token ids of texts and conversations, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from unmask.serve.errors import ERROR_RESPONSES, bad_request
from unmask.serve.exchange import CurrentState, note_ignored
from unmask.serve.prepare_chat import chat_ids
from unmask.serve.protocol.text import DetokenizeRequest, TokenizeRequest
from unmask.serve.served_model import ServedModel
from unmask.serve.tools import ToolChoice

router = APIRouter()
_CONTEXT = 16
"""Tokens, more than those that a character or the beginning of a text is made of."""


@router.post("/tokenize", include_in_schema=False)
@router.post("/v1/tokenize", responses=ERROR_RESPONSES)
async def post_tokenize(http: HttpRequest, body: TokenizeRequest, state: CurrentState) -> dict[str, Any]:
    """Token ids of a text, or of a conversation as the model would see it."""
    note_ignored(state, http, body)
    model = state.model if body.model is None else state.named(body.model).model
    ids = await asyncio.to_thread(_encode, model, body)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.context}
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(_token_strs, model, ids)
    return answer


@router.post("/detokenize", include_in_schema=False)
@router.post("/v1/detokenize", responses=ERROR_RESPONSES)
async def post_detokenize(http: HttpRequest, body: DetokenizeRequest, state: CurrentState) -> dict[str, Any]:
    """The text of token ids, control tokens spelled out."""
    note_ignored(state, http, body)
    tokenizer = (state if body.model is None else state.named(body.model)).model.tokenizer
    size = tokenizer.vocab_size
    wrong = next((index for index, token in enumerate(body.tokens) if token >= size), None)
    if wrong is not None:
        name = f"tokens[{wrong}]"
        raise bad_request(f"{name}: {body.tokens[wrong]} is no token id; it must be below {size}", name)
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special=False)}


def _token_strs(model: ServedModel, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it, of which a few decide."""
    decode = model.tokenizer.decode
    return [decode([token], skip_special=False, after=ids[max(0, index - _CONTEXT) : index]) for index, token in enumerate(ids)]


def _encode(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return model.plain_ids(body.prompt)
    functions = [tool.function for tool in body.tools or []]
    return chat_ids(model, body.messages or [], body, functions, ToolChoice("auto" if functions else "none"))
