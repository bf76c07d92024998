"""/v1/infill: texts with holes, filled in.

Owns the form of the response.
"""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.infill import best_filling
from unmask.serve.api.choices import usage
from unmask.serve.errors import ERROR_RESPONSES
from unmask.serve.exchange import StateWithRoom, open_exchange, prepare
from unmask.serve.prepare_text import prepare_infill
from unmask.serve.protocol.text import InfillRequest

router = APIRouter()


@router.post("/v1/infill", responses=ERROR_RESPONSES, response_class=JSONResponse)
async def post_infill(http: HttpRequest, body: InfillRequest, state: StateWithRoom) -> Response:
    """Fill the holes of a text, given the text on both sides of each."""
    state = state.named(body.model)
    prepared = await prepare(state, http, body, prepare_infill)
    async with open_exchange(state, http, prepared) as exchange:
        await exchange.finish()
    completions = [choice.completion for choice in exchange.choices if choice.completion is not None]
    best = best_filling(prepared.requests, completions, state.model.tokenizer)
    about = {"object": "infill", "model": state.model.name, "usage": usage(exchange.tokens)}
    return JSONResponse({**about, **asdict(best)})
