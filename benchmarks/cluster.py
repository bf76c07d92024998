"""One, two and three workers behind one address: capacity, goodput, tail latencies and prefix hits under Poisson arrivals.

    python benchmarks/cluster.py [--router PYTHON] [--seconds 8] [--json]

Conversations of several turns share a system prompt; a request is the next turn of one that has been answered, or the first
of a new one. For each side its capacity is measured (requests per second with as many clients as it decodes for), and then
requests arrive as a Poisson process at 50, 80, 100 and 120% of it. Goodput counts requests whose first token came within 1 s
and whose last within 6 s (`--first`, `--total`).

Sides: one worker with all cores, and one, two and three with one thread each. On two cores, three workers share them, and the
clients share them with all. `--router` is a Python that has sglang-router, which routes by prefixes; without it, clients take
turns with the workers, as a router that knows nothing does.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx2
import openai
from common import answers_at, arguments, figure, print_json, results_path, write_results
from floors import machine
from rich.console import Console
from rich.table import Table

from serve import QUESTIONS
from unmask.serve.server import listen

NAME = "cluster"
SYSTEM = "You are a helpful assistant. Answer in one short sentence, in plain words, and do not repeat the question."
MAX_TOKENS, MAX_CONCURRENT, NUM_TURNS = 32, 16, 4
LEVELS = (0.5, 0.8, 1.0, 1.2)
LOG = Console(stderr=True)


@dataclass(frozen=True)
class Side:
    """So many workers, with so many threads each."""

    workers: int
    threads: int

    @property
    def name(self) -> str:
        """In tables and figures."""
        return f"{self.workers}x{self.threads}"


@dataclass(frozen=True)
class Timed:
    """A request; seconds from when it was sent."""

    first: float
    total: float


@dataclass
class Conversations:
    """The trace: who says what next.

    Attributes:
        choose: draws.
        waiting: conversations whose last answer is there.
    """

    choose: random.Random
    waiting: list[list[dict[str, str]]] = field(default_factory=list)

    def next(self) -> list[dict[str, str]]:
        """The messages of a request."""
        if self.waiting and self.choose.random() < 1 - 1 / NUM_TURNS:
            messages = self.waiting.pop(self.choose.randrange(len(self.waiting)))
        else:
            number = self.choose.randrange(10**6)
            messages = [{"role": "system", "content": f"{SYSTEM} This is conversation {number}."}]
        return [*messages, {"role": "user", "content": self.choose.choice(QUESTIONS)}]

    def answered(self, messages: list[dict[str, str]], text: str) -> None:
        """What a request was answered; after its last turn a conversation ends."""
        if len(messages) < 2 * NUM_TURNS:
            self.waiting.append([*messages, {"role": "assistant", "content": text}])


def free_port() -> int:
    """A port that nobody listens on."""
    with listen("127.0.0.1", 0) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], url: str, threads: int) -> Iterator[None]:
    """A process, once `url` answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        end = time.monotonic() + 120
        while not answers_at(url):
            if running.poll() is not None or time.monotonic() > end:
                sys.exit(f"error: {' '.join(command)} does not answer")
            time.sleep(0.2)
        yield
    finally:
        running.terminate()
        running.wait(60)


