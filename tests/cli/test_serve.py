"""`unmask serve` as a process: how it starts, how signals end it, and what it says when it cannot start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

Fails = Callable[..., str]


class Process:
    """A running `unmask serve`."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "unmask", "serve", "--model", str(folder), "--port", "0", "--name", "tiny", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("UNMASK_API_KEY", None)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.stderr = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.soon(lambda: re.search(r"served at http\S+:\d+", self.stderr))
        self.url = re.search(r"served at (http\S+:\d+)", self.stderr)[1]  # type: ignore[index]
        self.soon(lambda: self.status("/ready") == 200)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line

    def soon(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < end, self.stderr
            assert self.process.poll() is None, self.stderr
            time.sleep(0.02)

    def status(self, path: str) -> int | None:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def stream(self, tokens: int, n: int = 1) -> HTTPResponse:
        """Begin a stream; its first line has come."""
        body = {
            "model": "tiny",
            "prompt": "Hello",
            "max_tokens": tokens,
            "n": n,
            "stream": True,
            "temperature": 1.0,
            "diffusion": {"min_new_tokens": tokens},
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        response: HTTPResponse = urllib.request.urlopen(request, timeout=60)
        assert response.readline().startswith(b"data: {")
        return response

    def end(self) -> int:
        """Wait for its end; `stderr` is complete then."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@pytest.fixture
def start(diffusion_folder: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(*options: str) -> Process:
        started.append(Process(diffusion_folder, *options))
        return started[-1]

    yield make
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.end()
        assert each.process.stdout is not None
        assert each.process.stdout.read() == ""
        each.process.stdout.close()


def test_sigterm_in_the_middle_of_streams(start: Callable[..., Process]) -> None:
    """They finish, nothing new is taken, and the process says that all is well."""
    it = start("--log-format", "json")
    streams = [it.stream(200) for _ in range(4)]
    it.process.send_signal(signal.SIGTERM)
    ends = [stream.read() for stream in streams]
    assert all(end.endswith(b"data: [DONE]\n\n") for end in ends)
    assert it.end() == 0
    assert it.status("/health") is None
    lines = [json.loads(line) for line in it.stderr.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["message"] == "request"].count(200) >= 4
    assert "Traceback" not in it.stderr
    assert "error" not in {line["level"] for line in lines}


@pytest.mark.slow
def test_the_grace_has_an_end_and_a_second_sigint_makes_it_now(start: Callable[..., Process]) -> None:
    it = start("--shutdown-grace", "0", "--cache-tokens", "8192")
    stream = it.stream(250, n=40)
    it.process.send_signal(signal.SIGINT)
    assert json.loads(stream.read().rpartition(b"data: ")[2])["error"]["code"] == "stopping"
    assert it.end() == 0
    assert "Traceback" not in it.stderr
    patient = start("--shutdown-grace", "1000", "--cache-tokens", "8192")
    stream = patient.stream(250, n=60)
    # One that sends half a request holds the way down by itself until the second signal.
    place = socket.create_connection(("127.0.0.1", int(patient.url.rpartition(":")[2])))
    place.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    )
    patient.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    patient.process.send_signal(signal.SIGINT)
    assert patient.end() == 130
    place.close()
    stream.close()
    assert "Traceback" not in patient.stderr


def test_what_keeps_it_from_starting_is_one_line(fails: Fails, diffusion_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        stderr = fails("serve", "--model", diffusion_folder, "--port", port)
        assert f"cannot listen at 127.0.0.1:{port}" in stderr
    assert "nowhere" in fails("serve", "--model", tmp_path / "nowhere", "--port", 0)
    assert "no.such.host.invalid" in fails("serve", "--model", diffusion_folder, "--host", "no.such.host.invalid", "--port", 0)
    fails("serve", "--model", diffusion_folder, "--max-concurrent", 0, names=("max_concurrent", 0))
    fails("serve", "--model", diffusion_folder, "--shutdown-grace", "inf", names=("shutdown_grace", "inf"))
    fails("serve", "--model", diffusion_folder, "--timeout", "nan", names=("timeout", "nan"))
    assert "api_keys" in fails("serve", "--model", diffusion_folder, "--api-key", "a b\u00e9")
    fails("serve", "--model", diffusion_folder, "--cache-tokens", 0, names=("cache_tokens", 0))


def test_a_port_out_of_range_is_told(run: Callable[..., Any], diffusion_folder: Path) -> None:
    result = run("serve", "--model", diffusion_folder, "--port", 65536)
    assert result.exit_code == 2
    assert "65535" in result.stderr
    assert "Traceback" not in result.stderr
