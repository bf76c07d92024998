"""Memory of the server, and how long others wait while it reads a long prompt.

    python benchmarks/memory.py [--requests 100] [--long 7000] [--json]

M1: resident memory (VmRSS) of `unmask serve --quantize int8` when it is ready and after as many requests, 4 at a time, no two
alike. Target: at most 3 times the packed weights and 250 MB.

M2: four clients ask short questions, one after the other, and stream the answers; meanwhile one prompt of so many tokens is
read.
Reported is the longest time that any of them saw no text, without and with the long prompt, and how long that took.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
from common import answers_at, arguments, results_path, write_results
from rich.console import Console

import unmask
from unmask.models.weights.hub import resolve
from unmask.serve.server import listen

LOG = Console(stderr=True)
MB = 1e6


@contextmanager
def serving(model: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server that is ready."""
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    command = (sys.executable, "-m", "unmask", "serve", "--model", model, "--quantize", "int8", "--port", str(port))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers_at(f"{url}/ready"):
            if process.poll() is not None:
                sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def resident_mb(pid: int) -> float:
    """VmRSS."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024 / MB


def weights_mb(model: str) -> float:
    """One byte for each weight of the model, which is what 8 bits are."""
    return unmask.load(resolve(model), dtype="bfloat16").transformer.num_parameters() / MB


async def ask(client: openai.AsyncOpenAI, model: str, question: str, max_tokens: int) -> float:
    """Stream an answer; the longest wait for text, in seconds."""
    last, longest = time.perf_counter(), 0.0
    stream = await client.completions.create(
        model=model, prompt=question, max_tokens=max_tokens, temperature=0.0, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


async def measure(url: str, pid: int, model: str, requests: int, long: int) -> dict[str, Any]:
    """The figures of one server."""
    found: dict[str, Any] = {"ready_mb": resident_mb(pid)}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600.0) as client:
        questions = iter(range(10**9))

        async def client_of(count: int) -> float:
            return max([await ask(client, model, f"{next(questions)} questions about the sea:", 48) for _ in range(count)])

        await asyncio.gather(*(client_of(-(-requests // 4)) for _ in range(4)))
        found["after_requests_mb"] = resident_mb(pid)
        found["longest_wait_alone"] = max(await asyncio.gather(*(client_of(2) for _ in range(4))))
        done = asyncio.Event()

        async def beside() -> float:
            longest = await client_of(1)
            while not done.is_set():
                longest = max(longest, await client_of(1))
            return longest

        others = [asyncio.create_task(beside()) for _ in range(4)]
        started = time.perf_counter()
        ids: Any = [40 + number % 200 for number in range(long)]
        await client.completions.create(model=model, prompt=ids, max_tokens=1)
        found["long_prompt_seconds"] = time.perf_counter() - started
        done.set()
        found["longest_wait_beside"] = max(await asyncio.gather(*others))
        found["after_long_prompt_mb"] = resident_mb(pid)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-diffusion")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--long", type=int, default=7000, help="tokens of the long prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    requests, long = (4, 40) if options.smoke else (options.requests, options.long)
    with serving(options.model) as (url, pid):
        found = asyncio.run(measure(url, pid, options.model, requests, long))
    found["target_mb"] = 3 * weights_mb(options.model) + 250
    found |= {"requests": requests, "long": long, "cores": os.cpu_count()}
    write_results(results_path(options.results, "memory"), found)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    LOG.print(
        f"M1: {found['ready_mb']:.0f} MB when ready, {found['after_requests_mb']:.0f} MB after {requests} requests, "
        f"{found['after_long_prompt_mb']:.0f} MB after a prompt of {long} tokens (target {found['target_mb']:.0f} MB)"
    )
    LOG.print(
        f"M2: longest wait for text {found['longest_wait_alone']:.2f} s, beside the long prompt "
        f"{found['longest_wait_beside']:.2f} s; the long prompt took {found['long_prompt_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
