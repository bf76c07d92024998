"""Workers behind gateways on loopback: one is killed, one drained, one added while clients stream; prefixes are found again."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway import GATEWAYS, Gateway, free_port
from gateway_worker import gateway_worker
from live import NAME

pytestmark = pytest.mark.slow
NUM_CLIENTS = 32
PROMPTS = [f"Tell me about number {number}." for number in range(NUM_CLIENTS)]
BODY = {"model": NAME, "max_tokens": 32, "ignore_eos": True, "stream": True}
NUM_WORKERS, NUM_CONVERSATIONS = 4, 18
TURNS = (160, 32, 32)
"""Letters, which are tokens, of a conversation's questions."""
by_package = pytest.mark.parametrize("gateway", GATEWAYS, ids=lambda gateway: gateway.package)


@dataclass
class Answer:
    """What a client received."""

    status: int = 0
    text: str = ""
    ends: int = 0
    error: str = ""
    ids: set[str] = field(default_factory=set)


async def ask(client: httpx2.AsyncClient, url: str, prompt: str, answer: Answer) -> None:
    """Stream one answer."""
    body = {**BODY, "messages": [{"role": "user", "content": prompt}]}
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            answer.status = response.status_code
            async for line in response.aiter_lines():
                take(answer, line)
    except httpx2.HTTPError as error:
        answer.error = repr(error)


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
    elif line and not line.startswith(":"):
        answer.error += line


async def ask_all(url: str, meanwhile: Callable[[], object] = lambda: None) -> list[Answer]:
    """All prompts at once; something happens as soon as a quarter of the answers have begun."""
    answers = [Answer() for _ in PROMPTS]
    async with httpx2.AsyncClient(timeout=300, limits=httpx2.Limits(max_connections=None)) as client:
        asking = [asyncio.create_task(ask(client, url, *each)) for each in zip(PROMPTS, answers, strict=True)]
        while sum(bool(answer.text) for answer in answers) < NUM_CLIENTS // 4 and not all(task.done() for task in asking):
            await asyncio.sleep(0.02)
        await asyncio.to_thread(meanwhile)
        await asyncio.gather(*asking)
    return answers


def check(answers: list[Answer], expected: list[str], *, may_break: bool = False) -> int:
    """Every answer is whole and given once, but for those that were cut after they had begun; how many."""
    num_cut = 0
    for answer, text in zip(answers, expected, strict=True):
        assert len(answer.ids) <= 1, f"two answers to one request: {answer}"
        if answer.ends == 1 and answer.text == text and not answer.error:
            continue
        assert may_break, f"lost: {answer}"
        assert answer.status == 200, f"lost before it had begun: {answer}"
        assert answer.ids, f"lost before it had begun: {answer}"
        assert text.startswith(answer.text)
        num_cut += 1
    return num_cut


@by_package
def test_a_worker_is_killed_one_added_one_drained(gateway: Gateway, tmp_path: Path) -> None:
    with ExitStack() as stack:
        ports = [free_port() for _ in range(3)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        killed, drained = (stack.enter_context(gateway_worker(tmp_path / str(port), port)) for port in ports[:2])
        killed.wait_ready()
        drained.wait_ready()
        known = urls if gateway.add is None else urls[:2]
        url = stack.enter_context(gateway.running(known, gateway.round_robin, tmp_path))
        expected = [answer.text for answer in asyncio.run(ask_all(killed.url))]
        assert all(expected)
        assert check(asyncio.run(ask_all(url)), expected) == 0

        num_cut = check(asyncio.run(ask_all(url, killed.process.kill)), expected, may_break=True)
        assert num_cut < NUM_CLIENTS

        added = stack.enter_context(gateway_worker(tmp_path / str(ports[2]), ports[2]))
        added.wait_ready()
        if gateway.add is not None:
            reply = gateway.add(url, added.url)
            assert reply.status_code in (200, 202), reply.text
        end = time.monotonic() + 120
        while not added.metric("vllm:request_success_total"):
            assert time.monotonic() < end, "the added worker gets no requests"
            assert check(asyncio.run(ask_all(url)), expected) == 0

        assert check(asyncio.run(ask_all(url, drained.drain)), expected) == 0
        assert drained.exit_code() == 0
        assert check(asyncio.run(ask_all(url)), expected) == 0
        assert added.process.is_alive()
        print(f"{gateway.package}: {num_cut} of {NUM_CLIENTS} streams were cut by SIGKILL, none by draining")


async def converse(url: str, *, ids: bool) -> None:
    """Conversations side by side, each turn with all that was said before; in an order that no policy of turns foresees."""
    choose = random.Random(1)
    conversations: list[list[dict[str, str]]] = [[] for _ in range(NUM_CONVERSATIONS)]
    async with httpx2.AsyncClient(timeout=300) as client:
        # As many at a time as there are workers: a full one would be left for an empty one, whatever it holds.
        places = asyncio.Semaphore(NUM_WORKERS)

        async def take_turn(messages: list[dict[str, str]], text: str) -> None:
            messages.append({"role": "user", "content": text})
            body: dict[str, Any] = {"model": NAME, "max_tokens": 8, "ignore_eos": True}
            if ids:
                body["prompt"] = [ord(letter) for message in messages for letter in message["content"]]
            else:
                body["messages"] = messages
            async with places:
                response = await client.post(f"{url}/v1/{'' if ids else 'chat/'}completions", json=body)
            assert response.status_code == 200, response.text
            if not ids:
                messages.append(response.json()["choices"][0]["message"])

        for num_letters in TURNS:
            texts = ["".join(choose.choices("abcdefghij", k=num_letters)) for _ in conversations]
            order = choose.sample(range(NUM_CONVERSATIONS), NUM_CONVERSATIONS)
            await asyncio.gather(*(take_turn(conversations[number], texts[number]) for number in order))


@by_package
def test_conversations_find_their_prefixes_where_they_were(gateway: Gateway, tmp_path: Path) -> None:
    if not gateway.cache_aware:
        pytest.skip(f"{gateway.package} does not route by prefixes")
    hits: dict[str, float] = {}
    for policy in (gateway.round_robin, gateway.cache_aware):
        with ExitStack() as stack:
            folder = tmp_path / policy
            folder.mkdir()
            ports = [free_port() for _ in range(NUM_WORKERS)]
            workers = [
                stack.enter_context(gateway_worker(folder / str(port), port, seconds=0.01, context=1024)) for port in ports
            ]
            for worker in workers:
                worker.wait_ready()
            url = stack.enter_context(gateway.running([worker.url for worker in workers], policy, folder))
            asyncio.run(converse(url, ids=gateway.takes_ids))
            asked = [worker.metric("vllm:prefix_cache_queries_total") for worker in workers]
            hits[policy] = sum(worker.metric("vllm:prefix_cache_hits_total") for worker in workers) / sum(asked)
            print(f"{gateway.package} {policy}: prompt tokens of each worker: {asked}")
    print(f"{gateway.package}: " + ", ".join(f"{policy} {rate:.0%} of prompt tokens cached" for policy, rate in hits.items()))
    assert hits[gateway.cache_aware] >= 2 * hits[gateway.round_robin]
