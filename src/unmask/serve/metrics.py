"""What Prometheus is told.

Owns the names of the metrics. Each application has a registry of its own, so that several can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unmask.engine.engine import Engine
from unmask.engine.request import Completion

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PER_FORWARD = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 24, 32)
_PER_SECOND = (1, 2.5, 5, 10, 25, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry, "namespace": "unmask"}
        self.responses = Counter("http_requests", "Answered HTTP requests.", ["path", "status"], **made)
        self.seconds = Histogram("request_seconds", "From request to last byte.", ["path"], buckets=_SECONDS, **made)
        self.first_token = Histogram("time_to_first_token_seconds", "Until text is final.", buckets=_SECONDS, **made)
        self.aborts = Counter("aborts", "Completions that did not end by themselves.", ["reason"], **made)
        self._queue = Histogram("queue_seconds", "Waiting for a place.", buckets=_SECONDS, **made)
        self._per_forward = Histogram("tokens_per_forward", "Of a completion, all forwards.", buckets=_PER_FORWARD, **made)
        self._per_second = Histogram("tokens_per_second", "Of a completion, once begun.", buckets=_PER_SECOND, **made)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **made)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts found in the cache.", **made)
        self._tokens = Counter("completion_tokens", "Tokens of completions.", **made)
        self._forwards = Counter("forwards", "Forwards that completions took part in.", **made)
        self._edits = Counter("edits", "Decided tokens that were replaced.", **made)
        self._preemptions = Counter("preemptions", "Completions that gave up their pages for a while.", **made)
        self._ended = Counter("completions", "Completions that ended by themselves.", ["finish_reason"], **made)

    def completed(self, completion: Completion) -> None:
        """A completion has ended by itself."""
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
        """Read sizes off the engine whenever somebody asks."""
        pages = Gauge("cache_pages", "Pages of the cache.", ["state"], registry=self._registry, namespace="unmask")
        requests = Gauge("requests", "Completions.", ["state"], registry=self._registry, namespace="unmask")
        sizes: dict[tuple[Gauge, str], Callable[[Engine], int]] = {
            (pages, "held"): lambda e: e.pool.num_held,
            (pages, "available"): lambda e: e.pool.num_available,
            (requests, "running"): lambda e: len(e.scheduler.running),
            (requests, "waiting"): lambda e: len(e.scheduler.waiting),
        }
        for (gauge, state), size in sizes.items():
            gauge.labels(state).set_function(lambda size=size: 0 if (e := engine()) is None else size(e))  # type: ignore[misc]

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
