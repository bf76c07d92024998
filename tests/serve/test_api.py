"""What all APIs share: unknown fields, keys, forms of errors, and framings of streams."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import pytest
from asking import HELLO, HTTP
from fastapi import APIRouter
from live import Live, live
from starlette.responses import Response

from unmask.engine.llm import LanguageModel
from unmask.serve import app
from unmask.serve.config import ServerConfig
from unmask.serve.errors import bad_request
from unmask.serve.event_stream import JSON_LINES, NAMED_SSE, stream_events

BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
UNKNOWN = {"verbosity": "low", "stream_options": {"tea": 1}, "tools": [], "nothing": None, "é": 1}


def _post(site: Live, body: Mapping[str, Any], path: str = "/v1/chat/completions") -> Any:
    return HTTP.post(site.url + path, json=body)


def test_unknown_fields_are_ignored_and_named(
    site: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("unmask.serve")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    with caplog.at_level(logging.INFO, "unmask.serve"):
        response = _post(site, {**BODY, **UNKNOWN, "stream": True})
        site.wait_idle()
    assert response.status_code == 200
    assert set(response.headers["x-unmask-ignored-fields"].split(",")) == {"verbosity", "\\xe9", "stream_options.tea"}
    details = next(record.__dict__["details"] for record in caplog.records if "ignored_fields" in record.__dict__["details"])
    assert "verbosity" in details["ignored_fields"]
    assert "x-unmask-ignored-fields" not in _post(site, BODY).headers


def test_our_own_section_refuses_them(site: Live) -> None:
    response = _post(site, {**BODY, "diffusion": {"thresh_old": 0.9}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "diffusion.thresh_old")


@pytest.fixture(scope="module")
def strict(tiny: LanguageModel, monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Live]:
    """A strict server with a key, and an API of its own."""
    monkeypatch_module.setattr(app, "APIS", (*app.APIS, app.Api(router, "/other/", lambda error: {"wrong": str(error)})))
    with live(tiny, ServerConfig(strict=True, api_keys=("key",))) as running:
        yield running


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


router = APIRouter()
FRAMINGS = {"named": NAMED_SSE, "lines": JSON_LINES}


@router.post("/other/{framing}/{failure}")
async def post_other(framing: str, failure: str) -> Response:
    return await stream_events(_events(failure), FRAMINGS[framing])


async def _events(failure: str) -> AsyncGenerator[dict[str, Any]]:
    if failure == "first":
        raise ZeroDivisionError
    yield {"type": "begun"}
    if failure == "bug":
        raise ZeroDivisionError
    if failure == "refusal":
        raise bad_request("no more")
    yield {"type": "done"}


@pytest.mark.parametrize("fields", [UNKNOWN, {"tools": [{"type": "function", "cache": 1, "function": {"name": "f"}}]}])
def test_a_strict_server_refuses_them(strict: Live, fields: dict[str, Any]) -> None:
    headers = {"authorization": "Bearer key"}
    response = HTTP.post(f"{strict.url}/v1/chat/completions", json={**BODY, **fields, "stream": True}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("verbosity", "tools[0].cache")


def _other(strict: Live, path: str, key: str = "key") -> Any:
    return HTTP.post(f"{strict.url}/other/{path}", json={}, headers={"x-api-key": key})


def test_errors_have_the_form_of_the_api(strict: Live) -> None:
    assert _other(strict, "named/none", key="wrong").json().keys() == {"wrong"}
    assert _other(strict, "named/none", key="wrong").status_code == 401
    missing = _other(strict, "nowhere")
    assert (missing.status_code, missing.json().keys()) == (404, {"wrong"})
    bug = _other(strict, "named/first")
    assert (bug.status_code, bug.json().keys()) == (500, {"wrong"})
    assert bug.headers["x-request-id"] in bug.json()["wrong"]


def test_framings(strict: Live) -> None:
    named = _other(strict, "named/none")
    assert named.headers["content-type"].startswith("text/event-stream")
    assert named.text == 'event: begun\ndata: {"type":"begun"}\n\nevent: done\ndata: {"type":"done"}\n\n'
    lines = _other(strict, "lines/none")
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in lines.text.splitlines()] == [{"type": "begun"}, {"type": "done"}]


def test_an_error_ends_a_stream(strict: Live) -> None:
    last = [json.loads(_other(strict, f"lines/{failure}").text.splitlines()[-1]) for failure in ("bug", "refusal")]
    assert "internal error" in last[0]["wrong"]
    assert last[1] == {"wrong": "no more"}
