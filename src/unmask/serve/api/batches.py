"""/v1/batches: OpenAI's batches, which are answered when the engine has time.

Owns the form of the responses. A key sees the batches that were made with it; `batch_runner` answers them.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request as HttpRequest

from unmask.serve.api.files import Files, found, list_body
from unmask.serve.batch_runner import BatchRunner
from unmask.serve.clients import Owner
from unmask.serve.errors import ERROR_RESPONSES, ApiError, bad_request
from unmask.serve.exchange import CurrentState, note_ignored
from unmask.serve.file_store import MAX_OPEN_BATCHES
from unmask.serve.protocol.batches import BatchRequest

router = APIRouter()
_RETRY = {"retry-after": "60"}


@router.post("/v1/batches", responses=ERROR_RESPONSES)
async def post_batch(http: HttpRequest, body: BatchRequest, state: CurrentState, files: Files, owner: Owner) -> dict[str, Any]:
    """Answer the requests of a file."""
    note_ignored(state, http, body)
    file = found("input_file", body.input_file_id, files.file(owner, body.input_file_id))
    if file["purpose"] != "batch":
        raise bad_request(f"input_file_id: the file has the purpose {file['purpose']}; it must be batch", "input_file_id")
    if files.num_open(owner) >= MAX_OPEN_BATCHES:
        message = f"{MAX_OPEN_BATCHES} batches have not ended; wait for one, or cancel it"
        raise ApiError(429, message, code="too_many_batches", headers=_RETRY)
    if files.room <= 0:
        raise ApiError(413, "the files of this server are as large as max_stored allows; delete some", code="storage_full")
    fields = body.model_dump(include={"input_file_id", "endpoint", "completion_window", "metadata"})
    fields["expires_at"] = int(time.time()) + body.window_seconds
    expiry = body.output_expires_after
    private = {"filename": file["filename"], "output_seconds": None if expiry is None else expiry.seconds}
    batch = files.add_batch(owner, fields, private)
    _runner(http).notify()
    return batch


@router.get("/v1/batches", responses=ERROR_RESPONSES)
async def get_batches(
    files: Files, owner: Owner, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The batches of this key, newest first."""
    return list_body(files.batches(owner, after=after, limit=limit), after)


@router.get("/v1/batches/{batch_id}", responses=ERROR_RESPONSES)
async def get_batch(batch_id: str, files: Files, owner: Owner) -> dict[str, Any]:
    """How far a batch is."""
    return found("batch", batch_id, files.batch(owner, batch_id))


@router.post("/v1/batches/{batch_id}/cancel", responses=ERROR_RESPONSES)
async def cancel_batch(http: HttpRequest, batch_id: str, files: Files, owner: Owner) -> dict[str, Any]:
    """Ask no more requests of a batch; those that run are finished."""
    batch = found("batch", batch_id, files.batch(owner, batch_id))
    fields = {"status": "cancelling", "cancelling_at": int(time.time())}
    changed = files.change_batch(batch_id, fields, statuses=("validating", "in_progress", "cancelling"))
    if not changed:
        raise bad_request(f"the batch is {batch['status']}; only one that has not ended can be cancelled", "batch_id")
    _runner(http).notify()
    return found("batch", batch_id, files.batch(owner, batch_id))


def _runner(http: HttpRequest) -> BatchRunner:
    runner: BatchRunner = http.app.state.batches
    return runner
