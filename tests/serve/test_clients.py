"""Keys with owners and limits: what a minute allows, what is told about it, what the audit log says."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from asking import HTTP, connect
from live import Live, live

from helpers import refused, soon
from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError
from unmask.serve.audit import AuditLog
from unmask.serve.clients import Bucket, Client, Clients
from unmask.serve.config import ServerConfig
from unmask.serve.errors import ApiError
from unmask.serve.keys import ApiKey, read_keys
from unmask.serve.server import listen, run, url_of

KEYS = f"""
- {{name: alice, key: alices-key, requests_per_minute: 3}}
- {{name: bob, sha256: {hashlib.sha256(b"bobs-key").hexdigest()}, tokens_per_minute: 40, admin: true}}
- {{name: carol, key: carols-key}}
"""
SECRET = "jumps over the lazy"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_refills_evenly() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert (bucket.level, bucket.seconds_until(5), bucket.seconds_until(1000)) == (0, 5, 60)
    clock.now += 2.5
    assert bucket.level == 2.5
    clock.now += 1000
    assert bucket.level == 60
    bucket.take(-5)
    assert bucket.level == 60


def test_what_was_not_used_is_given_back() -> None:
    client = Client("a", tokens_per_minute=100)
    client.take_tokens(80)
    with pytest.raises(ApiError) as caught:
        client.take_tokens(30)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert 1 <= int(caught.value.headers["retry-after"]) <= 6
    client.give_tokens(60)
    client.take_tokens(30)
    headers = client.headers()
    assert headers["x-ratelimit-limit-tokens"] == "100"
    assert 49 <= int(headers["x-ratelimit-remaining-tokens"]) <= 51
    assert "x-ratelimit-limit-requests" not in headers


def test_more_than_a_minute_has_is_told_at_once() -> None:
    with pytest.raises(ApiError) as caught:
        Client("a", tokens_per_minute=10).take_tokens(11)
    assert caught.value.headers == {"x-should-retry": "false"}


@pytest.mark.parametrize(("left", "shown"), [(0, "1m0s"), (54, "6s"), (59.99, "10ms"), (60, "0ms")])
def test_durations_are_written_as_openai_does(left: float, shown: str) -> None:
    client = Client("a", requests_per_minute=60)
    bucket = client._buckets["requests"]
    bucket._clock = lambda: bucket._at
    bucket.take(60 - left)
    assert client.headers()["x-ratelimit-reset-requests"] == shown


def test_clients_are_found_by_their_keys() -> None:
    key = ApiKey("a", hashlib.sha256(b"one").digest(), tokens_per_minute=5, admin=False)
    clients = Clients((key,), requests_per_minute=7)
    found = clients.find(("", "one"))
    assert found is not None
    assert found is clients.named("a")
    assert (found.name, found.is_admin) == ("a", False)
    assert set(found._buckets) == {"requests", "tokens"}
    assert clients.find(("", "On")) is None
    assert (clients.named(""), Clients().named("")) != (None, None)
    assert clients.named("") is None


def test_other_keys_take_the_place_of_those_before() -> None:
    def key(name: str, secret: str, **fields: Any) -> ApiKey:
        return ApiKey(name, hashlib.sha256(secret.encode()).digest(), **fields)

    clients = Clients((key("a", "one"), key("b", "two"), key("c", "three")), requests_per_minute=7)
    before = [clients.find((each,)) for each in ("one", "two", "three")]
    clients.replace((key("a", "new"), key("b", "two", requests_per_minute=9), key("d", "four")))
    assert clients.find(("new",)) is before[0], "the same owner with another key has used as much of the minute"
    changed = clients.find(("two",))
    assert changed is not None
    assert (changed is before[1], changed.limits) == (False, (9, None))
    assert [clients.find((each,)) for each in ("one", "three")] == [None, None]
    assert clients.named("c") is None
    assert clients.find(("four",)) is clients.named("d") is not None


def test_the_keys_file_is_read_again_at_a_hangup(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In this process, whose main thread gets the signals."""
    path, listener = tmp_path / "keys.yaml", listen("127.0.0.1", 0)
    path.write_text("- {name: alice, key: old-key}\n")
    config, url = ServerConfig(keys_file=path), f"{url_of(listener)}/v1/models"
    monkeypatch.setattr(logging.getLogger("unmask.serve"), "handlers", [caplog.handler])

    def status(key: str) -> int:
        return HTTP.get(url, headers={"authorization": f"Bearer {key}"}).status_code

    def reload(content: str, *logged: str) -> None:
        path.write_text(content)
        caplog.clear()
        os.kill(os.getpid(), signal.SIGHUP)
        soon(lambda: any("key" in each.message for each in caplog.records))
        (line,) = {each.message for each in caplog.records if "key" in each.message}
        assert all(each in line for each in logged), line

    def use() -> list[list[int]]:
        try:
            soon(lambda: status("old-key") == 200)
            seen = [[status("old-key"), status("new-key")]]
            for content, *logged in (
                ("- {name: alice, key: new-key}\n", "read again"),
                ("- {name: alice, key: 3}\n", "stay", "0.key"),
            ):
                reload(content, *logged)
                seen.append([status("old-key"), status("new-key")])
            return seen
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    # Should the server not heed it, the signal would end the tests.
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with caplog.at_level(logging.INFO, "unmask.serve"), ThreadPoolExecutor(1) as pool:
            seen = pool.submit(use)
            assert run(tiny, config, listener, loopback=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen.result() == [[200, 401], [401, 200], [401, 200]]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("nothing", "list"),
        ("[]", "at least 1"),
        ("- {name: a}", "either key or sha256"),
        ("- {name: a, key: secret-one, sha256: " + "ab" * 32 + "}", "either key or sha256"),
        ("- {name: a, key: secret-one, requests_per_minute: 0}", "requests_per_minute"),
        ("- {name: a, key: secret-one, limit: 3}", "limit"),
        ("- {name: 'a b', key: secret-one}", "name"),
        ("- {name: a, key: ' secret-one'}", "a holds a key"),
        ("- {name: a, key: 3}", "key"),
        ("- {name: a, key: secret-one}\n- {name: a, key: secret-two}", "named a"),
        ("- {name: a, key: secret-one}\n- {name: b, key: secret-one}", "twice"),
        ("- [", "YAML"),
    ],
)
def test_a_keys_file_that_is_wrong(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with refused(ConfigError, named) as caught:
        ServerConfig(keys_file=path)
    assert "secret" not in str(caught)


def test_a_keys_file_that_is_not_there(tmp_path: Path) -> None:
    with refused(ConfigError, "keys_file"):
        read_keys(tmp_path / "keys.yaml")
    with refused(ConfigError, "audit_log"):
        AuditLog(tmp_path)


@pytest.fixture(scope="module")
def shared(tiny: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of three people."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys.yaml").write_text(KEYS)
    with live(tiny, ServerConfig(keys_file=folder / "keys.yaml", audit_log=folder / "log" / "audit.jsonl")) as running:
        yield running


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": SECRET, "max_tokens": 4, **fields}


def test_a_key_has_its_requests_a_minute(shared: Live) -> None:
    with connect(shared.url, api_key="alices-key") as alice, connect(shared.url, api_key="carols-key") as carol:
        for remaining in (2, 1, 0):
            response = alice.completions.with_raw_response.create(**body())
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == str(remaining)
        with pytest.raises(openai.RateLimitError) as caught:
            alice.completions.create(**body())
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 20
        assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
        assert alice.models.list().data, "reading is not limited"
        response = carol.completions.with_raw_response.create(**body())
        assert not [name for name in response.headers if name.startswith("x-ratelimit")], "others are not held up"
    client = anthropic.Anthropic(base_url=shared.url, api_key="alices-key", max_retries=0)
    with client, pytest.raises(anthropic.RateLimitError):
        client.messages.create(model="tiny", max_tokens=4, messages=[{"role": "user", "content": "Hi"}])


def test_a_key_has_its_tokens_a_minute(shared: Live, tiny: LanguageModel) -> None:
    num_prompt = len(tiny.encode_prompt(SECRET, chat=False))
    with connect(shared.url, api_key="bobs-key") as bob:
        with pytest.raises(openai.RateLimitError, match="limit is 40") as caught:
            bob.completions.create(**body(max_tokens=41))
        assert caught.value.response.headers["x-should-retry"] == "false"
        ending = body(max_tokens=30 - num_prompt, logit_bias={"0": 100})
        for stream in (False, True):  # what ends early takes little
            answer = bob.completions.with_raw_response.create(**ending, stream=stream)
            answer.parse() if not stream else list(answer.parse())
        remaining = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert remaining <= 40 - 2 * num_prompt
        with pytest.raises(openai.RateLimitError) as caught:
            bob.completions.create(**body(max_tokens=40 - num_prompt))
        assert int(caught.value.response.headers["retry-after"]) >= 1
    shared.wait_idle()


def test_the_audit_log_says_who_asked_what(shared: Live) -> None:
    HTTP.post(f"{shared.url}/v1/completions", json=body(), headers={"authorization": "Bearer no", "x-request-id": "audit-1"})
    headers = {"authorization": "Bearer carols-key", "x-request-id": "audit-2"}
    HTTP.post(f"{shared.url}/v1/completions", json=body(), headers=headers)
    HTTP.get(f"{shared.url}/v1/responses/resp_1", headers={**headers, "x-request-id": "audit-3"})
    shared.wait_idle()
    path = shared.app.state.unmask.config.audit_log
    content = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert SECRET not in content
    assert "carols-key" not in content
    lines = {line["request_id"]: line for line in map(json.loads, content.splitlines())}
    assert (lines["audit-1"]["key"], lines["audit-1"]["status"]) == (None, 401)
    asked = lines["audit-2"]
    assert (asked["key"], asked["method"], asked["route"], asked["status"]) == ("carol", "POST", "/v1/completions", 200)
    assert (asked["model"], asked["completion_tokens"], asked["address"]) == ("tiny", 4, "127.0.0.1")
    assert asked["prompt_tokens"] > 0
    assert asked["seconds"] > 0
    assert lines["audit-3"]["route"] == "/v1/responses/{response_id}"


def test_the_audit_log_follows_a_file_that_was_renamed(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    scope = {"unmask.details": {}, "unmask.id": "1", "unmask.client": Client(), "unmask.background": False, "method": "GET"}
    log.write(scope, "/health", 200, 0.1)
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit.jsonl.1")
    log.write(scope, "/ready", 200, 0.1)
    log.close()
    (line,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert line["route"] == "/ready"


def test_everybody_has_one_limit_where_there_are_no_keys(tiny: LanguageModel) -> None:
    with live(tiny, ServerConfig(requests_per_minute=1)) as site, connect(site.url, api_key="any") as client:
        client.completions.create(**body())
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**body())


@pytest.mark.parametrize("name", ["requests_per_minute", "max_connections", "max_file", "max_stored"])
def test_limits_are_at_least_one(name: str) -> None:
    with refused(ConfigError, name):
        ServerConfig(**{name: 0})
