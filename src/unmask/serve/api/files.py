"""/v1/files: OpenAI's files, which hold the requests and the answers of batches.

Owns the form of the responses. A key sees the files that were uploaded with it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse

from unmask.serve.clients import Owner
from unmask.serve.errors import ERROR_RESPONSES, ApiError, bad_request
from unmask.serve.exchange import CurrentState
from unmask.serve.file_store import FileStore, StoredPage
from unmask.serve.protocol.batches import EXPIRY_SECONDS, ExpiresAfter
from unmask.serve.upload import OVERHEAD, UploadedForm, read_form
from unmask.serve.worker import AbortedError

router = APIRouter()
PATH = "/v1/files"
_SECONDS = {"type": "string", "pattern": r"^[0-9]{4,7}$"}
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": _SECONDS,
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


async def current_files(http: HttpRequest) -> FileStore:
    """The files of the application; raises ApiError where it keeps none."""
    store: FileStore | None = http.app.state.files
    if store is None:
        raise ApiError(404, "this server keeps no files; set files to a folder when it is started", code="no_files")
    return store


Files = Annotated[FileStore, Depends(current_files)]


def found(kind: str, id_: str, stored: dict[str, Any] | None) -> dict[str, Any]:
    """What was asked for; raises ApiError where it is not there, or another's."""
    if stored is None:
        raise ApiError(404, f"no such {kind}: {id_[:80]}", param=f"{kind}_id", code="not_found")
    return stored


def list_body(page: StoredPage | None, after: str | None) -> dict[str, Any]:
    """OpenAI's list; raises ApiError where it would begin after what is not there."""
    if page is None:
        raise bad_request(f"after is {(after or '')[:80]!r}; it must be an id of this list", "after")
    ids = [each["id"] for each in page.objects]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": page.objects, **ends, "has_more": page.has_more}


@router.post(PATH, responses=ERROR_RESPONSES, openapi_extra=_BODY)
async def post_file(http: HttpRequest, state: CurrentState, files: Files, owner: Owner) -> dict[str, Any]:
    """Upload a file of requests."""
    length = http.headers.get("content-length", "")
    expected = min(int(length), state.config.max_file) if length.isdecimal() else state.config.max_file
    if expected > files.room:
        raise ApiError(413, "the files of this server are as large as max_stored allows; delete some", code="storage_full")
    with files.arriving(expected) as path:
        try:
            form = await read_form(
                http.headers["content-type"], http.stream(), path, name="file", max_bytes=min(expected, state.config.max_file)
            )
        except ClientDisconnect as error:
            raise AbortedError("upload") from error
        if form.fields.get("purpose") != "batch":
            raise bad_request(f"purpose: {form.fields.get('purpose')!r:.80}; it must be 'batch'", "purpose")
        return files.add_file(owner, path, form.filename or "", "batch", seconds=_expiry(form))


def _expiry(form: UploadedForm) -> int | None:
    given = {name: form.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds")}
    if given == {"anchor": None, "seconds": None}:
        return None
    try:
        return ExpiresAfter.model_validate(given, strict=False).seconds
    except ValidationError as error:
        least, most = EXPIRY_SECONDS
        message = f"expires_after: anchor must be created_at, and seconds from {least} to {most}"
        raise bad_request(message, "expires_after") from error


@router.get(PATH, responses=ERROR_RESPONSES)
async def get_files(
    files: Files,
    owner: Owner,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The files of this key."""
    return list_body(files.files(owner, purpose=purpose, after=after, limit=limit, ascending=order == "asc"), after)


@router.get("/v1/files/{file_id}", responses=ERROR_RESPONSES)
async def get_file(file_id: str, files: Files, owner: Owner) -> dict[str, Any]:
    """What is known of a file."""
    return found("file", file_id, files.file(owner, file_id))


@router.delete("/v1/files/{file_id}", responses=ERROR_RESPONSES)
async def delete_file(file_id: str, files: Files, owner: Owner) -> dict[str, Any]:
    """Delete a file that no batch asks from."""
    found("file", file_id, files.file(owner, file_id))
    batch_id = files.using(file_id)
    if batch_id is not None:
        raise bad_request(f"{batch_id} asks the requests of this file; cancel it, or wait", "file_id", "in_use")
    files.delete_file(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/v1/files/{file_id}/content", responses=ERROR_RESPONSES, response_class=FileResponse)
async def get_content(file_id: str, files: Files, owner: Owner) -> FileResponse:
    """The content of a file."""
    stored = found("file", file_id, files.file(owner, file_id))
    path = files.content(file_id)
    if not path.exists():
        raise ApiError(404, f"the content of {file_id} is gone", param="file_id", code="not_found")
    return FileResponse(path, media_type="application/octet-stream", filename=stored["filename"])


def max_body(max_file: int) -> int:
    """Bytes of a form that holds a file of at most so many."""
    return max_file + OVERHEAD
