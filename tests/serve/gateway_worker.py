"""Workers for tests of gateways: processes that serve the same tiny model, forked from one that has imported PyTorch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx2
from live import CONTEXT, NAME, served_model

START_SECONDS = 300.0
"""For a process to answer: on a busy machine its imports take minutes."""


@dataclass(frozen=True)
class GatewayWorker:
    """A process that serves.

    Attributes:
        url: where.
        process: that serves.
        log: what it has printed.
    """

    url: str
    process: BaseProcess
    log: Path

    def wait_ready(self) -> None:
        """Until requests are served."""
        wait_for(f"{self.url}/ready", self.process.is_alive, self.log)

    def drain(self) -> None:
        """Ask it to end, as systemd and Kubernetes do."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM)

    def exit_code(self) -> int | None:
        """Of the process, once it has ended."""
        self.process.join(60)
        return self.process.exitcode

    def metric(self, name: str) -> float:
        """A metric of `/metrics`, summed over its labels."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


@contextmanager
def gateway_worker(
    folder: Path, port: int, *, seconds: float = 0.05, max_concurrent: int = 8, context: int = CONTEXT, cache_tokens: int = 4096
) -> Iterator[GatewayWorker]:
    """A worker that is killed when the block ends; its KV events are at the next port, and their replay at the one after.

    Args:
        folder: for its tokenizer and its log; made here.
        port: where it listens.
        seconds: that a forward takes.
        max_concurrent: completions decoded together.
        context: tokens of the model's context.
        cache_tokens: that the KV cache holds.
    """
    folder.mkdir()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["unmask.serve.server"])
    arguments = (folder, port, seconds, max_concurrent, context, cache_tokens)
    process = processes.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    try:
        yield GatewayWorker(f"http://127.0.0.1:{port}", process, folder / "log")
    finally:
        process.kill()
        process.join()


def _serve(folder: Path, port: int, seconds: float, max_concurrent: int, context: int, cache_tokens: int) -> None:
    import torch

    from unmask.serve.config import ServerConfig
    from unmask.serve.server import listen, run

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    model = served_model(folder, seconds=seconds, context=context)
    config = ServerConfig(
        names=(NAME,),
        max_concurrent=max_concurrent,
        cache_tokens=cache_tokens,
        kv_events=f"tcp://127.0.0.1:{port + 1}",
        kv_events_replay=f"tcp://127.0.0.1:{port + 2}",
    )
    run(model, config, listen("127.0.0.1", port), loopback=True)


def wait_for(url: str, is_alive: Callable[[], bool], log: Path) -> None:
    """Until it answers with 200."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert is_alive(), log.read_text()[-3000:]
        try:
            if httpx2.get(url, timeout=30).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} does not answer: {log.read_text()[-3000:]}")
