"""What gateways ask of a worker beside the API: /health_generate, /version, and SGLang's descriptions of model and server."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter

from unmask import __version__
from unmask.serve.errors import COMMON_ERROR_RESPONSES, ERROR_RESPONSES, ApiError
from unmask.serve.exchange import CurrentState

router = APIRouter()
PROBE_SECONDS = 20.0
"""How long /health_generate waits for a token."""
_PROBE_PRIORITY = -(2**20)


@router.get("/health_generate", responses={**COMMON_ERROR_RESPONSES, 503: ERROR_RESPONSES[503]})
async def get_health_generate(state: CurrentState) -> dict[str, str]:
    """The engine decides tokens: one of a prompt of its own, or of any other request meanwhile."""
    worker, before, submission = state.worker, state.worker.num_updates, None
    try:
        submission = worker.submit([state.model.probe(_PROBE_PRIORITY)])
    except ApiError as error:
        if error.status != 429:  # a full queue: others' tokens tell
            raise
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS):
                while worker.num_updates == before and (submission is None or submission.unfinished):
                    await asyncio.sleep(0.005)
    finally:
        if submission is not None:
            submission.abort("probe")
    if worker.num_updates == before:
        raise ApiError(503, f"the engine has decided no token in {PROBE_SECONDS:g} s", code="unhealthy")
    return {"status": "ok"}


@router.get("/get_model_info", responses=COMMON_ERROR_RESPONSES)
@router.get("/model_info", include_in_schema=False)
async def get_model_info(state: CurrentState) -> dict[str, Any]:
    """The model, with SGLang's names."""
    model, config = state.model, state.model.language_model.config
    return {
        "model_path": model.name,
        "tokenizer_path": model.name,
        "served_model_name": model.name,
        "is_generation": True,
        "model_type": config.family,
        "max_context_length": model.context,
        "vocab_size": config.vocab_size,
        "eos_token_ids": sorted(config.eos_ids),
        "weight_version": "default",
    }


@router.get("/server_info", responses=COMMON_ERROR_RESPONSES)
@router.get("/get_server_info", include_in_schema=False)
async def get_server_info(state: CurrentState) -> dict[str, Any]:
    """Sizes and load of the server, with SGLang's names."""
    engine = state.worker.engine
    return {
        "model_path": state.model.name,
        "served_model_name": state.model.name,
        "version": __version__,
        "status": state.worker.state,
        "tp_size": 1,
        "dp_size": 1,
        "context_length": state.model.context,
        "page_size": engine.cache_block_size,
        "max_total_num_tokens": engine.cache_block_size * engine.pool.num_cache_blocks,
        "max_running_requests": engine.scheduler.max_num_seqs,
        "max_queued_requests": state.config.max_queue,
        "num_running_reqs": len(engine.scheduler.running),
        "num_waiting_reqs": len(engine.scheduler.waiting),
    }


@router.get("/version", responses=COMMON_ERROR_RESPONSES)
async def get_version() -> dict[str, str]:
    """The version of this package."""
    return {"version": __version__}
