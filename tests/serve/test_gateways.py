"""What gateways ask of a worker: vLLM's metrics, health by generating, descriptions, several names."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asking import HELLO, HTTP, connect
from live import Live, SlowModel, live

from unmask.engine.llm import LanguageModel
from unmask.serve.api import gateways
from unmask.serve.config import ServerConfig

BLOCK = 8
SAMPLE_LABELS = {"model_name": "first", "engine": "0"}


@pytest.fixture(scope="module")
def worker(tiny: LanguageModel) -> Iterator[Live]:
    """The model, served under two names."""
    with live(tiny, ServerConfig(names=("first", "second"))) as site:
        yield site
        site.wait_idle()


def sample(site: Live, name: str, **labels: str) -> float:
    """A metric's value."""
    value = site.app.state.unmask.metrics.registry.get_sample_value(f"vllm:{name}", SAMPLE_LABELS | labels)
    assert value is not None, name
    return float(value)


def complete(site: Live, prompt: list[int], **fields: Any) -> dict[str, Any]:
    """A completion of token ids."""
    body = {"model": "first", "prompt": prompt, "max_tokens": BLOCK, "ignore_eos": True, **fields}
    answer = HTTP.post(f"{site.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


def test_the_prefix_cache_counts_tokens_of_a_conversation(worker: Live) -> None:
    first, second = list(range(20, 40)), list(range(20, 32)) + list(range(60, 73))
    before = sample(worker, "prefix_cache_queries_total"), sample(worker, "prefix_cache_hits_total")
    expected = [
        (first, 0),
        (first, 16),  # two whole blocks of 8
        (second, 8),  # 12 tokens in common
        ([*first, *range(80, 90)], 16),
        ([99, *first], 0),
    ]
    for prompt, num_cached in expected:
        assert complete(worker, prompt)["diffusion"]["cached_tokens"] == num_cached
    assert sample(worker, "prefix_cache_queries_total") - before[0] == sum(len(prompt) for prompt, _ in expected)
    assert sample(worker, "prefix_cache_hits_total") - before[1] == sum(num_cached for _, num_cached in expected)


def test_metrics_have_the_semantics_of_vllms(worker: Live) -> None:
    counters = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
    counters += ("e2e_request_latency_seconds_count", "inter_token_latency_seconds_count")
    counters += ("time_per_output_token_seconds_count", "request_queue_time_seconds_count")
    before = {name: sample(worker, name) for name in counters}
    complete(worker, list(range(100, 110)), max_tokens=3 * BLOCK, n=2, temperature=1.0)
    grown = {name: sample(worker, name) - before[name] for name in counters}
    assert grown["prompt_tokens_total"] == 2 * 10
    assert grown["generation_tokens_total"] == 2 * 3 * BLOCK
    assert grown["time_to_first_token_seconds_count"] == grown["e2e_request_latency_seconds_count"] == 2
    assert grown["request_queue_time_seconds_count"] == 2
    # Every token but those that came with the first.
    assert 2 * 2 * BLOCK <= grown["inter_token_latency_seconds_count"] < 2 * 3 * BLOCK
    assert grown["time_per_output_token_seconds_count"] == grown["inter_token_latency_seconds_count"]
    pool = worker.worker.engine.pool
    labels = {"block_size": str(BLOCK), "num_gpu_blocks": str(pool.num_cache_blocks), "enable_prefix_caching": "True"}
    assert sample(worker, "cache_config_info", **labels) == 1
    assert sample(worker, "request_success_total", finished_reason="length") >= 2
    worker.wait_idle()
    assert sample(worker, "kv_cache_usage_perc") == sample(worker, "gpu_cache_usage_perc") == 0
    assert 'vllm:num_requests_running{engine="0",model_name="first"} 0.0' in HTTP.get(f"{worker.url}/metrics").text


def test_running_and_waiting_requests_are_counted(tiny: LanguageModel) -> None:
    assert isinstance(tiny, SlowModel)
    with live(tiny, ServerConfig(names=("first",), max_concurrent=1)) as site:
        tiny.seconds = 0.05
        try:
            asking = threading.Thread(target=complete, args=(site, list(range(20, 30))), kwargs={"n": 3, "max_tokens": 3})
            asking.start()
            seen = set()
            while asking.is_alive():
                seen.add((sample(site, "num_requests_running"), sample(site, "num_requests_waiting")))
                assert 0 <= sample(site, "kv_cache_usage_perc") < 1
                time.sleep(0.01)
            asking.join()
        finally:
            tiny.seconds = 0.0
    assert (1, 2) in seen


def test_health_is_shown_by_a_token(worker: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sample(worker, "generation_tokens_total")
    assert HTTP.get(f"{worker.url}/health_generate").json() == {"status": "ok"}
    assert sample(worker, "generation_tokens_total") > before
    monkeypatch.setattr(gateways, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(worker.worker, "submit", lambda requests: _Dead())
    answer = HTTP.get(f"{worker.url}/health_generate")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unhealthy"


class _Dead:
    """A submission that the engine never serves."""

    unfinished = frozenset({0})

    def abort(self, reason: str) -> None:
        """Nothing to end."""


def test_a_full_queue_is_healthy_while_others_get_tokens(tiny: LanguageModel) -> None:
    assert isinstance(tiny, SlowModel)
    with live(tiny, ServerConfig(names=("first",), max_concurrent=1, max_queue=0)) as site:
        tiny.seconds = 0.01
        try:
            asking = threading.Thread(target=complete, args=(site, list(range(20, 30))), kwargs={"max_tokens": 32})
            asking.start()
            while not site.worker.num_requests:
                time.sleep(0.005)
            assert HTTP.get(f"{site.url}/health_generate").status_code == 200
            asking.join()
        finally:
            tiny.seconds = 0.0


def test_every_name_is_served_and_the_first_answers(worker: Live) -> None:
    with connect(worker.url) as client:
        assert [model.id for model in client.models.list()] == ["first", "second"]
        assert client.models.retrieve("second").to_dict()["root"] == "first"
        for name in ("first", "second"):
            answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=4)  # type: ignore[call-overload]
            assert answer.model == "first"
    answer = HTTP.post(f"{worker.url}/api/show", json={"model": "second:latest"})
    assert answer.status_code == 200
    answer = HTTP.post(f"{worker.url}/v1/completions", json={"model": "third", "prompt": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_model_and_server_are_described(worker: Live) -> None:
    about = HTTP.get(f"{worker.url}/get_model_info").json()
    assert (about["model_path"], about["is_generation"], about["max_context_length"]) == ("first", True, 256)
    assert about == HTTP.get(f"{worker.url}/model_info").json()
    pool = worker.worker.engine.pool
    about = HTTP.get(f"{worker.url}/server_info").json()
    assert about["max_total_num_tokens"] == pool.num_cache_blocks * BLOCK
    assert (about["status"], about["max_running_requests"], about["num_running_reqs"]) == ("ready", 16, 0)
    assert HTTP.get(f"{worker.url}/version").json()["version"]


def test_request_ids_are_passed_through(worker: Live) -> None:
    answer = HTTP.get(f"{worker.url}/health", headers={"x-request-id": "chatcmpl-7f3a"})
    assert answer.headers["x-request-id"] == "chatcmpl-7f3a"
