"""A server on loopback with a tiny random model, for tests that talk to it as clients do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from fastapi import FastAPI

from helpers import make_tokenizer
from tiny import tiny_model
from unmask.engine.backends.base import Backend
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.batch import Batch
from unmask.engine.llm import LanguageModel
from unmask.serve.app import create_app
from unmask.serve.config import ServerConfig
from unmask.serve.server import Server, listen, url_of
from unmask.serve.worker import Worker

# Qwen's way in short: it shows tools, writes calls and results. The marker is a token, so that a bias can bring it about.
HERMES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' + m.content }}{% for call in m.tool_calls or [] %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) + '
    "'}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NAME = "tiny"
CONTEXT = 256


class _Slow(TorchBackend):
    """A model that takes its time over every forward."""

    def __init__(self, model: Any, pace: SlowModel) -> None:
        super().__init__(model)
        self._pace = pace

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        time.sleep(self._pace.seconds)
        return super().forward(batch, kv_cache)


class SlowModel(LanguageModel):
    """A language model whose forwards take at least `seconds`, as set at the time."""

    seconds = 0.0

    def backend(self) -> Backend:
        return _Slow(self.transformer, self)


def served_model(
    folder: Path,
    *,
    diffusion: bool = True,
    seconds: float = 0.0,
    context: int = CONTEXT,
    shifted: bool = False,
    **tokenizer_options: Any,
) -> LanguageModel:
    """A random model in float64, so that a completion does not depend on its neighbours even in the last bit of a tie."""
    tokenizer = make_tokenizer(folder, mask_token="<file_sep>" if diffusion else None, **tokenizer_options)
    special: dict[str, Any] = {"mask_id": tokenizer.mask_id, "block_size": 8} if diffusion else {}
    special |= {"start_id": tokenizer.eos_id} if shifted else {"token_editing": diffusion}
    transformer = tiny_model(
        "llama",
        dtype=torch.float64,
        vocab_size=tokenizer.vocab_size,
        max_positions=context,
        eos_ids=(tokenizer.eos_id,),
        **special,
    )
    model = SlowModel(transformer, tokenizer, name=NAME)
    model.seconds = seconds
    return model


@dataclass
class Live:
    """A running server."""

    url: str
    app: FastAPI
    server: Server

    @property
    def worker(self) -> Worker:
        worker: Worker = self.app.state.unmask.worker
        return worker

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Until nothing is served, and what follows a response is done (its line in the log, its count in the metrics).

        Then no cache block may be used and the books must agree.
        """
        engine, end = self.worker.engine, time.monotonic() + seconds
        tasks = self.server.server_state.tasks
        while tasks or self.worker.num_requests or engine.has_work or engine.pool.num_used:
            assert time.monotonic() < end, (
                f"{len(tasks)} responses, {self.worker.num_requests} requests, "
                f"{engine.pool.num_used} cache blocks used, work: {engine.has_work}"
            )
            time.sleep(0.01)
        engine.pool.check()


@contextmanager
def live(model: LanguageModel, config: ServerConfig | None = None) -> Iterator[Live]:
    """Serve until the block ends."""
    config = config if config is not None else ServerConfig()
    app, listener = create_app(model, config), listen("127.0.0.1", 0)
    server = Server(app, config.shutdown_grace, config.max_connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        url = url_of(listener)
        _wait_ready(url)
        yield Live(url, app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def _wait_ready(url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if httpx2.get(f"{url}/ready").status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.02)
    raise AssertionError("the server did not become ready")
