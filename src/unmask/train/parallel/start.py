"""Joining the world of a run: alone, or as one of the ranks that torchrun or `--nproc` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unmask.errors import ConfigError
from unmask.lock import job_of
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.fatal import store_name
from unmask.train.parallel.world import World


@contextmanager
def open_world(dims: ParallelDims, timeout: float, device: str, recipe: str) -> Iterator[World]:
    """The world of this process: of the ranks that torchrun or `--nproc` started, or of itself alone.

    Args:
        dims: their product is the number of processes.
        timeout: seconds that a rank waits for the others before it gives up.
        device: type of device that the run computes on.
        recipe: the whole of it, as text: all ranks must have the same.

    Raises:
        ConfigError: other ranks have another recipe.
    """
    if dims.size == 1:
        yield World.single()
        return
    check_devices(local_ranks(), device)
    # Imported here: a run of one process needs none of it.
    from unmask.train.parallel.ranks import joined

    with joined(dims, device, timeout, recipe) as world:
        yield world


def check_devices(processes: int, device: str) -> None:
    """Raise ConfigError when so many processes cannot compute on this machine, each on a device of its own."""
    if device != "cuda":
        return
    import torch

    count = torch.cuda.device_count()
    if processes > count:
        raise ConfigError(
            f"{processes} processes are to run on this machine, which has {count} CUDA devices; start one for each device, or "
            "set train.device to cpu"
        )
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        raise ConfigError("train.device is cuda, but this PyTorch has no NCCL for several processes; set train.device to cpu")


def num_ranks() -> int:
    """Processes of the run that torchrun or `--nproc` started; 1: this one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_ranks() -> int:
    """Ranks of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def job_name() -> str:
    """Name of the job that torchrun's (or `--nproc`'s) agents run, through all restarts; empty without them.

    The store of the agents ends with the job: one that is started anew has another name, under the same `--rdzv-id` too.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name and (store := store_name()):
        return store
    # Without --rdzv-id every job has the same name.
    return name if name != "none" else f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def restarted(out: Path) -> bool:
    """Whether this process goes on with the run that its own job has begun in this folder, before ranks were lost."""
    name = job_name()
    return bool(name) and job_of(out) == name
