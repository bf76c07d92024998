"""Processes for tests: a pool, started once, whose members run a function as the ranks of one process group.

A forkserver imports PyTorch once. A rank that raises is shown by its number; one that hangs is found by the timeout.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
"""Seconds that a collective may take; a whole test of several processes may take three times as long."""

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_PRELOAD = [
    "unmask.train.run", "unmask.train.parallel.ranks", "unmask.train.parallel.apply", "unmask.train.parallel.dcp",
    "unmask.train.parallel.export", "unmask.train.parallel.vocabulary", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.distributed.tensor._redistribute", "torch.distributed.tensor.debug", "torch.distributed.checkpoint.filesystem",
    "matrix", "runs",
]  # fmt: skip
"""What ranks need: imported once, by the process that they are forks of."""


class RanksFailed(Exception):  # noqa: N818
    """Some ranks raised; `errors` are their tracebacks by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(errors.items())))
        self.errors = errors


class Pool:
    """Pool of processes; `run` starts those that are missing."""

    def __init__(self) -> None:
        self._members: list[tuple[BaseProcess, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call `function(*args)` in `size` ranks of a gloo process group.

        Args:
            size: number of ranks.
            function: of a module that can be imported; its arguments and its result are pickled.
            timeout: seconds for each collective, and a third of those for everything.

        Returns:
            The results in the order of ranks.

        Raises:
            RanksFailed: a rank raised, died or hung.
        """
        self._start(size)
        with tempfile.TemporaryDirectory() as folder:
            pipes = [pipe for _, pipe in self._members[:size]]
            for rank, pipe in enumerate(pipes):
                pipe.send((function, args, rank, size, str(Path(folder) / "store"), timeout))
            answers = self._answers(pipes, timeout)
        errors = {rank: text for rank, (good, text) in enumerate(answers) if not good}
        if errors:
            self.close()  # What they left behind is not to be trusted.
            raise RanksFailed(errors)
        return [result for _, result in answers]

    def close(self) -> None:
        """End all processes."""
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.join()
        self._members.clear()

    def _start(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        environment = _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds our modules
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            while len(self._members) < size:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, [*sys.path, os.getcwd()]), daemon=True)
                process.start()
                theirs.close()
                self._members.append((process, ours))
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    @staticmethod
    def _answers(pipes: list[Connection], timeout: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        stop = time.monotonic() + 3 * timeout
        while len(answers) < len(pipes) and (left := stop - time.monotonic()) > 0:
            waiting = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in answers}
            for pipe in wait([pipes[rank] for rank in waiting.values()], left):
                assert isinstance(pipe, Connection)
                try:
                    answers[waiting[id(pipe)]] = pipe.recv()
                except EOFError:
                    answers[waiting[id(pipe)]] = (False, "it died")
        return [answers.get(rank, (False, f"it hung for {3 * timeout:g} s")) for rank in range(len(pipes))]


def _serve(pipe: Connection, path: list[str]) -> None:
    """Run what comes through the pipe, as one rank of a group, until it is closed."""
    sys.path[:] = path
    os.environ.update(_ENVIRONMENT)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, rank, size, store, timeout = pipe.recv()
        except EOFError:
            return
        except Exception:
            pipe.send((False, traceback.format_exc()))
            continue
        pipe.send(_answer(function, args, rank, size, store, timeout))


def _answer(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, store: str, timeout: float
) -> tuple[bool, Any]:
    import torch.distributed as dist
    from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    try:
        file_store = dist.FileStore(store, size)
        dist.init_process_group("gloo", store=file_store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        try:
            return True, function(*args)
        finally:
            dist.destroy_process_group()
            # They hold meshes: equal ones of the next run would be found, and groups live on, each with threads of gloo.
            _clear_sharding_prop_cache()
            clear_redistribute_planner_cache()
            _gen_transform_infos.cache_clear()
            gc.collect()
    except BaseException:
        return False, traceback.format_exc()
