"""Batches on a Ray cluster: replicas of the model, each in an actor of Ray Data's pool, share the lines of a batch file.

Owns the pool. What a replica does with a line is `batch.asking`'s, as without Ray. This process alone writes answers: a line
whose actor is lost is asked again by another, and only its one result arrives here.

Needs ray (extra `unmask[ray]`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.errors import ConfigError, TrainingError
from unmask.serve.batch import WAITING, answer_missing, asking
from unmask.serve.batch_file import BatchCounts, BatchFile, BatchLine
from unmask.serve.config import ServerConfig

if TYPE_CHECKING:
    from unmask.engine.llm import LanguageModel


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where replicas run.

    Attributes:
        address: of the cluster; `auto`: the one of this machine; `local`: one of its own, as long as the batch takes.
        replicas: of the model; None: one for each node.
        cpus: that each reserves and computes with.
        gpus: that each reserves.

    Raises:
        ConfigError: a value out of range, or ray is not installed.
    """

    address: str
    replicas: int | None = None
    cpus: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("replicas", self.replicas, 1), ("cpus", self.cpus, 1), ("gpus", self.gpus, 0)):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if find_spec("ray") is None:
            raise ConfigError("a batch on Ray needs the package ray, which is not installed; pip install 'unmask[ray]'")


def run_ray_batch(
    load: Callable[[], LanguageModel],
    requests: BatchFile,
    out: Path,
    config: ServerConfig,
    cluster: RayOptions,
    *,
    on_progress: Callable[[BatchCounts], None] = lambda counts: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> BatchCounts:
    """Answer all requests of a batch file that `out` does not answer yet, by replicas on a Ray cluster.

    Args:
        load: gives the model, with a tokenizer; called in each replica's process, to which it is sent pickled.
        requests: the batch file.
        out: answers, as of `run_batch`.
        config: limits of each replica.
        cluster: where they run.
        on_progress: called after every answer.
        should_stop: asked after every answer; True: those that run are dropped, and the counts returned.

    Raises:
        ConfigError: there is no cluster at this address.
        DataError: `out` holds something else, or another job is writing it.
        CheckpointError: the disk is full.
        TrainingError: replicas cannot be made.
    """
    import ray

    _connect(cluster.address)
    try:

        def answer(lines: Iterator[BatchLine], write: Callable[[dict[str, Any]], None]) -> None:
            for record in _records(load, list(lines), config, cluster):
                write(record)
                if should_stop():
                    return

        return answer_missing(requests, out, answer, on_progress)
    except ray.exceptions.RayError as error:
        raise TrainingError(f"the batch ended on Ray: {_cause(error)}; --resume goes on with it") from error
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():
            # Ray itself asks for minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError) as error:
        reason = f"no cluster answers at ray address {address!r} ({str(error)[:80]})"
        raise ConfigError(
            f"{reason}; start one with `ray start --head`, or use local; if it takes a token, set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN to it"
        ) from error


def _records(
    load: Callable[[], LanguageModel], lines: list[BatchLine], config: ServerConfig, cluster: RayOptions
) -> Iterator[dict[str, Any]]:
    """Records of the lines' answers as they come."""
    import ray

    replicas = cluster.replicas or sum(node["Alive"] for node in ray.nodes())
    # As many as a replica takes in at a time, and fewer where some would get none.
    size = max(1, min(2 * WAITING * config.max_concurrent, -(-len(lines) // (2 * replicas))))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"line": json.dumps(asdict(line))} for line in lines]
    answered = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
        _Replica,
        fn_constructor_args=(load, config),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=replicas),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
        for record in batch["record"]:
            yield json.loads(record)


class _Replica:
    """The model in an actor's process, and the application before it."""

    def __init__(self, load: Callable[[], LanguageModel], config: ServerConfig) -> None:
        self._runner = asyncio.Runner()
        self._resources = AsyncExitStack()
        self._ask = self._runner.run(self._resources.enter_async_context(asking(load(), config)))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        lines = [BatchLine(**json.loads(text)) for text in batch["line"]]
        return {"record": [json.dumps(record) for record in self._runner.run(self._answer(lines))]}

    async def _answer(self, lines: list[BatchLine]) -> list[dict[str, Any]]:
        return await asyncio.gather(*map(self._ask, lines))


def _cause(error: BaseException) -> str:
    """The last line of what an actor has said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
