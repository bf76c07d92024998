"""Prometheus metrics of the server.

Owns their names. Each application has a registry of its own, so that one process can hold several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unmask.engine.engine import Engine
from unmask.engine.request import Completion
from unmask.serve.vllm_metrics import VllmMetrics

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PER_FORWARD = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32)
_PER_SECOND = (1, 2.5, 5, 10, 25, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000)


class Metrics:
    """Counters, histograms and gauges of one application.

    Args:
        model_name: that clients use.
        max_loras: adapters that may be loaded; None: the server has none.

    Attributes:
        vllm: the same and more under vLLM's names.
    """

    def __init__(self, model_name: str, max_loras: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self.vllm = VllmMetrics(model_name, self.registry, max_loras)
        self._common: dict[str, Any] = {"registry": self.registry, "namespace": "unmask"}
        common = self._common
        self.responses = Counter("http_requests", "Answered HTTP requests.", ["path", "status"], **common)
        self.seconds = Histogram(
            "request_seconds", "From the request to the last byte of its response.", ["path"], buckets=_SECONDS, **common
        )
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From submission to the first final token.", buckets=_SECONDS, **common
        )
        self.aborts = Counter("aborts", "Completions ended from outside.", ["reason"], **common)
        self._queue = Histogram("queue_seconds", "Waiting in the queue.", buckets=_SECONDS, **common)
        self._per_forward = Histogram(
            "tokens_per_forward", "Of a completion, all forwards counted.", buckets=_PER_FORWARD, **common
        )
        self._per_second = Histogram("tokens_per_second", "Of a completion, waiting left out.", buckets=_PER_SECOND, **common)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **common)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts found in the KV cache.", **common)
        self._tokens = Counter("completion_tokens", "Tokens of completions.", **common)
        self._forwards = Counter("forwards", "Forwards that completions took part in.", **common)
        self._edits = Counter("edits", "Decided tokens that were replaced.", **common)
        self._preemptions = Counter("preemptions", "Completions whose cache blocks were taken for others.", **common)
        self._ended = Counter("completions", "Finished completions.", ["finish_reason"], **common)

    def completed(self, completion: Completion) -> None:
        """Count a finished completion."""
        costs, count = completion.costs, len(completion.ids)
        self._ended.labels(completion.finish_reason).inc()
        self._queue.observe(costs.queue_seconds)
        self._per_forward.observe(count / max(completion.forwards, 1))
        self._per_second.observe(count / max(costs.busy_seconds, 1e-6))
        self._cached.inc(costs.cached_tokens)
        self._tokens.inc(count)
        self._forwards.inc(completion.forwards)
        self._edits.inc(costs.edits)
        self._preemptions.inc(costs.preemptions)

    def observe_engine(self, engine: Callable[[], Engine | None]) -> None:
        """Report sizes of the engine's cache and queues, read at every scrape."""
        self.vllm.observe_engine(engine)
        cache_blocks = Gauge("kv_cache_blocks", "Blocks of the KV cache.", ["state"], **self._common)
        requests = Gauge("requests", "Completions.", ["state"], **self._common)
        sizes: dict[tuple[Gauge, str], Callable[[Engine], int]] = {
            (cache_blocks, "used"): lambda e: e.pool.num_used,
            (cache_blocks, "available"): lambda e: e.pool.num_available,
            (requests, "running"): lambda e: len(e.scheduler.running),
            (requests, "waiting"): lambda e: len(e.scheduler.waiting),
        }
        for (gauge, state), size in sizes.items():
            gauge.labels(state).set_function(lambda size=size: 0 if (e := engine()) is None else size(e))  # type: ignore[misc]

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
