"""The gateways that tests put before workers: how each is started, and how it learns of another worker.

`UNMASK_GATEWAYS` is a folder of virtual environments named as the gateways' packages (`python -m venv sglang-router &&
sglang-router/bin/pip install sglang-router`); those that are missing are skipped.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from gateway_worker import wait_for
from live import NAME

HEALTH_SECONDS = 1
"""Between two questions of a gateway whether a worker lives."""


@dataclass(frozen=True)
class Gateway:
    """A gateway.

    Attributes:
        package: on PyPI, and its virtual environment's name.
        command: starts it: of its folder of programs, its port, the workers' URLs, the policy, and a folder for its files.
        round_robin: its policy of turns.
        cache_aware: its policy by prefixes; empty: it has none.
        takes_ids: it knows prefixes of prompts that are token ids, and not those of texts.
        health: path that answers with 200.
        add: tells a running gateway (URL) of a worker (URL); None: it must be told when it is started.
    """

    package: str
    command: Callable[[Path, int, Sequence[str], str, Path], list[str]]
    round_robin: str = "round_robin"
    cache_aware: str = "cache_aware"
    takes_ids: bool = False
    health: str = "/health"
    add: Callable[[str, str], httpx2.Response] | None = None

    @contextmanager
    def running(self, workers: Sequence[str], policy: str, folder: Path) -> Iterator[str]:
        """Its URL while it runs before these workers."""
        programs = Path(os.environ.get("UNMASK_GATEWAYS", "/nonexistent")) / self.package / "bin"
        if not programs.is_dir():
            pytest.skip(f"{self.package} is not installed under UNMASK_GATEWAYS")
        port, log = free_port(), folder / f"{self.package}-{policy}.log"
        with log.open("wb") as output:
            command = self.command(programs, port, workers, policy, folder)
            # LiteLLM's proxy would not start without a key.
            environment = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}{self.health}", lambda: process.poll() is None, log)
            _wait_until_served(url)
            yield url
        finally:
            process.kill()
            process.wait(10)


def _wait_until_served(url: str) -> None:
    """It may be healthy before it knows its workers."""
    body = {"model": NAME, "prompt": "Hello", "max_tokens": 1}
    end = time.monotonic() + 60
    while (response := httpx2.post(f"{url}/v1/completions", json=body, timeout=60)).status_code != 200:
        assert time.monotonic() < end, response.text
        time.sleep(0.2)
    time.sleep(HEALTH_SECONDS)


_PORTS = iter(random.Random(os.getpid()).sample(range(20_000, 32_000, 4), 3_000))
"""Above those of Ray's workers, below those that connections get; each is given once, with three behind it, where a worker
may publish."""


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _router(*program: str, more: Sequence[str] = ()) -> Callable[[Path, int, Sequence[str], str, Path], list[str]]:
    """The command of SGLang's router and its descendants, with more options."""

    def command(programs: Path, port: int, workers: Sequence[str], policy: str, folder: Path) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--policy", policy]
        options += ["--health-check-interval-secs", str(HEALTH_SECONDS)]
        return [str(programs / program[0]), *program[1:], *options, *more, "--worker-urls", *workers]

    return command


def _vllm_router(programs: Path, port: int, workers: Sequence[str], policy: str, folder: Path) -> list[str]:
    """With `kv_aware` it follows the workers' KV events."""
    command = _router("vllm-router")(programs, port, workers, policy, folder)
    if policy == "kv_aware":
        ports = [int(url.rsplit(":", 1)[1]) for url in workers]
        command += ["--kv-event-model", NAME, "--kv-event-block-size", "8"]  # of the model's blocks
        for url, worker in zip(workers, ports, strict=True):
            command += ["--kv-event-source", f"{url}=tcp://127.0.0.1:{worker + 1}"]
            command += ["--kv-event-replay-source", f"{url}=tcp://127.0.0.1:{worker + 2}"]
    return command


def _litellm(programs: Path, port: int, workers: Sequence[str], policy: str, folder: Path) -> list[str]:
    """LiteLLM's proxy: one deployment per worker, all of one name."""
    deployments = [
        {"model_name": NAME, "litellm_params": {"model": f"openai/{NAME}", "api_base": f"{url}/v1", "api_key": "none"}}
        for url in workers
    ]
    # One that failed is left alone for a while, so that retries find the others.
    router = {"routing_strategy": policy, "num_retries": 10, "allowed_fails": 0, "cooldown_time": 5, "retry_after": 0}
    path = folder / "litellm.yaml"
    path.write_text(json.dumps({"model_list": deployments, "router_settings": router}))
    return [str(programs / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]


def _post_workers(url: str, worker: str) -> httpx2.Response:
    return httpx2.post(f"{url}/workers", json={"url": worker}, timeout=60)


def _post_add_worker(url: str, worker: str) -> httpx2.Response:
    return httpx2.post(f"{url}/add_worker", params={"url": worker}, timeout=60)


GATEWAYS = (
    Gateway("sglang-router", _router("python", "-m", "sglang_router.launch_router"), add=_post_workers),
    # It asks no more of a worker that has 8 requests waiting, as it reads every 10 s, and these clients come all at once.
    Gateway("smg", _router("smg", "launch", more=("--worker-overload-waiting-requests", "1000")), add=_post_workers),
    Gateway("vllm-router", _vllm_router, cache_aware="kv_aware", takes_ids=True, add=_post_add_worker),
    Gateway("litellmproxy", _litellm, "simple-shuffle", cache_aware="", health="/health/liveliness"),
)
