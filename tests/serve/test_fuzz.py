"""Malformed bodies, headers and bytes: never a 5xx, no cache block leaks, always an answer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from live import NAME, Live, live, served_model
from schemathesis import checks
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks as openapi_checks
from wire import Wire, chat_body, request_bytes

from unmask.serve import guard
from unmask.serve.config import ServerConfig
from unmask.serve.protocol.fields import Diffusion

GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/infill", "/v1/responses", "/v1/messages", "/infill")
KEY = "a-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    config = ServerConfig(max_tokens=8, max_body=300_000, files=tmp_path_factory.mktemp("files"), max_file=10_000)
    with live(served_model(tmp_path_factory.mktemp("tokenizer")), config) as it:
        yield it
        it.wait_idle()


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as it:
        yield it


def is_error(response: httpx2.Response) -> bool:
    error = response.json()["error"]
    if response.request.url.path.startswith("/api/"):
        return response.json().keys() == {"error"} and "\n" not in error
    if response.request.url.path.startswith("/v1/messages"):
        return response.json()["type"] == "error" and set(error) == {"type", "message"} and "\n" not in error["message"]
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"]) and "\n" not in error["message"]


def modest(body: Any, rng: random.Random) -> None:
    """Let it reach the engine now and then, and not stay there."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and rng.random() < 0.9:
        body["model"] = NAME
    for name, most in (("max_tokens", 8), ("max_completion_tokens", 8), ("max_output_tokens", 8), ("n", 3)):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and most < value < 2**31:
            body[name] = most


CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.response_headers_conformance,
]


