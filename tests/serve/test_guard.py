"""Who may come in, what is counted and what is logged."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from asking import HELLO, HTTP, connect
from live import Live, live

from helpers import refused
from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError
from unmask.serve.config import ServerConfig
from unmask.serve.logs import JsonLines, TextLines

SECRET = "jumps over the lazy"
OTHERS = "others"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}


@pytest.fixture(scope="module")
def locked(tiny: LanguageModel) -> Iterator[Live]:
    """A server with two keys and a friend."""
    with live(tiny, ServerConfig(api_keys=("first", "second"), allow_origins=("https://friend.example",))) as running:
        yield running


def _status(site: Live, path: str, method: str = "GET", **headers: str) -> int:
    return HTTP.request(method, site.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()}).status_code


@pytest.mark.parametrize("key", ["first", "second"])
def test_every_key_opens(locked: Live, key: str) -> None:
    with connect(locked.url, api_key=key) as client:
        assert client.chat.completions.create(**CHAT).usage.completion_tokens == 4
        assert len(list(client.chat.completions.create(**CHAT, stream=True))) > 1


@pytest.mark.parametrize("key", ["third", "firs", "first2", "First", "first,second"])
def test_a_wrong_key(locked: Live, key: str) -> None:
    with connect(locked.url, api_key=key) as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert (caught.value.type, caught.value.code) == ("authentication_error", "invalid_api_key")
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert "first" not in caught.value.body["message"]


@pytest.mark.parametrize("given", ["", "first", "Basic first", "Bearer", "Bearer \u00e9", "Bearer Bearer first"])
def test_what_is_no_key(locked: Live, given: str) -> None:
    answer = HTTP.get(f"{locked.url}/v1/models", headers={"authorization": given.encode()})
    assert answer.status_code == 401


def test_the_scheme_is_read_as_http_says(locked: Live) -> None:
    assert _status(locked, "/v1/models", authorization="bearer first") == 200


def test_what_needs_a_key_and_what_does_not(locked: Live) -> None:
    for path in ("/", "/health", "/ready"):
        assert _status(locked, path) == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/models/tiny", "/nothing"):
        assert _status(locked, path) == 401
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/infill", "/v1/tokenize"):
        assert _status(locked, path, "POST", content_type="application/json") == 401


@pytest.mark.parametrize("key", ["", " first", "fir\u00e9st"])
def test_a_key_that_nobody_could_send(key: str) -> None:
    with refused(ConfigError, "api_keys"):
        ServerConfig(api_keys=(key,))


def test_on_loopback_without_keys_only_loopback_names_are_served(site: Live) -> None:
    port = site.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", "[::1]:80"):
        assert _status(site, "/v1/models", host=host) == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example:80"):
        assert _status(site, "/v1/models", host=host) == 403
        assert _status(site, "/", host=host) == 403


def test_with_keys_or_a_list_other_names_are_served(locked: Live, tiny: LanguageModel) -> None:
    assert _status(locked, "/v1/models", host="model.example", authorization="Bearer first") == 200
    with live(tiny, ServerConfig(allow_hosts=("model.example", "127.0.0.1"))) as site:
        assert _status(site, "/v1/models", host="model.example:443") == 200
        assert _status(site, "/v1/models", host="localhost") == 403


def test_other_sites_may_not_use_it(site: Live) -> None:
    own = site.url
    assert _status(site, "/v1/models", origin=own) == 200
    for origin in ("https://evil.example", "null", own.replace("127.0.0.1", "localhost"), f"{own}0"):
        answer = HTTP.post(f"{own}/v1/chat/completions", json=CHAT, headers={"origin": origin})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin"
        assert "access-control-allow-origin" not in answer.headers
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = HTTP.options(f"{own}/v1/chat/completions", headers=preflight)
    assert answer.status_code in (403, 405)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_site_that_was_allowed(locked: Live) -> None:
    headers = {"origin": "https://friend.example", "authorization": "Bearer first"}
    answer = HTTP.post(f"{locked.url}/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = HTTP.options(f"{locked.url}/v1/chat/completions", headers={"origin": "https://friend.example", **asked})
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    refused = HTTP.options(f"{locked.url}/v1/chat/completions", headers={"origin": "https://evil.example", **asked})
    assert "access-control-allow-origin" not in refused.headers
    assert HTTP.get(f"{locked.url}/v1/models", headers={**headers, "origin": "https://evil.example"}).status_code == 403


def test_any_site_where_all_are_allowed(tiny: LanguageModel) -> None:
    with live(tiny, ServerConfig(allow_origins=("*",))) as site:
        answer = HTTP.get(f"{site.url}/v1/models", headers={"origin": "https://anyone.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


def test_health_and_readiness(site: Live) -> None:
    assert HTTP.get(f"{site.url}/health").json() == {"status": "ok"}
    assert HTTP.get(f"{site.url}/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 64])
def test_a_request_id_is_kept(site: Live, given: str) -> None:
    assert HTTP.get(f"{site.url}/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "<script>"])
def test_a_request_id_that_is_none_is_replaced(site: Live, given: str) -> None:
    ids = {HTTP.get(f"{site.url}/health", headers={"x-request-id": given}).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert given not in ids


def test_every_answer_has_an_id_and_keeps_its_type(site: Live) -> None:
    with connect(site.url) as client:
        streamed = client.chat.completions.with_raw_response.create(**CHAT, stream=True)
        plain = client.chat.completions.create(**CHAT)
    assert plain._request_id
    assert streamed.headers["x-request-id"]
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["cache-control"] == "no-cache"
    assert streamed.headers["x-content-type-options"] == "nosniff"


@contextmanager
def _logged(formatter: logging.Formatter, level: int = logging.INFO) -> Iterator[io.StringIO]:
    """What the server writes in a form."""
    log, stream = logging.getLogger("unmask.serve"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield stream
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _ask_all(url: str) -> str:
    """One request of every kind, "one" and others of the same id; the text of an answer."""
    with connect(url, default_headers={"x-request-id": OTHERS}) as client:
        text = client.chat.completions.create(**CHAT, extra_headers={"x-request-id": "one"}).choices[0].message.content
        list(client.chat.completions.create(**CHAT, stream=True))
        client.completions.create(model="tiny", prompt=SECRET, max_tokens=4)
        client.post("/infill", body={"model": "tiny", "text": f"{SECRET} ___"}, cast_to=object)
        client.post("/tokenize", body={"prompt": SECRET}, cast_to=object)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**CHAT, temperature=9)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": SECRET * 200}])
    return text or ""


def test_a_line_for_every_request_and_no_text_in_it(tiny: LanguageModel) -> None:
    with _logged(JsonLines(), logging.DEBUG) as stream, live(tiny) as site:
        _ask_all(site.url)
        HTTP.get(f"{site.url}/health")
        site.wait_idle()
    written = stream.getvalue()
    assert SECRET not in written
    lines = [line for line in map(json.loads, written.splitlines()) if line["message"] == "request"]
    (first,) = [line for line in lines if line["request_id"] == "one"]
    assert (first["level"], first["method"], first["path"], first["status"]) == ("info", "POST", "/v1/chat/completions", 200)
    assert (first["completion_tokens"], first["finish_reasons"]) == (4, ["length"])
    assert first["prompt_tokens"] == len(tiny.tokenizer.chat(CHAT["messages"], add_generation_prompt=True))
    assert first["forwards"] >= 1
    for name in ("total_seconds", "first_token_seconds", "queue_seconds", "tokens_per_second", "tokens_per_forward"):
        assert first[name] >= 0
    # Not by their path: a site of another test, in this process, may still tell of its last request.
    statuses = [line["status"] for line in lines if line["request_id"] in ("one", OTHERS)]
    assert sorted(statuses) == [200] * 5 + [400] * 2
    assert {line["level"] for line in lines if line["path"] in ("/health", "/ready")} == {"debug"}


def test_text_is_logged_where_it_was_asked_for(tiny: LanguageModel) -> None:
    with _logged(JsonLines()) as stream, live(tiny, ServerConfig(log_prompts=True)) as site:
        text = _ask_all(site.url)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (first,) = [line for line in lines if line.get("request_id") == "one"]
    assert first["answers"] == [text]
    (prompt,) = first["prompts"]
    assert SECRET in prompt


def test_lines_for_people(tiny: LanguageModel) -> None:
    with _logged(TextLines()) as stream, live(tiny) as site:
        _ask_all(site.url)
    (line,) = [line for line in stream.getvalue().splitlines() if 'request_id="one"' in line]
    assert line[8:].startswith(" info    request ")
    assert 'path="/v1/chat/completions" status=200' in line
    assert SECRET not in stream.getvalue()


def test_a_traceback_is_part_of_its_line() -> None:
    with _logged(JsonLines()) as stream:
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("unmask.serve").exception("request %s failed", "one")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line["message"] == "request one failed"
    assert "ValueError: why" in line["traceback"]


def _metrics(site: Live) -> dict[str, float]:
    """Samples by name and labels."""
    lines = HTTP.get(f"{site.url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_metrics(tiny: LanguageModel) -> None:
    with live(tiny) as site, connect(site.url) as client:
        before = _metrics(site)
        body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "n": 2}
        usages = [client.chat.completions.create(**body).usage for _ in range(2)]
        ended = client.chat.completions.create(**{**body, "n": 1}, logit_bias={"0": 100})
        edits = client.chat.completions.create(
            **body, temperature=1.5, seed=4, extra_body={"diffusion": {"edit_threshold": 0.1, "min_new_tokens": 12}}
        )
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**body, temperature=3)
        site.wait_idle()
        after = _metrics(site)
    usages += [ended.usage, edits.usage]
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["unmask_completion_tokens_total"] == sum(usage.completion_tokens for usage in usages)
    assert grown["unmask_prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)
    assert grown["unmask_cached_prompt_tokens_total"] > 0
    assert grown['unmask_completions_total{finish_reason="length"}'] == 6
    assert grown['unmask_completions_total{finish_reason="stop"}'] == 1
    assert grown["unmask_edits_total"] == edits.diffusion["edits"] > 0
    assert grown["unmask_forwards_total"] > 12
    assert grown['unmask_http_requests_total{path="/v1/chat/completions",status="200"}'] == 4
    assert grown['unmask_http_requests_total{path="/v1/chat/completions",status="400"}'] == 1
    assert grown['unmask_request_seconds_count{path="/v1/chat/completions"}'] == 5
    for name, count in (("time_to_first_token_seconds", 4), ("queue_seconds", 7), ("tokens_per_forward", 7)):
        assert grown[f"unmask_{name}_count"] == count
    assert grown["unmask_tokens_per_second_count"] == 7
    assert grown["unmask_tokens_per_forward_sum"] > 0
    assert after['unmask_kv_cache_blocks{state="used"}'] == 0
    assert after['unmask_kv_cache_blocks{state="available"}'] == site.worker.engine.pool.num_cache_blocks
    assert after['unmask_requests{state="running"}'] == after['unmask_requests{state="waiting"}'] == 0
