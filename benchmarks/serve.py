"""Throughput and time to first token of the server, at 1, 4, 16 and 64 clients.

    python benchmarks/serve.py [--quick] [--clients 1 4 16 64] [--rival PYTHON] [--gguf FILE] [--json]

Every client asks, reads the streamed answer, waits for an exponentially distributed time (mean 0.5 s, so that requests
arrive as a Poisson process as long as answers are short), and asks again. All servers run on loopback, each alone, and take
turns at every level; the clients share the cores with them. Answers are greedy, of at most 64 tokens; what they are worth is
`decode.py`'s and `vs_llamacpp.py`'s business.

Sides: our server with the model converted in full and with the autoregressive model it came from (both int8), and
llama-cpp-python's server on the same autoregressive weights (Q4_1), where `--rival` names a Python that has it:

    python -m venv rival && rival/bin/pip install 'llama-cpp-python[server]'    # compiles for several minutes
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
from common import answers_at, arguments
from floors import machine
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from unmask.models.weights.hub import embedded_gguf
from unmask.serve.server import listen

PAUSE_SECONDS = 0.5
MAX_TOKENS = 64
UP = (200, 404)
"""llama-cpp-python's server has no /ready: 404 says that it is there."""
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why do we need to sleep?",
    "What is the moon?",
    "Give me a tip for learning a new language.",
    "How do plants grow?",
    "What is 12 + 30?",
    "Who wrote Romeo and Juliet?",
    "What does a doctor do?",
    "Tell me about the ocean.",
    "What is a computer?",
    "Name a large animal.",
)
LOG = Console(stderr=True)


@dataclass(frozen=True)
class Served:
    """One streamed answer; times in seconds from the request."""

    tokens: int
    first: float
    total: float


@dataclass(frozen=True)
class Side:
    """A server to measure: how to start it on a port, and what it calls its model."""

    name: str
    command: tuple[str, ...]
    model: str


def sides(model: str, parent: str, rival: str | None, gguf: Path | None) -> list[Side]:
    """The servers there are."""
    ours = (sys.executable, "-m", "unmask", "serve", "--log-format", "json", "--max-queue", "256")
    found = [
        Side("diffusion int8", (*ours, "--model", model), model),
        Side("autoregressive int8", (*ours, "--model", parent), parent),
    ]
    if rival is not None:
        path, threads = str(gguf or embedded_gguf().path), str(os.cpu_count() or 1)
        command = (rival, "-m", "llama_cpp.server", "--model", path, "--model_alias", "rival", "--n_threads", threads)
        found.append(
            Side(
                "llama-cpp-python Q4_1",
                (*command, "--n_ctx", "2048", "--verbose", "False", "--interrupt_requests", "False"),
                "rival",
            )
        )
    return found


@contextmanager
def running(side: Side) -> Iterator[str]:
    """The server's address, once it answers."""
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*side.command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for path in ("/ready", "/v1/models"):
            end = time.monotonic() + 120
            while not answers_at(url + path, UP) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
            if answers_at(url + path, UP):
                break
        if process.poll() is not None:
            sys.exit(f"error: {' '.join(side.command)} ended with {process.returncode}")
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def ask(client: openai.AsyncOpenAI, model: str, question: str) -> Served:
    """One streamed answer."""
    started = time.perf_counter()
    first, chunks, told = None, 0, None
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=openai.omit if model == "rival" else MAX_TOKENS,
        max_tokens=MAX_TOKENS if model == "rival" else openai.omit,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            chunks += 1
            first = time.perf_counter() - started if first is None else first
        told = chunk.usage.completion_tokens if chunk.usage else told
    total = time.perf_counter() - started
    # The rival sends a chunk per token where it does not count them.
    return Served(chunks if told is None else told, total if first is None else first, total)


async def load(url: str, model: str, clients: int, each: int, seed: int) -> tuple[list[Served], float]:
    """What `clients` clients got for `each` questions, and how long all of it took."""
    done: list[Served] = []

    async def client_of(number: int, client: openai.AsyncOpenAI) -> None:
        drawn = random.Random(f"{seed}-{number}")
        for _ in range(each):
            await asyncio.sleep(drawn.expovariate(1 / PAUSE_SECONDS))
            done.append(await ask(client, model, drawn.choice(QUESTIONS)))

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600.0) as client:
        await ask(client, model, QUESTIONS[0])  # so that nobody pays for warming up
        started = time.perf_counter()
        await asyncio.gather(*(client_of(number, client) for number in range(clients)))
        return done, time.perf_counter() - started


def figures(done: Sequence[Served], seconds: float) -> dict[str, float]:
    """What a table row shows."""
    firsts = sorted(served.first for served in done)
    speeds = [served.tokens / served.total for served in done if served.tokens]
    return {
        "requests": len(done),
        "tokens_per_second": sum(served.tokens for served in done) / seconds,
        "requests_per_second": len(done) / seconds,
        "first_median": statistics.median(firsts),
        "first_p90": firsts[int(0.9 * (len(firsts) - 1))],
        "seconds_median": statistics.median(served.total for served in done),
        "client_tokens_per_second": statistics.median(speeds) if speeds else 0.0,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--model", default="smollm2-135m-converted")
    parser.add_argument("--autoregressive", default="smollm2-135m")
    parser.add_argument("--rival", help="a Python that has llama-cpp-python[server]")
    parser.add_argument("--gguf", type=Path, help="its weights; default: those of the embedded model")
    parser.add_argument("--quick", action="store_true", help="1 and 4 clients, few questions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    levels = [1] if options.smoke else [1, 4] if options.quick else options.clients
    found: dict[str, dict[str, dict[str, float]]] = {}
    with Progress(console=LOG, transient=True) as progress:
        all_sides = sides(options.model, options.autoregressive, options.rival, options.gguf)
        task = progress.add_task("serving", total=len(levels) * len(all_sides))
        for clients in levels:
            each = 1 if options.smoke else max(2, (4 if options.quick else 16) // clients)
            for side in all_sides:
                progress.update(task, description=f"{clients} clients: {side.name}")
                with running(side) as url:
                    done, seconds = asyncio.run(load(url, side.model, clients, each, seed=clients))
                found.setdefault(str(clients), {})[side.name] = figures(done, seconds)
                progress.advance(task)
    if options.json:
        print(json.dumps({"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "clients": found}, indent=1))
    else:
        show(found)


def show(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The table of docs/serving.md."""
    heads = ("clients", "server", "tokens/s", "requests/s", "first token, median", "90%", "whole answer", "tokens/s a client")
    table = Table(*heads)
    for clients, by_side in found.items():
        for name, row in by_side.items():
            numbers = (
                f"{row['tokens_per_second']:.0f}",
                f"{row['requests_per_second']:.2f}",
                *(f"{row[key]:.2f} s" for key in ("first_median", "first_p90", "seconds_median")),
                f"{row['client_tokens_per_second']:.0f}",
            )
            table.add_row(clients, name, *numbers)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
