"""Workers behind gateways on loopback: one is killed, one drained, one added while clients stream.

`UNMASK_GATEWAYS` is a folder of virtual environments named as the gateways' packages (`python -m venv sglang-router &&
sglang-router/bin/pip install sglang-router`); those that are missing are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live import NAME

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
NUM_CLIENTS = 16
PROMPTS = [f"Tell me about number {number}." for number in range(NUM_CLIENTS)]
BODY = {"model": NAME, "max_tokens": 32, "ignore_eos": True, "stream": True}


@dataclass
class Answer:
    """What a client received."""

    status: int = 0
    text: str = ""
    ends: int = 0
    error: str = ""
    ids: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Gateway:
    """How a gateway is started, and how it learns of another worker."""

    package: str
    command: tuple[str, ...]
    add: Callable[[str, str], httpx2.Response]


def _post_worker(url: str, worker: str) -> httpx2.Response:
    return httpx2.post(f"{url}/workers", json={"url": worker})


COMMON = ("--host", "127.0.0.1", "--policy", "round_robin", "--health-check-interval-secs", "1")
GATEWAYS = (Gateway("sglang-router", ("python", "-m", "sglang_router.launch_router", *COMMON), _post_worker),)


def free_port() -> int:
    """A port that nobody listens on, below those that connections get."""
    while True:
        port = random.randint(12_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed when the block ends."""
    places = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as output:
        running = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
        )
    try:
        yield running
    finally:
        running.kill()
        running.wait(10)


def wait_for(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers with 200."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert running.poll() is None, log.read_text()[-3000:]
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


async def ask(client: httpx2.AsyncClient, url: str, prompt: str) -> Answer:
    """Stream one answer."""
    answer, body = Answer(), {**BODY, "messages": [{"role": "user", "content": prompt}]}
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            answer.status = response.status_code
            async for line in response.aiter_lines():
                take(answer, line)
    except httpx2.HTTPError as error:
        answer.error = repr(error)
    return answer


def take(answer: Answer, line: str) -> None:
    """A line of the stream."""
    if line == "data: [DONE]":
        answer.ends += 1
    elif line.startswith("data: "):
        chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            answer.error = str(chunk["error"])
            return
        answer.ids.add(chunk["id"])
        answer.text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    elif line:
        answer.error += line


async def ask_all(url: str, meanwhile: Callable[[], object], after: float) -> list[Answer]:
    """All prompts at once; something happens meanwhile."""
    async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=None)) as client:
        asking = [asyncio.create_task(ask(client, url, prompt)) for prompt in PROMPTS]
        await asyncio.sleep(after)
        await asyncio.to_thread(meanwhile)
        return list(await asyncio.gather(*asking))


def check(answers: list[Answer], expected: list[str], *, may_break: bool) -> int:
    """Every answer is whole and given once, but for those that were cut after they had begun; how many."""
    num_cut = 0
    for answer, text in zip(answers, expected, strict=True):
        assert len(answer.ids) <= 1, f"two answers to one request: {answer}"
        if answer.ends == 1 and not answer.error:
            assert answer.text == text
        else:
            assert may_break, f"lost: {answer}"
            assert answer.status == 200, f"lost before it had begun: {answer}"
            assert answer.ids, f"lost before it had begun: {answer}"
            assert text.startswith(answer.text)
            num_cut += 1
    return num_cut


@pytest.mark.parametrize("gateway", GATEWAYS, ids=lambda gateway: gateway.package)
def test_a_worker_is_killed_one_added_one_drained(gateway: Gateway, tmp_path: Path) -> None:
    place = Path(os.environ.get("UNMASK_GATEWAYS", "/nonexistent")) / gateway.package / "bin"
    if not place.is_dir():
        pytest.skip(f"{gateway.package} is not installed under UNMASK_GATEWAYS")
    with ExitStack() as stack:

        def start_worker(name: str) -> tuple[str, subprocess.Popen[bytes]]:
            port = free_port()
            command = [sys.executable, str(HERE / "gateway_worker.py"), str(port), str(tmp_path / name)]
            url = f"http://127.0.0.1:{port}"
            return url, stack.enter_context(process(command, tmp_path / f"{name}.log"))

        names = ("first", "second", "third")
        (first, killed), (second, drained), (third, added) = workers = [start_worker(name) for name in names]
        for name, (worker, running) in zip(names, workers, strict=True):
            wait_for(f"{worker}/ready", running, tmp_path / f"{name}.log")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        program, *options = gateway.command
        command = [str(place / program), *options, "--port", str(port), "--prometheus-port", str(free_port())]
        command += ["--worker-urls", first, second]
        running = stack.enter_context(process(command, tmp_path / "gateway.log"))
        wait_for(f"{url}/health", running, tmp_path / "gateway.log")
        expected = [answer.text for answer in asyncio.run(ask_all(first, lambda: None, 0.0))]
        assert all(expected)
        assert check(asyncio.run(ask_all(url, lambda: None, 0.0)), expected, may_break=False) == 0

        num_cut = check(asyncio.run(ask_all(url, killed.kill, 1.0)), expected, may_break=True)
        assert num_cut <= NUM_CLIENTS // 2 + 1

        assert gateway.add(url, third).status_code in (200, 202)
        end = time.monotonic() + 30
        while "vllm:request_success_total{" not in httpx2.get(f"{third}/metrics").text:
            assert time.monotonic() < end, "the added worker gets no requests"
            assert check(asyncio.run(ask_all(url, lambda: None, 0.0)), expected, may_break=False) == 0

        terminate = asyncio.run(ask_all(url, lambda: drained.send_signal(signal.SIGTERM), 1.0))
        assert check(terminate, expected, may_break=False) == 0
        assert drained.wait(30) == 0
        assert check(asyncio.run(ask_all(url, lambda: None, 0.0)), expected, may_break=False) == 0
        assert added.poll() is None
