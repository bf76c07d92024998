"""Many clients at once get, each of them, what they would get alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asking import HELLO, HTTP, Reply, ask, ask_async, connect_async
from live import Live, live, served_model

from unmask.engine.llm import LanguageModel
from unmask.serve.config import ServerConfig

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "max_tokens": 60}
OTHER = [{"role": "system", "content": "State the final answer."}, {"role": "user", "content": "What is 2 + 3?"}]
LONG = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 6}]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
EDITING = {"extra_body": {"diffusion": {"edit_threshold": 0.2, "max_post_steps": 3, "min_new_tokens": 9}}}
WATCHED = {"extra_body": {"diffusion": {"watch": True}}, **USAGE}
CLIENTS: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"messages": HELLO, "max_tokens": 40}),
    ("chat", {"messages": HELLO, "max_tokens": 33, "temperature": 1.5, "seed": 1, **USAGE}),
    ("chat", {"messages": HELLO, "max_tokens": 33, "temperature": 1.5, "seed": 2, "n": 2}),
    ("chat", {"messages": HELLO, "max_tokens": 40, "temperature": 1.5, "seed": 3, "n": 2, "stop": ["}", "sys"], **USAGE}),
    ("chat", {"messages": OTHER, "temperature": 1.5, "seed": 4, **JSON}),
    ("chat", {"messages": OTHER, "temperature": 1.5, "seed": 5, "n": 2, **JSON, **USAGE}),
    ("chat", {"messages": OTHER, "max_tokens": 24, "logprobs": True, "top_logprobs": 2, "temperature": 1.0, "seed": 6}),
    ("chat", {"messages": OTHER, "max_tokens": 24, "logit_bias": {"0": 4}, "temperature": 1.5, "seed": 7, **USAGE}),
    ("chat", {"messages": LONG, "max_tokens": 24, "temperature": 0.7, "top_p": 0.9, "seed": 8}),
    ("chat", {"messages": LONG, "max_tokens": 24, **EDITING, **USAGE}),
    ("chat", {"messages": LONG, "max_tokens": 24, "temperature": 1.5, "seed": 9, **WATCHED}),
    ("completions", {"prompt": "The quick", "max_tokens": 30}),
    ("completions", {"prompt": ["The quick", "Hello"], "max_tokens": 20, "n": 2, "temperature": 1.5, "seed": 10, **USAGE}),
    ("completions", {"prompt": "What is", "max_tokens": 30, "stop": "e", "temperature": 1.5, "seed": 11}),
    ("completions", {"prompt": "The quick", "max_tokens": 30, "logprobs": 1, "temperature": 1.5, "seed": 12, **USAGE}),
    ("completions", {"prompt": [5, 6, 7, 8] * 20, "max_tokens": 50, "temperature": 1.5, "seed": 13, **USAGE}),
]


@pytest.fixture(scope="module", params=["roomy", "tight"])
def place(request: pytest.FixtureRequest, tiny: LanguageModel) -> Iterator[Live]:
    """Room for all of them, or so little that they queue and push each other out of the cache."""
    tight = ServerConfig(max_concurrent=12, cache_tokens=288)
    with live(tiny, tight if request.param == "tight" else None) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="module")
def alone(site: Live) -> list[Reply]:
    """Every request with nothing beside it."""
    return [_ask(site.url, *client) for client in CLIENTS]


def _ask(url: str, endpoint: str, body: dict[str, Any]) -> Reply:
    return ask(url, "stream" if body.get("stream") else "plain", endpoint=endpoint, **body)


def test_the_requests_are_sixteen_and_differ(alone: list[Reply]) -> None:
    assert len(CLIENTS) == 16
    assert len({str(reply) for reply in alone}) == 16
    assert {received.finish_reason for reply in alone for received in reply.choices} == {"stop", "length"}


def test_together_as_alone(place: Live, alone: list[Reply], monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = []
    submit = place.worker.submit

    def counted(*arguments: Any, **options: Any) -> Any:
        job = submit(*arguments, **options)
        crowd.append(place.worker.num_requests)
        return job

    monkeypatch.setattr(place.worker, "submit", counted)

    async def together() -> list[Reply]:
        async with connect_async(place.url) as client:
            asked = [ask_async(client, endpoint, {"model": "tiny", **body}) for endpoint, body in CLIENTS]
            return await asyncio.gather(*asked)

    assert asyncio.run(together()) == alone
    assert max(crowd) > 8, "they were not together"


def test_together_as_alone_from_threads(place: Live, alone: list[Reply]) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda client: _ask(place.url, *client), CLIENTS[::-1])) == alone[::-1]


def test_the_tight_one_was_tight(place: Live, alone: list[Reply]) -> None:
    """Else it says no more than the roomy one."""
    text = place.app.state.unmask.metrics.text().decode()
    (count,) = [float(line.split()[1]) for line in text.splitlines() if line.startswith("unmask_preemptions_total")]
    assert (count > 0) == (place.worker.engine.pool.num_cache_blocks * 8 == 288)


def test_waiting_is_no_decoding(tmp_path: Path) -> None:
    with live(served_model(tmp_path, seconds=0.03), ServerConfig(max_concurrent=1)) as running:
        whole = HTTP.post(
            f"{running.url}/v1/chat/completions",
            json={"model": "tiny", "messages": HELLO, "max_tokens": 8, "ignore_eos": True, "n": 3, "stream": True},
        )
    events = [json.loads(line[6:]) for line in whole.text.split("\n") if line.startswith("data: {")]
    costs = [event["diffusion"] for event in events if "diffusion" in event]
    assert len(costs) == 3
    assert costs[2]["queue_seconds"] > costs[0]["seconds"]
    assert costs[2]["seconds"] < costs[2]["queue_seconds"] + 0.1
    assert costs[2]["tokens_per_second"] == pytest.approx(8 / costs[2]["seconds"], rel=0.05)
