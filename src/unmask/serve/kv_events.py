"""KV events: what the prefix cache holds, published over ZeroMQ for routers, in vLLM's messages.

Owns the sockets and the encoding, and none of their meaning to the cache: that is in `engine.kv_cache`. A message is three
frames: topic, sequence number (8 bytes, big-endian, from 0 on), and a msgpack array `[seconds, events, data_parallel_rank]`,
whose events are maps with the name of vLLM's class under `type` (arrays in versions before). A subscriber that has missed some
sends the first number that it lacks to the replay address.

Needs pyzmq and msgspec (extra `unmask[events]`).

Source: vLLM's `distributed/kv_events.py` (messages and replay), as its subscribers expect them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from unmask.engine.kv_cache import BlockRemoved, CacheEvent
from unmask.errors import ConfigError
from unmask.serve.config import ServerConfig

if TYPE_CHECKING:
    import zmq

NUM_REPLAYED = 10_000
"""Messages that can be asked for again."""
MEDIUM = "GPU"
"""vLLM's name of the memory in which keys and values are computed with; another one is an offloaded copy to routers."""
_END = (-1).to_bytes(8, "big", signed=True)
"""Sequence number of the last message of a replay."""
_POLL_MILLISECONDS = 100
_WAITING = 100_000
"""Messages kept for a subscriber that reads slowly, as vLLM does."""


def check_installed() -> None:
    """Raises ConfigError without the packages."""
    missing = [package for package in ("zmq", "msgspec") if find_spec(package) is None]
    if missing:
        raise ConfigError("kv_events needs pyzmq and msgspec, which are not installed; pip install 'unmask[events]'")


class KVEventPublisher:
    """Publisher of the prefix cache's events. One thread publishes; another answers replays.

    Args:
        endpoint: PUB address: bound if it is of this machine (`tcp://*:5557`, `tcp://127.0.0.1:5557`, `ipc://...`), else
            connected to.
        replay: ROUTER address, bound; None: no replay.
        topic: first frame of every message.

    Attributes:
        num_sent: messages.

    Raises:
        ConfigError: an address is wrong or in use, or the packages are missing.
    """

    def __init__(self, endpoint: str, replay: str | None = None, *, topic: str = "") -> None:
        check_installed()
        import msgspec
        import zmq

        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._topic, self.num_sent = topic.encode(), 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=NUM_REPLAYED)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._publisher = context.socket(zmq.PUB)
        self._publisher.set_hwm(_WAITING)
        self._sockets = [self._publisher]
        self._thread: threading.Thread | None = None
        try:
            _attach(self._publisher, "kv_events", endpoint, is_bound=_is_local(endpoint))
            if replay is not None:
                router = context.socket(zmq.ROUTER)
                self._sockets.append(router)
                _attach(router, "kv_events_replay", replay, is_bound=True)
                self._thread = threading.Thread(target=self._replay, args=(router,), name="kv-events", daemon=True)
                self._thread.start()
        except ConfigError:
            self.close()
            raise

    @classmethod
    def of(cls, config: ServerConfig) -> KVEventPublisher | None:
        """The publisher that a server's options ask for; raises ConfigError as the class."""
        if config.kv_events is None:
            return None
        return cls(config.kv_events, config.kv_events_replay, topic=config.kv_events_topic)

    def publish(self, events: Sequence[CacheEvent]) -> None:
        """Tell subscribers what has changed, in order; never waits for them."""
        self._send([_fields(event) for event in events])

    def clear(self) -> None:
        """Tell subscribers that the cache is empty, as a new engine's is."""
        self._send([{"type": "AllBlocksCleared"}])

    def close(self) -> None:
        """End the thread and close the sockets; call it when nobody publishes any more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        for socket in self._sockets:
            socket.close(linger=100)

    def _send(self, events: list[dict[str, Any]]) -> None:
        message = self._encode([time.time(), events, 0])
        with self._lock:
            self._kept.append((self.num_sent, message))
        self._publisher.send_multipart((self._topic, self.num_sent.to_bytes(8, "big"), message))
        self.num_sent += 1

    def _replay(self, router: zmq.Socket[bytes]) -> None:
        while not self._closing.is_set():
            if not router.poll(_POLL_MILLISECONDS):
                continue
            client, *_, first = router.recv_multipart()
            with self._lock:
                kept = list(self._kept)
            for number, message in kept:
                if number >= int.from_bytes(first, "big"):
                    router.send_multipart((client, b"", number.to_bytes(8, "big"), message))
            router.send_multipart((client, b"", _END, b""))


def _fields(event: CacheEvent) -> dict[str, Any]:
    """vLLM's map of an event."""
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": [event_hash(event.prefix_hash)], "medium": MEDIUM}
    return {
        "type": "BlockStored",
        "block_hashes": [event_hash(prefix_hash) for prefix_hash in event.hashes],
        "parent_block_hash": None if event.parent is None else event_hash(event.parent),
        "token_ids": list(event.tokens),
        "block_size": len(event.tokens) // len(event.hashes),
        "lora_id": None,
        "medium": MEDIUM,
        "lora_name": event.adapter,
    }


def event_hash(prefix_hash: bytes) -> int:
    """A prefix hash as events have it: a number of 64 bits, which every router takes."""
    return int.from_bytes(blake2b(prefix_hash, digest_size=8).digest(), "big")


def _attach(socket: zmq.Socket[bytes], name: str, endpoint: str, *, is_bound: bool) -> None:
    import zmq

    try:
        if is_bound:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"{name} is {endpoint!r} ({error.strerror}); it must be an address such as tcp://*:5557") from error


def _is_local(endpoint: str) -> bool:
    """Whether an endpoint is an address of this machine, by its name alone."""
    kind, _, address = endpoint.partition("://")
    host = address.rpartition(":")[0].strip("[]")
    if kind != "tcp" or host in ("*", "localhost", "::"):
        return True
    try:
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return False
