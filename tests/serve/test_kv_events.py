"""KV events against subscribers that know vLLM's classes: one follows the cache, one misses messages and asks again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import zmq
from live import live

from tiny import tiny_model
from unmask.engine.engine import Engine
from unmask.engine.request import Request
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError
from unmask.serve import kv_events
from unmask.serve.config import ServerConfig
from unmask.serve.kv_events import KVEventPublisher, event_hash

BLOCK = 4


class Event(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, tag=True):
    """vLLM's events are maps with the name of their class."""


class BlockStored(Event):
    """vLLM's fields in their order."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(Event):
    """Likewise."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(Event):
    """Likewise."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """Likewise."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Follower:
    """A subscriber that keeps the tokens of every prefix by its hash."""

    def __init__(self, endpoint: str, replay: str, misses: Callable[[int], bool] = lambda number: False) -> None:
        context = zmq.Context.instance()
        self._events, self._replay = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        self._events.setsockopt_string(zmq.SUBSCRIBE, "kv@")
        self._events.connect(endpoint)
        self._replay.connect(replay)
        self._misses = misses
        self.next = self.num_replayed = 0
        self.prefixes: dict[int, list[int]] = {}

    def take(self, milliseconds: int = 300) -> None:
        """Everything that arrives until nothing has for so long."""
        while self._events.poll(milliseconds):
            topic, number, message = self._events.recv_multipart()
            assert topic == b"kv@worker"
            if not self._misses(int.from_bytes(number, "big")):
                self._apply_from(int.from_bytes(number, "big"), message)

    def catch_up(self) -> None:
        """Ask for all messages from the next one on."""
        self._replay.send_multipart((b"", self.next.to_bytes(8, "big")))
        while True:
            assert self._replay.poll(10_000)
            _, number, message = self._replay.recv_multipart()
            if number == b"\xff" * 8:
                return
            self.num_replayed += 1
            self._apply(int.from_bytes(number, "big"), message)

    def close(self) -> None:
        """Close the sockets."""
        self._events.close(0)
        self._replay.close(0)

    def _apply_from(self, number: int, message: bytes) -> None:
        if number > self.next:
            self.catch_up()
        if number == self.next:
            self._apply(number, message)

    def _apply(self, number: int, message: bytes) -> None:
        assert number == self.next
        self.next += 1
        for event in msgspec.msgpack.decode(message, type=EventBatch, strict=True).events:
            if isinstance(event, AllBlocksCleared):
                self.prefixes.clear()
            elif isinstance(event, BlockRemoved):
                for block_hash in event.block_hashes:
                    del self.prefixes[block_hash]
            else:
                self._store(event)

    def _store(self, event: BlockStored) -> None:
        prefix = [] if event.parent_block_hash is None else self.prefixes[event.parent_block_hash]
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        for index, block_hash in enumerate(event.block_hashes):
            assert block_hash not in self.prefixes
            prefix = prefix + event.token_ids[index * event.block_size : (index + 1) * event.block_size]
            self.prefixes[block_hash] = prefix


@contextmanager
def following(
    folder: Path, misses: Callable[[int], bool] = lambda number: False
) -> Iterator[tuple[KVEventPublisher, Follower]]:
    """A publisher and its subscriber."""
    endpoint, replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
    publisher = KVEventPublisher(endpoint, replay, topic="kv@worker")
    follower = Follower(endpoint, replay, misses)
    try:
        yield publisher, follower
    finally:
        follower.close()
        publisher.close()


def serve_at_random(engine: Engine, num_requests: int, after: Callable[[], object]) -> None:
    """Requests with common beginnings, more than the cache holds; some are aborted."""
    choose = random.Random(3)
    openings = [choose.choices(range(5, 40), k=choose.randint(0, 30)) for _ in range(6)]
    for _ in range(num_requests):
        prompt = choose.choice(openings) + choose.choices(range(5, 40), k=choose.randint(1, 9))
        params = SamplingParams(max_new_tokens=choose.randint(1, 16)).resolve(engine.config)
        number = engine.add(Request(tuple(prompt), params))
        for _ in range(choose.randint(0, 9)):
            engine.step()
        if choose.random() < 0.2:
            engine.abort(number)
        after()
    while engine.has_work:
        engine.step()


def held(engine: Engine) -> set[int]:
    """What the prefix cache can find, as events name it."""
    return {event_hash(prefix_hash) for prefix_hash in engine.pool._block_of}


def make_engine(publisher: KVEventPublisher) -> Engine:
    """A small cache."""
    model = tiny_model("llama", mask_id=3, block_size=BLOCK)
    return Engine(model, num_tokens=128, max_num_seqs=3, on_cache_events=publisher.publish)


def test_a_subscriber_follows_the_cache_exactly(tmp_path: Path) -> None:
    with following(tmp_path) as (publisher, follower):
        publisher.clear()
        follower.take()
        follower.catch_up()  # What was sent before it had subscribed.
        engine = make_engine(publisher)

        def compare() -> None:
            while follower.next < publisher.num_sent:
                follower.take(20)
            assert set(follower.prefixes) == held(engine)

        serve_at_random(engine, 60, compare)
        compare()
        assert len(follower.prefixes) > 20
        assert any(len(prefix) > 7 * BLOCK for prefix in follower.prefixes.values())


def test_a_subscriber_that_misses_messages_asks_for_them(tmp_path: Path) -> None:
    drops = random.Random(1)
    with following(tmp_path, lambda number: drops.random() < 0.3) as (publisher, follower):
        engine = make_engine(publisher)
        serve_at_random(engine, 60, lambda: follower.take(0))
        follower.take()
        follower.catch_up()
        assert follower.num_replayed > 10
        assert follower.next == publisher.num_sent
        assert set(follower.prefixes) == held(engine)


def test_the_server_publishes_what_it_caches(tiny: Any, tmp_path: Path) -> None:
    endpoint, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    config = ServerConfig(names=("tiny",), kv_events=endpoint, kv_events_replay=replay, kv_events_topic="kv@worker")
    follower = Follower(endpoint, replay)
    with live(tiny, config) as site:
        prompt = list(range(20, 60))
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
        assert httpx2.post(f"{site.url}/v1/completions", json=body).status_code == 200
        site.wait_idle()
        follower.catch_up()
        assert set(follower.prefixes) == held(site.worker.engine)
        assert prompt in follower.prefixes.values()
    follower.close()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"kv_events": "tcp://nowhere"}, "kv_events"),
        ({"kv_events": "ipc:///nonexistent/folder/events"}, "kv_events"),
        ({"kv_events": "inproc://events", "kv_events_replay": "here"}, "kv_events_replay"),
        ({"kv_events_replay": "tcp://*:5558"}, "kv_events"),
    ],
)
def test_a_wrong_address_is_refused_by_name(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        KVEventPublisher.of(ServerConfig(**values))


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"unmask\[events\]"):
        KVEventPublisher("inproc://events")
