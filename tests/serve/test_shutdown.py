"""The way down: what runs finishes within the grace, and nothing holds the server longer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live import SlowModel, live, served_model
from wire import Wire, chat_body, request_bytes

from helpers import refused, soon
from unmask.engine.backends.base import Backend
from unmask.errors import ConfigError
from unmask.serve import server as serving
from unmask.serve import worker as working
from unmask.serve.app import create_app
from unmask.serve.config import ServerConfig
from unmask.serve.server import listen, run, url_of

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SlowModel:
    made = served_model(tmp_path_factory.mktemp("tokenizer"), seconds=0.01)
    assert isinstance(made, SlowModel)
    return made


def last_event(response: bytes) -> str:
    """The content of the last chunk of a stream."""
    return response.removesuffix(b"\r\n0\r\n\r\n").rpartition(b"data: ")[2].decode().strip()


STREAM = {"stream": True, "max_tokens": 60}


def test_a_stream_finishes_within_the_grace_and_nothing_new_is_taken(model: SlowModel) -> None:
    with live(model, ServerConfig(shutdown_grace=60)) as it, Wire(it.url) as wire, Wire(it.url) as idle:
        idle.send(request_bytes(b"", "/health", "GET"))
        assert idle.answer()[0] == 200
        wire.send(request_bytes(chat_body(**STREAM)))
        wire.until(b"data: ")
        it.server.should_exit = True
        soon(lambda: it.worker.state == "stopping")
        assert idle.rest() == b"", "a connection that waits is closed at once"
        soon(lambda: not connects(it.url))
        assert last_event(wire.rest()) == "[DONE]"


def connects(url: str) -> bool:
    try:
        with Wire(url):
            return True
    except ConnectionRefusedError:
        return False


def test_a_request_that_comes_while_the_server_stops_is_503(model: SlowModel) -> None:
    with live(model, ServerConfig(shutdown_grace=60)) as it:
        it.worker.drain()
        response = httpx2.post(f"{it.url}{CHAT}", json=chat_body())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")
        assert int(response.headers["retry-after"]) > 0
        ready = httpx2.get(f"{it.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
        assert httpx2.get(f"{it.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_finish_within_the_grace_is_told(model: SlowModel, stream: bool) -> None:
    with live(model, ServerConfig(shutdown_grace=0.2)) as it, Wire(it.url) as wire:
        wire.send(request_bytes(chat_body(stream=stream, max_tokens=220)))
        if stream:
            wire.until(b"data: ")
        soon(lambda: it.worker.num_requests == 1)
        it.server.should_exit = True
        response = wire.rest()
        if stream:
            assert json.loads(last_event(response))["error"]["code"] == "stopping"
            assert response.endswith(b"0\r\n\r\n"), "the stream ends in good order"
        else:
            assert response.startswith(b"HTTP/1.1 503")
    assert it.worker.is_idle or not it.worker.is_alive


def test_clients_that_neither_send_nor_read_do_not_hold_it(model: SlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_FLUSH_SECONDS", 0.3)
    with live(model, ServerConfig(shutdown_grace=1000)) as it:
        silent, half = Wire(it.url), Wire(it.url)
        half.send(request_bytes(chat_body())[:-5])
        time.sleep(0.05)
        it.server.should_exit = True
        soon(lambda: not it.server.server_state.connections)
        for each in (silent, half):
            assert b" 200 " not in each.rest()
            each.socket.close()


def test_forced_it_ends_at_once(model: SlowModel) -> None:
    """What a second SIGINT does."""
    with live(model, ServerConfig(shutdown_grace=1000)) as it, Wire(it.url) as wire:
        wire.send(request_bytes(chat_body(stream=True, max_tokens=230)))
        wire.until(b"data: ")
        it.server.should_exit = True
        soon(lambda: it.worker.state == "stopping")
        it.server.force_exit = True
        assert b"[DONE]" not in wire.rest()


class Loading(SlowModel):
    """A model that is being prepared until the test says so, or that cannot be."""

    gate: threading.Event
    error: Exception | None = None

    def backend(self) -> Backend:
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return super().backend()


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[Loading]:
    plain = served_model(tmp_path)
    made = Loading(plain.transformer, plain.tokenizer, name=plain.name)
    made.gate = threading.Event()
    yield made
    made.gate.set()


def running(model: Any, config: ServerConfig) -> tuple[str, ThreadPoolExecutor, Any]:
    listener = listen("127.0.0.1", 0)
    pool = ThreadPoolExecutor(1)
    url = url_of(listener)
    task = pool.submit(run, model, config, listener, loopback=True)
    soon(lambda: connects(url) or task.done())
    return url, pool, task


def test_while_the_model_is_prepared_it_says_so(loading: Loading) -> None:
    loading.error = ConfigError("this model cannot be served")
    url, pool, task = running(loading, ServerConfig())
    with pool:
        ready = httpx2.get(f"{url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        response = httpx2.post(f"{url}{CHAT}", json=chat_body())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        assert httpx2.get(f"{url}/metrics").status_code == 200
        assert httpx2.get(f"{url}/v1/models").status_code == 200
        loading.gate.set()
        with refused(ConfigError, "served"):
            task.result(30)


def test_a_model_that_takes_long_to_prepare_does_not_hold_the_way_down(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "_JOIN_SECONDS", 0.1)
    server, listener = serving.Server(create_app(loading, ServerConfig()), 0.0), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    soon(lambda: server.started)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def test_a_taken_port_is_one_line_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with refused(ConfigError, f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)
    with refused(ConfigError, "no.such.host.invalid:1"):
        listen("no.such.host.invalid", 1)