@contextmanager
def running(side: Side, model: str, router: str | None) -> Iterator[tuple[list[str], list[str]]]:
    """The workers' URLs, and those that clients ask."""
    with ExitStack() as stack:
        urls = []
        for _ in range(side.workers):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            command = [sys.executable, "-m", "unmask", "serve", "--model", model, "--name", NAME, "--port", str(port)]
            command += ["--max-concurrent", str(MAX_CONCURRENT), "--log-format", "json"]
            stack.enter_context(process(command, f"{urls[-1]}/ready", side.threads))
        if router is None or side.workers == 1:
            yield urls, urls
            return
        port = free_port()
        command = [router, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--policy", "cache_aware", "--prometheus-port", str(free_port()), "--worker-urls", *urls]
        stack.enter_context(process(command, f"http://127.0.0.1:{port}/health", 1))
        time.sleep(3)  # Workers are found meanwhile.
        yield urls, [f"http://127.0.0.1:{port}"]


async def ask(client: openai.AsyncOpenAI, messages: list[dict[str, str]], conversations: Conversations) -> Timed:
    """One streamed answer."""
    started = time.perf_counter()
    first, text = None, ""
    stream: Any = await client.chat.completions.create(
        model=NAME,
        messages=messages,  # type: ignore[arg-type]
        max_completion_tokens=MAX_TOKENS,
        temperature=0.0,
        stream=True,
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
            first = time.perf_counter() - started if first is None else first
    total = time.perf_counter() - started
    conversations.answered(messages, text)
    return Timed(total if first is None else first, total)


async def capacity(clients: Iterator[openai.AsyncOpenAI], side: Side, seconds: float, trace: Conversations) -> float:
    """Requests per second, each client asking again as soon as it is answered."""
    done = 0
    end = time.perf_counter() + seconds

    async def client_of() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await ask(next(clients), trace.next(), trace)
            done += 1

    started = time.perf_counter()
    await asyncio.gather(*(client_of() for _ in range(MAX_CONCURRENT * side.workers)))
    return done / (time.perf_counter() - started)


async def arrivals(
    clients: Iterator[openai.AsyncOpenAI], rate: float, seconds: float, trace: Conversations
) -> tuple[list[Timed], float]:
    """Answers to requests that arrive at this rate, and the seconds until the last was there."""
    asking: list[asyncio.Task[Timed]] = []
    started = time.perf_counter()
    at = trace.choose.expovariate(rate)
    while at < seconds or not asking:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        asking.append(asyncio.create_task(ask(next(clients), trace.next(), trace)))
        at += trace.choose.expovariate(rate)
    return list(await asyncio.gather(*asking)), time.perf_counter() - started


def cached(workers: Sequence[str]) -> tuple[float, float]:
    """Prompt tokens looked up in prefix caches so far, and those found."""
    lines = [line for url in workers for line in httpx2.get(f"{url}/metrics").text.splitlines()]

    def total(name: str) -> float:
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:prefix_cache_{name}_total{{"))

    return total("queries"), total("hits")


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(side: Side, workers: list[str], asked: list[str], options: Any) -> dict[str, Any]:
    """Capacity of a side, and what it does at every level of load."""
    trace = Conversations(random.Random(side.name))
    async with AsyncExitStack() as stack:
        options_of: dict[str, Any] = {"api_key": "none", "timeout": 600.0, "max_retries": 0}
        made = [await stack.enter_async_context(openai.AsyncOpenAI(base_url=f"{url}/v1", **options_of)) for url in asked]
        clients = cycle(made)
        for client in made:
            await ask(client, trace.next(), trace)
        most = await capacity(clients, side, options.seconds, trace)
        rows: dict[str, Any] = {}
        for level in LEVELS[-1:] if options.smoke else LEVELS:
            before = cached(workers)
            done, seconds = await arrivals(clients, level * most, options.seconds, trace)
            queries, hits = (after - start for after, start in zip(cached(workers), before, strict=True))
            good = [timed for timed in done if timed.first <= options.first and timed.total <= options.total]
            firsts, totals = [timed.first for timed in done], [timed.total for timed in done]
            rows[f"{level:g}"] = {
                "requests": len(done),
                "rate": level * most,
                "goodput": len(good) / max(seconds, options.seconds),
                "good_share": len(good) / len(done),
                "first": {"median": statistics.median(firsts), "p90": quantile(firsts, 0.9), "p99": quantile(firsts, 0.99)},
                "total": {"median": statistics.median(totals), "p90": quantile(totals, 0.9), "p99": quantile(totals, 0.99)},
                "hit_rate": hits / queries if queries else 0.0,
            }
    return {"capacity": most, "levels": rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-diffusion")
    parser.add_argument("--router", help="a Python that has sglang-router")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals at each level")
    parser.add_argument("--first", type=float, default=1.0, help="seconds within which a first token is good")
    parser.add_argument("--total", type=float, default=6.0, help="seconds within which an answer is good")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    cores = os.cpu_count() or 1
    sides = [Side(1, cores), *(Side(workers, 1) for workers in (1, 2, 3))]
    if options.smoke:
        sides, options.seconds = [Side(2, 1)], 0.2
    found = {}
    for side in sides:
        LOG.print(f"{side.workers} workers, {side.threads} threads each")
        with running(side, options.model, options.router) as (workers, asked):
            found[side.name] = asyncio.run(measure(side, workers, asked, options))
    figures = {f"{name}_capacity": figure(side["capacity"]) for name, side in found.items()}
    for count in (2, 3):
        if "1x1" in found and f"{count}x1" in found:
            efficiency = found[f"{count}x1"]["capacity"] / (min(count, cores) * found["1x1"]["capacity"])
            figures[f"{count}x1_efficiency"] = figure(efficiency)
    content = {"machine": machine(), "router": options.router is not None, "first": options.first, "total": options.total}
    write_results(results_path(options.results, "cluster"), {**content, "sides": found})
    if options.json:
        print_json(figures)
    else:
        show(found)


def show(found: dict[str, dict[str, Any]]) -> None:
    """The table of docs/cluster.md."""
    heads = (
        "workers x threads",
        "load",
        "requests/s",
        "goodput/s",
        "good",
        "first token, median",
        "99%",
        "answer, 99%",
        "cached",
    )
    table = Table(*heads)
    for name, side in found.items():
        for level, row in side["levels"].items():
            numbers = f"{row['rate']:.2f}", f"{row['goodput']:.2f}", f"{row['good_share']:.0%}"
            times = f"{row['first']['median']:.2f} s", f"{row['first']['p99']:.2f} s", f"{row['total']['p99']:.2f} s"
            table.add_row(name, f"{float(level):.0%}", *numbers, *times, f"{row['hit_rate']:.0%}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
