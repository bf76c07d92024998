"""deploy/ray_serve.py on one node of Ray: the server's streams, more replicas under load, answers finished while it ends."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from gateway import free_port

from runs import tiny_folder

pytestmark = pytest.mark.slow
MAX_TOKENS = 1500
NUM_CLIENTS = 6


@pytest.fixture(scope="module")
def ray_serve(ray_token: None) -> ModuleType:
    """The module."""
    pytest.importorskip("ray")
    path = Path(__file__).parents[2] / "deploy/ray_serve.py"
    spec = importlib.util.spec_from_file_location("ray_serve", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_serve"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def url(ray_serve: ModuleType, tmp_path: Path) -> Iterator[str]:
    """Where it serves a tiny model."""
    import ray
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(ray_serve)
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80_000_000,
        runtime_env={"env_vars": environment},
    )
    model, port = tiny_folder(tmp_path / "model", max_positions=4096), free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = ray_serve.Settings(model=str(model), name="tiny", max_replicas=2, max_concurrent=1, quantize="none")
    serve.run(ray_serve.app(settings), name="unmask")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def num_replicas() -> int:
    """Replicas that run."""
    from ray import serve

    (deployment,) = serve.status().applications["unmask"].deployments.values()
    return int(deployment.replica_states.get("RUNNING", 0))


async def stream(client: httpx2.AsyncClient, url: str, number: int, begun: list[int]) -> str:
    """A whole streamed answer."""
    text, ended = "", False
    body: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7 + number], "max_tokens": MAX_TOKENS, "ignore_eos": True}
    async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                begun.append(number)
                text += "".join(choice["text"] for choice in chunk["choices"])
    assert ended
    return text


def test_streams_replicas_and_draining(ray_serve: ModuleType, url: str) -> None:
    from ray import serve

    async def converse() -> None:
        async with httpx2.AsyncClient(timeout=300) as client:
            assert (await client.get(f"{url}/v1/models")).json()["data"][0]["id"] == "tiny"
            begun: list[int] = []
            alone = [await stream(client, url, number, begun) for number in range(2)]
            assert begun.count(0) > 10, "it does not stream"
            end = time.monotonic() + 180
            while await asyncio.to_thread(num_replicas) < 2:
                assert time.monotonic() < end, "no second replica"
                texts = await asyncio.gather(*(stream(client, url, number % 2, []) for number in range(NUM_CLIENTS)))
                assert all(text == alone[number % 2] for number, text in enumerate(texts))
            begun = []
            last = [asyncio.create_task(stream(client, url, number, begun)) for number in range(2)]
            while len(set(begun)) < 2 and not all(task.done() for task in last):
                await asyncio.sleep(0.01)
            await asyncio.to_thread(serve.delete, "unmask")
            assert list(await asyncio.gather(*last)) == alone

    asyncio.run(converse())
