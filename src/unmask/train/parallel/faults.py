"""Faults of other ranks: which one is gone, hangs or has failed, when a collective operation fails.

Owns the roll call in the store that all ranks share, which outlives them. Knows nothing of training.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from unmask.errors import LostRanksError

_NAME, _LOST, _FAILED = "name", "lost", "failed"
_POLL = 0.05
_PATIENCE = 20.0
_LIMIT, _QUIET = 10.0, 3.0
"""Seconds to wait for the reports of other ranks: at most, and after the last one."""

T = TypeVar("T")


class RollCall:
    """Roll call of the ranks: each writes who it is and, when it fails, why.

    Args:
        store: of all ranks.
        rank, size: of this one, of the run.
        timeout: seconds after which a collective operation gives up.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        store.set(f"{_NAME}/{rank}", f"{socket.gethostname()}, process {os.getpid()}")

    def explain(self, error: BaseException) -> LostRanksError | None:
        """Report the error to the other ranks; when it says that some of them did not answer, find out which.

        Returns:
            The error to raise instead; None for an error of this rank's own.
        """
        if not _is_communication(error):
            line = " ".join(str(error).split()) or type(error).__name__
            self._asked(lambda: self._store.set(f"{_FAILED}/{self._rank}", line))
            return None
        answers = self._asked(self._who)
        who = answers[0] if answers else "no other rank can be reached"
        return LostRanksError(f"{who}; the run can go on from its last checkpoint")

    @staticmethod
    def _asked(question: Callable[[], T]) -> list[T]:
        """The answer of a function that asks the store; nothing if that is gone, too, and does not answer."""
        answers: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(question())

        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        return answers

    def _who(self) -> str:
        """The ranks that failed or are silent, in words."""
        self._store.set(f"{_LOST}/{self._rank}", "")
        # All that still live find out one after the other.
        others = [rank for rank in range(self._size) if rank != self._rank]
        silent = others
        end = stop = time.monotonic() + min(_LIMIT, self._timeout)
        while silent and time.monotonic() < end:
            failed = [rank for rank in silent if self._has(_FAILED, rank)]
            if failed:
                return "; ".join(f"rank {rank} failed: {self._get(_FAILED, rank)}" for rank in failed)
            left = [rank for rank in silent if not self._has(_LOST, rank)]
            if len(left) < len(silent):
                silent, end = left, min(stop, time.monotonic() + min(_QUIET, self._timeout))
            time.sleep(_POLL)
        names = ", ".join(f"rank {rank} ({self._get(_NAME, rank)})" for rank in silent)
        return f"{names or 'another rank'} is gone, or has not answered for {self._timeout:g} s"

    def _has(self, kind: str, rank: int) -> bool:
        return bool(self._store.check([f"{kind}/{rank}"]))

    def _get(self, kind: str, rank: int) -> str:
        value: bytes = self._store.get(f"{kind}/{rank}")
        return value.decode(errors="replace")


def _is_communication(error: BaseException) -> bool:
    """Whether the error is one of gloo or NCCL, and not of this rank's own work."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
