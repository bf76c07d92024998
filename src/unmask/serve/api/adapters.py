"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from unmask.serve.adapters import updates_off
from unmask.serve.clients import admin_only
from unmask.serve.errors import ERROR_RESPONSES
from unmask.serve.exchange import CurrentState, note_ignored
from unmask.serve.protocol.fields import Body

router = APIRouter(dependencies=[Depends(admin_only)])
# `Response` has no media type: errors are then documented as the JSON that they are.
_RESPONSES = {**ERROR_RESPONSES, 200: {"description": "Done", "content": {"text/plain": {"schema": {"type": "string"}}}}}


class LoadAdapterRequest(Body):
    """Body of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(Body):
    """Body of /v1/unload_lora_adapter; vLLM's number of an adapter has no meaning here."""

    lora_name: str
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", responses=_RESPONSES, response_class=Response)
async def post_load(http: HttpRequest, body: LoadAdapterRequest, state: CurrentState) -> PlainTextResponse:
    """Serve an adapter of the server's folder of adapters."""
    note_ignored(state, http, body)
    if state.config.lora_folder is None:
        raise updates_off()
    await state.adapters.load(body.lora_name, body.lora_path, replace=body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=_RESPONSES, response_class=Response)
async def post_unload(http: HttpRequest, body: UnloadAdapterRequest, state: CurrentState) -> PlainTextResponse:
    """Serve an adapter no longer; requests that run keep it until they end."""
    note_ignored(state, http, body)
    if state.config.lora_folder is None:
        raise updates_off()
    state.adapters.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
