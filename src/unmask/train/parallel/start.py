"""Joining the world of a run: alone, or as one of the ranks that torchrun or `--nproc` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from unmask.train.parallel.dims import ParallelSection
from unmask.train.parallel.world import World


@contextmanager
def open_world(parallel: ParallelSection, device: str) -> Iterator[World]:
    """The world of this process: of the ranks that torchrun or `--nproc` started, or of itself alone.

    Raises:
        ConfigError: the recipe's dimensions make another number of processes.
    """
    dims = parallel.dims(int(os.environ.get("WORLD_SIZE", "1")))
    if dims.size == 1:
        yield World.single()
        return
    # Imported here: a run of one process needs none of it.
    from unmask.train.parallel.ranks import joined

    with joined(dims, device, parallel.timeout) as world:
        yield world


def restarted() -> bool:
    """Whether this process is a rank that was started again after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
