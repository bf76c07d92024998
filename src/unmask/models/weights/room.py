"""Room for a model: the memory that loading it takes, and the memory there is, before a weight is touched.

Owns the sums over an architecture's tensors, the limits of the machine, of a container and of a GPU, and the error where a
model does not fit. Reads no weight file: what a model takes once loaded follows from its config and the dtype.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from unmask.errors import RoomError
from unmask.models.arch.config import ModelConfig
from unmask.models.dtypes import dtype_name
from unmask.models.families.registry import stored_tensors
from unmask.models.weights.checkpoint import parameter_dtype

RESERVE = 2**27
"""Bytes that a process takes for its forwards beside what is summed up here."""
OTHERWISE = "free some, or take a smaller model or a larger machine"
"""What to do where nothing fits."""
_UNLIMITED = 2**60
_CGROUP_FILES = {"2": ("memory.max", "memory.high", "memory.current"), "1": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""The limits and, last, the usage of a cgroup, by version."""


class Memory(NamedTuple):
    """Memory that can still be had: its size in bytes, and whose limit that is, for messages."""

    num_bytes: int
    where: str


def available_memory(
    device: torch.device | str, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> Memory | None:
    """The memory that a model may take: the least of all limits that this process is under; None where nothing says.

    On a CPU: what the machine has available (without swap), what the cgroups of the process leave of their limits (Docker,
    Kubernetes, systemd, SLURM), and the limit on the address space (`ulimit -v`). On a GPU: its free memory.

    Args:
        device: where the model is to live.
        proc: the file system of processes.
        cgroups: where those of cgroups are mounted.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return Memory(torch.cuda.mem_get_info(device)[0], f"memory of {device}")
    limits = [*_machine(proc), *_cgroup_limits(proc, cgroups), *_address_space(proc)]
    return min(limits, default=None)


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the model's parameters as loaded in `dtype`; routers keep float32."""
    tensors = stored_tensors(config).values()
    return sum(math.prod(each.shape) * parameter_dtype(each.parameter, dtype).itemsize for each in tensors)


def kv_cache_bytes(config: ModelConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of the keys and values of `num_tokens` tokens."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize * num_tokens


def fits(num_bytes: int, memory: Memory | None) -> bool:
    """Whether so many bytes can be had, with what forwards take beside them."""
    return memory is None or num_bytes + RESERVE <= memory.num_bytes


def check_room(
    what: str, needs: Mapping[str, int], device: torch.device | str, others: Callable[[], Mapping[str, int]] = dict, *,
    otherwise: str = OTHERWISE,
) -> None:  # fmt: skip
    """Refuse what does not fit into the memory that can be had on a device; otherwise as `check_fits`."""
    check_fits(what, needs, available_memory(device), others, otherwise=otherwise)


def check_fits(
    what: str, needs: Mapping[str, int], memory: Memory | None, others: Callable[[], Mapping[str, int]] = dict, *,
    otherwise: str = OTHERWISE,
) -> None:  # fmt: skip
    """Refuse what does not fit into memory.

    Args:
        what: needs the memory, for the message: the beginning of a sentence that goes on with "needs".
        needs: bytes of each part, by what it is.
        memory: that can be had; None: nothing says.
        others: called where it does not fit: bytes in all of what could be done instead, by how that is asked for, the best
            first.
        otherwise: what to do where none of these fits.

    Raises:
        RoomError: more is needed than there is. The message names all parts, the limit, and what would fit.
    """
    total = sum(needs.values())
    if memory is None or fits(total, memory):
        return
    smaller = {name: size for name, size in others().items() if size < total}
    fitting = [f"{name} ({in_words(size)})" for name, size in smaller.items() if fits(size, memory)]
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in needs.items() if size)
    remedy = otherwise
    if fitting:
        remedy = f"use {' or '.join(fitting)}"
    elif smaller:
        least = min(smaller, key=smaller.__getitem__)
        remedy = f"even {least} needs {in_words(smaller[least])}: {remedy}"
    left = in_words(max(memory.num_bytes, 0))
    raise RoomError(f"{what} needs {in_words(total)} ({parts}), and there are {left} of {memory.where}; {remedy}")


def check_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
    """Refuse a model whose weights alone do not fit.

    Args:
        folder: of the model, for the message.
        config: its architecture.
        dtype: of the weights as loaded.
        device: where they live.

    Raises:
        RoomError: they do not fit.
    """
    needs = {f"weights in {dtype_name(dtype)}": weight_bytes(config, dtype)}
    check_room(str(folder), needs, device, lambda: {"dtype bfloat16": weight_bytes(config, torch.bfloat16)})


def in_words(num_bytes: int) -> str:
    """A number of bytes for people: "22.4 GB", "512 MB"."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def _machine(proc: Path) -> Iterator[Memory]:
    """What the machine has available, by its own estimate; where it makes none (macOS), all that it has."""
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        yield Memory(int(dict(lines)["MemAvailable"].split()[0]) * 1024, "free memory")
        return
    with suppress(OSError, ValueError, AttributeError):  # no such names on other systems
        yield Memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory")


def _address_space(proc: Path) -> Iterator[Memory]:
    """What `ulimit -v` leaves."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int((proc / "self" / "statm").read_text().split()[0]) * resource.getpagesize()
            yield Memory(limit - used, "address space (ulimit -v)")


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[Memory]:
    """What each cgroup above this process leaves of its limit. The page cache counts as free: it is given up on demand."""
    for version, folder in _cgroup_folders(proc, cgroups):
        *limit_names, usage_name = _CGROUP_FILES[version]
        limit = min((number for name in limit_names if (number := _number(folder / name)) is not None), default=_UNLIMITED)
        usage = _number(folder / usage_name) if limit < _UNLIMITED else None  # counting takes the system a while
        if usage is not None:
            yield Memory(limit - usage + _page_cache(folder, version), "memory under the cgroup's limit")


def _cgroup_folders(proc: Path, cgroups: Path) -> Iterator[tuple[str, Path]]:
    """Version and folder of every cgroup that this process is in, for memory, from the innermost outward.

    In a container the paths may be those outside it, which are not mounted: its own cgroup is the root then.
    """
    lines: list[str] = []
    with suppress(OSError):
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounts = [cgroups / "memory"] if controllers else [cgroups, cgroups / "unified"]
        for mount in mounts:
            relative = Path(path.lstrip("/"))
            yield from (("1" if controllers else "2", mount / each) for each in (relative, *relative.parents))


def _page_cache(folder: Path, version: str) -> int:
    """Bytes of a cgroup's usage that are pages of files."""
    with suppress(OSError, ValueError):
        entries = dict(line.partition(" ")[::2] for line in (folder / "memory.stat").read_text().splitlines())
        prefix = "total_" if version == "1" else ""
        return sum(int(entries.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return 0


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none ("max")."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None