@pytest.mark.parametrize("examples", [4, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_it_does_what_its_own_schema_says(server: Live, mode: GenerationMode, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: set[int] = set()
    rng = random.Random(0)
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:
        generates = operation.path in GENERATING
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @seed(5)
        @settings(max_examples=examples if generates else examples // 4, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            modest(case.body, rng)
            response = case.call()
            statuses.add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        check()
    assert statuses >= ({200, 400, 404} if mode is GenerationMode.POSITIVE else {400}), statuses
    server.wait_idle()


SURROGATE = "\ud800"
ODD = (
    None, True, 0, -1, 1e308, 10**30, -(2**63), 2**63, 2**64, 0.5, float("nan"), float("inf"), "", "\x00", "\ufffd", SURROGATE,
    "a\nb", "x" * 5000, "😀", [], [[]], [None], {}, {"": ""}, {"type": "function"}, [{"role": "user", "content": "\x00"}],
    [0], [0] * 5000, [2**40], ["a"] * 3, {SURROGATE: SURROGATE},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [SURROGATE]}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/"}}},
    [{"type": "function", "function": {"name": SURROGATE}}],
    [{"type": "function", "function": {"name": "f", "description": SURROGATE, "parameters": {SURROGATE: SURROGATE}}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}}}],
    [{"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
     {"role": "tool", "content": "x", "tool_call_id": "a"}],
)  # fmt: skip
FIELDS = {
    "/v1/chat/completions": (
        "model", "messages", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "stream", "stream_options",
        "temperature", "top_p", "logit_bias", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
        "parallel_tool_calls", "presence_penalty", "metadata", "user", "diffusion", SURROGATE, "unknown\nfield",
    ),
    "/v1/completions": ("prompt", "echo", "best_of", "suffix", "logprobs", "stop", "n", "stream", "logit_bias", "diffusion"),
    "/v1/infill": ("text", "hole", "tokens", "seed", "diffusion"),
    "/v1/tokenize": ("prompt", "messages", "model"),
    "/infill": ("input_prefix", "input_suffix", "input_extra", "prompt", "n_predict", "stop", "response_fields", "seed"),
    "/api/chat": ("messages", "tools", "options", "format", "think", "keep_alive", "logprobs", "top_logprobs", "diffusion"),
    "/api/generate": ("prompt", "suffix", "system", "raw", "options", "format", "images", "context", "template"),
    "/v1/responses": (
        "input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "top_logprobs", "include", "stream",
        "store", "previous_response_id", "truncation", "reasoning", "metadata", "diffusion", "temperature", "conversation",
    ),
    "/v1/messages": (
        "messages", "system", "max_tokens", "stop_sequences", "tools", "tool_choice", "thinking", "output_config", "metadata",
        "stream", "temperature", "top_k", "diffusion",
    ),
    "/v1/messages/count_tokens": ("messages", "system", "tools"),
}  # fmt: skip
RULES = ("watch", *Diffusion.model_fields)
WELL = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/v1/infill": {"text": "The ___ is", "tokens": 2},
    "/v1/tokenize": {"prompt": "Hi"},
    "/infill": {"input_prefix": "Hi", "input_suffix": "you", "n_predict": 4},
    "/api/chat": {"messages": [{"role": "user", "content": "Hi"}], "options": {"num_predict": 4}, "stream": False},
    "/api/generate": {"prompt": "Hi", "options": {"num_predict": 4}, "stream": False},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
}


def post(client: httpx2.Client, path: str, content: bytes) -> int:
    """Send a body; the answer must be one that a program can read."""
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    shown = (path, content[:300], response.status_code, response.text[:300])
    assert response.status_code < 500, shown
    if response.status_code != 200:
        assert is_error(response), shown
        assert "traceback" not in response.text.lower(), shown
    elif response.headers["content-type"].startswith("text/event-stream"):
        last = response.text.rstrip("\n").split("\n\n")[-1]
        named = re.match("event: (response.completed|response.incomplete|response.failed|message_stop|error)\n", last)
        assert last == "data: [DONE]" or named or json.loads(last.removeprefix("data: "))["error"], shown
    else:
        assert isinstance(response.json(), dict), shown
    return response.status_code


@pytest.mark.parametrize("share", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_a_wrong_value_in_any_field_is_told(client: httpx2.Client, server: Live, share: int) -> None:
    pairs = [(path, {field: value}) for path, fields in FIELDS.items() for field in fields for value in ODD]
    pairs += [("/v1/completions", {"diffusion": {rule: value}}) for rule in RULES for value in ODD]
    random.Random(2).shuffle(pairs)
    for path, odd in pairs[::share]:
        body = odd if path == "/v1/tokenize" else {"model": NAME, **WELL[path], **odd}
        post(client, path, json.dumps(body).encode())
    server.wait_idle()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@given(
    path=st.sampled_from(sorted(FIELDS)),
    given_fields=st.dictionaries(st.integers(0, 23), ANYTHING, max_size=4),
    cut=st.integers(0, 400) | st.none(),
)
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
def test_any_body_gets_an_answer(client: httpx2.Client, path: str, given_fields: dict[int, Any], cut: int | None) -> None:
    fields = FIELDS[path]
    body = {"model": NAME, **WELL[path], **{fields[i % len(fields)]: value for i, value in given_fields.items()}}
    modest(body, random.Random(1))
    post(client, path, json.dumps(body).encode()[:cut])


@given(content=st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-16")))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_any_bytes_get_an_answer(client: httpx2.Client, content: bytes) -> None:
    assert post(client, "/v1/completions", content) == 400


WHOLE = json.dumps({"model": NAME, "prompt": "Hi", "max_tokens": 2}).encode()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 50_000, 400),
        (b'{"model":"tiny","prompt":' + b"[" * 400 + b"]" * 400 + b"}", 400),
        (WHOLE[:-1] + b', "logit_bias": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", 400),
        (WHOLE[:-1] + b', "seed": ' + b"9" * 5000 + b"}", 400),
        (WHOLE[:-1] + b', "seed": ' + b"9" * 40 + b"}", 400),
        (WHOLE[:-1] + b', "temperature": NaN}', 400),
        (WHOLE[:-1] + b', "temperature": -Infinity}', 400),
        (WHOLE[:-1] + b', "temperature": 1e999}', 400),
        (WHOLE[:-1] + b', "seed": 1e999}', 400),
        (WHOLE[:-1] + b', "user": "\\ud800"}', 200),
        (WHOLE.replace(b"Hi", b"\\ud83d"), 400),
        (WHOLE.replace(b"Hi", b"\\u0000"), 200),
        (WHOLE.replace(b"Hi", b"\xff\xfe"), 400),
        (WHOLE.replace(b'"Hi"', b"[" + b"1," * 100_000 + b"1]"), 400),
        (WHOLE.replace(b'"Hi"', b'["a"' + b',"a"' * 70_000 + b"]"), 400),
        (WHOLE.replace(b'"Hi"', b"[" + b"[1]," * 70_000 + b"[1]]"), 400),
        (WHOLE.replace(b'"Hi"', b"[]"), 400),
        (WHOLE.replace(b"Hi", b"Hi " * 90_000), 400),
        (b'{"prompt": "' + b"x" * 400_000 + b'"}', 413),
        (b"\xef\xbb\xbf" + WHOLE, 200),
        (b'{"model":"tiny","model":"tiny","prompt":"Hi","max_tokens":2}', 200),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_known_nasty_bodies(client: httpx2.Client, content: bytes, status: int) -> None:
    assert post(client, "/v1/completions", content) == status
    assert post(client, "/v1/completions", WHOLE) == 200


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize("depth", [50, 200, 300, 450])
def test_deep_schemas_are_compiled_or_refused(client: httpx2.Client, depth: int) -> None:
    schema = nested(depth)
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    assert post(client, "/v1/chat/completions", json.dumps(chat_body(max_tokens=1, response_format=form)).encode()) in (
        200,
        400,
    )
    tool = {"type": "function", "function": {"name": "deep", "parameters": schema}}
    post(client, "/v1/chat/completions", json.dumps(chat_body(max_tokens=1, tools=[tool])).encode())


def test_no_prompt_at_all_is_a_400(client: httpx2.Client) -> None:
    for stream in (False, True):
        body = {"model": NAME, "prompt": [], "max_tokens": 2, "stream": stream}
        assert post(client, "/v1/completions", json.dumps(body).encode()) == 400


HEADERS = [
    b"content-length: 10, 20", b"content-length: -1", b"content-length: 1e3", b"content-length: 99999999999999999999999",
    b"transfer-encoding: gzip", b"x-request-id: \xff\xfe", b"x-request-id: " + b"a" * 9000, b"x-request-id: a\tb",
    b"x-request-id: a\rInjected: yes", b"authorization: Bearer \xff\xe9", b"authorization: Bearer " + b"k" * 9000,
    b"authorization:", b"authorization: Bearer a-key\r\nauthorization: Bearer b", b"host: [", b"host: [::1", b"host: \xe9",
    b"host: a\r\nhost: b", b"host:", b"origin: \xff", b"origin: null", b"content-type: \xff", b"content-type:",
    b"content-type: application/json\r\ncontent-type: text/plain", b"content-type: application/json; charset=nonsense",
    b"expect: 100-continue", b"expect: nonsense", b"upgrade: websocket\r\nconnection: upgrade", b"connection: close",
    b"connection: \xff", b"range: bytes=5-", b": empty", b"no colon", b"a b: c", b" folded: x", b"x" * 30_000 + b": y",
    b"\r\n".join(b"x-%d: y" % i for i in range(3000)), b"cookie: " + b"a=b; " * 2000, b"te: trailers",
]  # fmt: skip


def test_odd_headers(server: Live) -> None:
    """Every connection is answered or closed, and the next one is served."""
    for path, method in (("/v1/completions", "POST"), ("/health", "GET"), ("/page/app.js", "GET")):
        for header in HEADERS:
            whole = request_bytes(WHOLE if method == "POST" else b"", path, method)
            head, _, body = whole.partition(b"\r\n\r\n")
            name = header.partition(b":")[0].lower()
            kept = [line for line in head.split(b"\r\n") if line.partition(b":")[0] != name]
            closing = [] if name == b"connection" or b"connection:" in header else [b"connection: close"]
            with Wire(server.url) as wire:
                wire.send(b"\r\n".join([*kept, header, *closing]) + b"\r\n\r\n" + body)
                if name in (b"content-length", b"transfer-encoding"):
                    wire.socket.shutdown(1)
                response = wire.rest() if closing else wire.until(b"\r\n\r\n")
            assert b" 500 " not in response.split(b"\r\n")[0], (header[:60], response[:400])
            assert b"injected" not in response.lower(), header
            assert response.startswith(b"HTTP/1.1 ") or name == b"content-length", (header[:60], response[:200])
    assert httpx2.post(f"{server.url}/v1/completions", json=json.loads(WHOLE)).status_code == 200
    server.wait_idle()


@pytest.mark.parametrize("given_id", ["a" * 65, "a b", "ä", "<x>", "", "a\tb"])
def test_a_request_id_that_could_forge_a_log_line_is_replaced(server: Live, given_id: str) -> None:
    response = httpx2.get(f"{server.url}/health", headers={"x-request-id": given_id.encode()})
    assert response.headers["x-request-id"].isalnum()
    assert response.headers["x-request-id"] != given_id
    assert httpx2.get(f"{server.url}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(
    "garbage",
    [
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\nabc",
        b"-5\r\nabc\r\n0\r\n\r\n",
        b"5\r\nab\r\n\x00\r\n\r\n",
        b"5;" + b"e" * 70_000 + b"\r\n",
    ],
)
def test_chunked_garbage(server: Live, garbage: bytes) -> None:
    with Wire(server.url) as wire:
        wire.send(request_bytes(b"", content_length=None, transfer_encoding="chunked") + garbage)
        wire.socket.shutdown(1)
        assert b" 500 " not in wire.rest().split(b"\r\n")[0]
    server.wait_idle()


def test_chunked_bodies_are_bodies_and_count_against_the_limit(server: Live) -> None:
    head = request_bytes(b"", "/v1/completions", content_length=None, transfer_encoding="chunked")
    with Wire(server.url) as wire:
        for piece in (WHOLE[:10], WHOLE[10:]):
            head += b"%x\r\n" % len(piece) + piece + b"\r\n"
        wire.send(head + b"0\r\n\r\n")
        assert wire.answer()[0] == 200
        large = b"%x\r\n" % 50_000 + b" " * 50_000 + b"\r\n"
        wire.send(request_bytes(b"", content_length=None, transfer_encoding="chunked") + large * 7 + b"0\r\n\r\n")
        status, body = wire.answer()
        assert status == 413
        assert "larger than 300000 bytes" in json.loads(body)["error"]["message"]


def test_a_body_that_says_it_is_too_long_is_refused_unread(server: Live) -> None:
    with Wire(server.url) as wire:
        wire.send(request_bytes(b"", content_length=str(10**12), expect="100-continue"))
        assert wire.answer()[0] == 413
    with Wire(server.url) as wire:
        wire.send(request_bytes(b"", "/v1/completions", content_length=str(len(WHOLE)), expect="100-continue"))
        assert wire.status() == 100
        wire.until(b"\r\n\r\n")
        wire.read = b""
        wire.send(WHOLE)
        assert wire.answer()[0] == 200


def test_other_methods(client: httpx2.Client) -> None:
    for path, allowed in (("/v1/chat/completions", "POST"), ("/health", "GET"), ("/v1/models", "GET")):
        for method in ("OPTIONS", "DELETE", "PATCH", "TRACE", "NONSENSE"):
            response = client.request(method, path)
            assert response.status_code == 405, (path, method)
            assert response.headers["allow"] == allowed
            assert "access-control-allow-origin" not in response.headers
            assert is_error(response)


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics", "/", "/page/app.js", "/nowhere", "/v1/infill"])
def test_head_is_get_without_a_body(client: httpx2.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])
    assert head.content == b""


@pytest.mark.parametrize(
    "path",
    ["/page/%00", "/page/../app.py", "/page/%2e%2e/app.py", "/page/" + "a" * 5000, "/page/%ff", "/page//etc/passwd", "/page/",
     "/page", "/v1/models/%00", "/%", "//", "/health/", "/v1/models/../../x", "/page/vendor", "/\u00e9"],
)  # fmt: skip
def test_odd_paths_are_404s(server: Live, path: str) -> None:
    with Wire(server.url) as wire:
        wire.send(f"GET {path} HTTP/1.1\r\nhost: [\r\nconnection: close\r\n\r\n".encode())
        response = wire.rest()
    first = response.split(b"\r\n")[0]
    assert any(status in first for status in (b" 404 ", b" 400 ", b" 403 ")), response[:300]


def test_pipelined_requests_are_answered_in_order(server: Live) -> None:
    with Wire(server.url) as wire:
        wire.send(
            request_bytes(WHOLE, "/v1/completions", x_request_id="first")
            + request_bytes(b"{", "/v1/completions", x_request_id="second")
            + request_bytes(b"", "/health", "GET", x_request_id="third", connection="close")
        )
        response = wire.rest()
    places = [response.index(b"x-request-id: " + name) for name in (b"first", b"second", b"third")]
    assert places == sorted(places)
    assert re.findall(rb"HTTP/1\.1 (\d+)", response) == [b"200", b"400", b"200"]
    server.wait_idle()


def test_a_body_that_does_not_come_is_a_408(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    with Wire(server.url) as wire:
        wire.send(request_bytes(WHOLE, "/v1/completions")[:-5])
        status, body = wire.answer()
        assert status == 408
        assert "longer than 0.1 s" in json.loads(body)["error"]["message"]


def test_keys_of_any_bytes(tmp_path: Path) -> None:
    with live(served_model(tmp_path), ServerConfig(api_keys=(KEY,))) as it:
        for sent, status in (
            (b"Bearer a-key", 200), (b"bearer  a-key", 200), (b"Bearer a-ke", 401), (b"Bearer \xff", 401),
            (b"Basic a-key", 401),
            (b"a-key", 401), (b"Bearer", 401), (b"Bearer a-key\xc3\xa9", 401), (b"Bearer " + b"a" * 60_000, 401),
        ):  # fmt: skip
            response = httpx2.get(f"{it.url}/v1/models", headers={"authorization": sent})
            assert response.status_code == status, sent[:40]
        it.wait_idle()
