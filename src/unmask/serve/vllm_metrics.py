"""Metrics under vLLM's names, which gateways and autoscalers read, with the semantics that vLLM gives them.

Owns the names beginning with `vllm:`. Samples are labelled as vLLM's: by model and engine, of which a process has one; those of
adapters by their names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from unmask.engine.engine import Engine, Update
from unmask.engine.request import Request
from unmask.engine.sequences.base import DecodingSequence

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_LABELS = ("model_name", "engine")
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From submission to the first final token.", _SECONDS),
    "inter_token_latency_seconds": ("Between final tokens; those of one step share the time since the last.", _TOKEN_SECONDS),
    "time_per_output_token_seconds": ("The same, under its older name.", _TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("From submission to the end.", _SECONDS),
    "request_queue_time_seconds": ("Waiting in the queue.", _SECONDS),
}
_COUNTERS = {"prompt_tokens": "Tokens of prompts.", "generation_tokens": "Final tokens.", "num_preemptions": "Preemptions."}
_GAUGES: dict[str, tuple[str, Callable[[Engine], float]]] = {
    "num_requests_running": ("Completions that hold cache blocks.", lambda e: len(e.scheduler.running)),
    "num_requests_waiting": ("Completions that wait for their turn.", lambda e: len(e.scheduler.waiting)),
    "kv_cache_usage_perc": ("Used blocks of the KV cache; 1 is all.", lambda e: e.pool.num_used / e.pool.num_cache_blocks),
    "gpu_cache_usage_perc": ("The same, under its older name.", lambda e: e.pool.num_used / e.pool.num_cache_blocks),
}
_QUERIES: dict[str, tuple[str, Callable[[Engine], int]]] = {
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda e: e.scheduler.queried_tokens),
    "prefix_cache_hits": ("Prompt tokens found there.", lambda e: e.scheduler.hit_tokens),
}


@dataclass
class TokenTimes:
    """Times of one completion: of its submission, and of its last final tokens (None: it has none yet)."""

    started: float
    last: float | None = None


class VllmMetrics(Collector):
    """Metrics of one application under vLLM's names.

    Args:
        model_name: label of all of them.
        registry: where they are registered.
        max_loras: adapters that may be loaded; None: the server has none.
    """

    def __init__(self, model_name: str, registry: CollectorRegistry, max_loras: int | None = None) -> None:
        self._values, self._max_loras = (model_name, "0"), max_loras
        self._engine: Callable[[], Engine | None] = lambda: None
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, _LABELS, registry=registry, buckets=buckets).labels(*self._values)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(f"vllm:{name}", text, _LABELS, registry=registry).labels(*self._values)
            for name, text in _COUNTERS.items()
        }
        self._ended = Counter("vllm:request_success", "Finished completions.", (*_LABELS, "finished_reason"), registry=registry)
        registry.register(self)

    def observe_engine(self, engine: Callable[[], Engine | None]) -> None:
        """Read sizes and counts of this engine at every scrape."""
        self._engine = engine

    def observe(self, request: Request, update: Update, times: TokenTimes, now: float) -> None:
        """Count what an update brings; `times` of its completion are brought up to date."""
        count, completion = len(update.new_ids), update.completion
        if times.last is None and (count or completion is not None):
            self._counters["prompt_tokens"].inc(sum(token is not None for token in request.ids))
        if count:
            self._counters["generation_tokens"].inc(count)
            if times.last is None:
                self._histograms["time_to_first_token_seconds"].observe(now - times.started)
            else:
                for _ in range(count):
                    self._histograms["inter_token_latency_seconds"].observe((now - times.last) / count)
                    self._histograms["time_per_output_token_seconds"].observe((now - times.last) / count)
            times.last = now
        if completion is not None:
            self._histograms["e2e_request_latency_seconds"].observe(now - times.started)
            self._histograms["request_queue_time_seconds"].observe(completion.costs.queue_seconds)
            self._counters["num_preemptions"].inc(completion.costs.preemptions)
            self._ended.labels(*self._values, completion.finish_reason).inc()

    def collect(self) -> Iterator[Metric]:
        """Sizes and counts of the engine; 0 while it is being made."""
        engine = self._engine()
        for name, (text, size) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric(self._values, 0 if engine is None else size(engine))
            yield gauge
        for name, (text, count) in _QUERIES.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            counter.add_metric(self._values, 0 if engine is None else count(engine))
            yield counter
        if engine is not None:
            info = GaugeMetricFamily(
                "vllm:cache_config_info",
                "Sizes of the KV cache, as labels.",
                labels=(*_LABELS, "block_size", "num_gpu_blocks", "enable_prefix_caching"),
            )
            sizes = (engine.cache_block_size, engine.pool.num_cache_blocks, engine.scheduler.prefix_cache)
            info.add_metric((*self._values, *map(str, sizes)), 1)
            yield info
            if self._max_loras is not None:
                yield _lora_info(engine, self._max_loras)


def _lora_info(engine: Engine, max_loras: int) -> Metric:
    """The adapters in use, as labels; the value is the time of this state, by which a gateway finds the newest."""
    text = "Adapters of running and of waiting completions."
    info = GaugeMetricFamily(
        "vllm:lora_requests_info", text, labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    )
    scheduler = engine.scheduler
    info.add_metric((str(max_loras), _adapters(scheduler.running), _adapters(scheduler.waiting)), time.time())
    return info


def _adapters(sequences: Iterable[DecodingSequence]) -> str:
    """The names of their adapters, separated by commas."""
    adapters = (sequence.request.adapter for sequence in list(sequences))  # copied: the engine's thread changes it
    return ",".join(sorted({adapter.name for adapter in adapters if adapter is not None}))
