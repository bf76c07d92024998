"""What a client is told when something is wrong: the status, OpenAI's error object, and the field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from asking import HELLO, HTTP, connect, connect_async
from live import CONTEXT, Live, live, served_model
from openai import OpenAI

from unmask.serve.config import ServerConfig

CHAT, COMPLETIONS = "/chat/completions", "/completions"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"temperature": 3}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"top_p": 1.5}, "top_p"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 129}, "n"),
    (CHAT, {"n": 1.5}, "n"),
    (CHAT, {"seed": 2**70}, "seed"),
    (CHAT, {"seed": "one"}, "seed"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -2}, "max_completion_tokens"),
    (CHAT, {"max_tokens": True}, "max_tokens"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"stop": ["a"] * 17}, "stop"),
    (CHAT, {"stop": ["a", ""]}, "stop[1]"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": 2}, "logprobs"),
    (CHAT, {"logit_bias": {"a": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias"),
    (CHAT, {"logit_bias": {"99999": 1}}, "logit_bias"),
    (CHAT, {"frequency_penalty": 2.5}, "frequency_penalty"),
    (CHAT, {"presence_penalty": -3}, "presence_penalty"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        "response_format.json_schema.schema",
    ),
    (CHAT, {"response_format": {"type": "json_object"}, "diffusion": {"edit_threshold": 0.5}}, "response_format"),
    (CHAT, {"diffusion": {"threshold": 2}}, "diffusion.threshold"),
    (CHAT, {"diffusion": {"preset": "slow"}}, "diffusion.preset"),
    (CHAT, {"diffusion": {"policy": "luck"}}, "diffusion.policy"),
    (CHAT, {"diffusion": {"window": 2}}, "diffusion.window"),
    (CHAT, {"max_tokens": 4, "diffusion": {"min_new_tokens": 5}}, "diffusion.min_new_tokens"),
    (CHAT, {"diffusion": {"blocks": 2}}, "diffusion.blocks"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"min_p": 1.1}, "min_p"),
    (CHAT, {"prompt": "Hello"}, "prompt"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"modalities": ["audio"]}, "modalities[0]"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [*HELLO, {"role": "robot", "content": "a"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 2 * CONTEXT}]}, "messages"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [], "stream": True}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [99999]}, "prompt"),
    (COMPLETIONS, {"prompt": "x" * 2 * CONTEXT}, "prompt"),
    (COMPLETIONS, {"best_of": 1, "n": 2}, "best_of"),
    (COMPLETIONS, {"suffix": "b", "echo": True, "logprobs": 1}, "suffix"),
    (COMPLETIONS, {"suffix": "b", "max_tokens": 200}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"messages": HELLO}, "messages"),
]


@pytest.mark.parametrize(
    ("path", "fields", "param"), WRONG, ids=lambda value: None if isinstance(value, str) else str(value)[:40]
)
def test_the_field_at_fault_is_named(client: OpenAI, path: str, fields: dict[str, Any], param: str) -> None:
    usual: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body={"model": "tiny", **usual, **fields}, cast_to=object)
    error = caught.value
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert set(error.body) == {"message", "type", "param", "code"}
    assert "\n" not in error.body["message"]
    assert len(error.body["message"]) < 400


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (CHAT, "model"), (COMPLETIONS, "prompt"), ("/infill", "text")])
def test_a_missing_field_is_named(client: OpenAI, path: str, field: str) -> None:
    body = {
        "model": "tiny",
        **({"messages": HELLO} if path == CHAT else {"prompt": "a"} if path == COMPLETIONS else {"text": "_"}),
    }
    del body[field]
    with pytest.raises(openai.BadRequestError, match="missing") as caught:
        client.post(path, body=body, cast_to=object)
    assert caught.value.param == field


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_says_how_long(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=CONTEXT, stream=stream)
    count = client.post("/tokenize", body={"messages": HELLO}, cast_to=object)["count"]
    assert caught.value.code == "context_length_exceeded"
    assert f"({count} in the messages, {CONTEXT} in the completion)" in caught.value.body["message"]


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'tiny'") as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def _error(answer: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return error


def test_other_paths_and_methods(site: Live) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/page/../served.py", 404),
    ):
        answer = HTTP.request(method, site.url + path)
        assert answer.status_code == status
        assert _error(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_that_is_not_declared_json(site: Live, kind: str | None) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO})
    answer = HTTP.post(f"{site.url}/v1/chat/completions", content=body, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 415
    assert "application/json" in _error(answer)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"5", b'{"model": NaN}', b"\xff\xfe", b'{"model": "a"} x'])
def test_a_body_that_is_not_an_object(site: Live, body: bytes) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    answer = HTTP.post(f"{site.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert _error(answer)["message"]


def test_a_body_that_is_too_large(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 100

    with live(served_model(tmp_path), ServerConfig(max_body=2000)) as site:
        headers = {"content-type": "application/json"}
        for content in (b" " * 2001, parts()):
            answer = HTTP.post(f"{site.url}/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
            assert "2000 bytes" in _error(answer)["message"]
        with connect(site.url) as client:
            fitting = {"model": "tiny", "prompt": "a" * 100, "max_tokens": 1, "user": ""}
            fitting["user"] = "u" * (2000 - len(json.dumps(fitting, separators=(",", ":"))))
            assert client.post("/completions", body=fitting, cast_to=object)["usage"]["completion_tokens"] == 1


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A slow server with one place and nothing to wait in, which gives a request two seconds."""
    model = served_model(tmp_path_factory.mktemp("busy"), seconds=0.05)
    with live(model, ServerConfig(max_concurrent=1, max_queue=0, timeout=2.0)) as running:
        yield running
        running.wait_idle()


def test_a_full_queue(busy: Live) -> None:
    async def crowd() -> list[Any]:
        async with connect_async(busy.url) as client:
            asked = [client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8) for _ in range(4)]
            return await asyncio.gather(*asked, return_exceptions=True)

    refused = [each for each in asyncio.run(crowd()) if isinstance(each, Exception)]
    assert len(refused) == 3, "one of them was served"
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert (error.type, error.code) == ("rate_limit_error", "queue_full")
        assert int(error.response.headers["retry-after"]) >= 1
    busy.wait_idle()


def test_the_client_waits_and_tries_again(busy: Live) -> None:
    """As it does by itself, after as long as it was told."""

    async def crowd() -> list[Any]:
        async with connect_async(busy.url) as client:
            patient = client.with_options(max_retries=9)
            asked = [patient.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4) for _ in range(2)]
            return await asyncio.gather(*asked)

    assert [answer.usage.completion_tokens for answer in asyncio.run(crowd())] == [4, 4]
    busy.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(busy: Live, stream: bool) -> None:
    with connect(busy.url, max_retries=2) as client:
        with pytest.raises(openai.APIError, match="timeout") as caught:
            list(
                client.chat.completions.create(
                    model="tiny", messages=HELLO, max_tokens=200, stream=stream, extra_body={"diffusion": {"threshold": 1.0}}
                )
            )
        assert caught.value.code == "timeout"
        if not stream:
            assert caught.value.status_code == 504
    busy.wait_idle()
    assert busy.worker.num_requests == 0
