"""The world of a run of several processes, on torch.distributed.

Owns process groups and device meshes, and how they are started and ended. Imported only when a run has more than one process.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate

from unmask.errors import ConfigError, LostRanksError
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.faults import RollCall
from unmask.train.parallel.world import GroupName, World

T = TypeVar("T")
_SUMMED_ALONE = 2**18
"""Gradients of fewer numbers are summed together, in one message."""


class Ranks(World):
    """The world of several processes; the default process group is there already."""

    def __init__(self, dims: ParallelDims, device: str, timeout: timedelta | None = None) -> None:
        """Lay the ranks out: tensor innermost, then context, shards, replicas, and pipeline stages outermost.

        Args:
            dims: their product is the number of processes.
            device: type of the device that each of them computes on.
            timeout: how long a collective operation waits for the others [default: PyTorch's].
        """
        self._timeout = timeout
        self.dims, self.rank = dims, dist.get_rank()
        outer = (dims.pipeline, dims.data_replicate)
        ranks = init_device_mesh(device, (dims.size,), mesh_dim_names=("ranks",))
        rows = _divide(ranks, (*outer, dims.data_shard, dims.context, dims.tensor), _ROWS)
        self._mesh = _divide(ranks, (*outer, dims.shards, dims.tensor), _DENSE)
        self._expert_mesh = _divide(ranks, (*outer, dims.shards // dims.expert, dims.expert, dims.tensor), _EXPERTS)
        self._groups: dict[GroupName, DeviceMesh] = {
            "data": rows["data_replicate", "data_shard"]._flatten("data"),
            "predictions": rows["data_replicate", "data_shard", "context"]._flatten("predictions"),
            "context": rows["context"],
            "tensor": self._mesh["tensor"],
            "pipeline": rows["pipeline"],
            "expert": self._expert_mesh["expert"],
        }
        if timeout is not None:
            # The groups of a mesh do not inherit it.
            meshes = (rows, self._mesh, self._expert_mesh, *self._groups.values())
            for group in (group for mesh in meshes for group in mesh.get_all_groups()):
                _set_pg_timeout(timeout, group)

    def background_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=self._timeout)
        return group

    @property
    def mesh(self) -> DeviceMesh:
        return self._mesh

    @property
    def expert_mesh(self) -> DeviceMesh:
        return self._expert_mesh

    def index(self, name: GroupName) -> int:
        return self._groups[name].get_local_rank()

    def group(self, name: GroupName) -> dist.ProcessGroup:
        return self._groups[name].get_group()

    def gather(self, value: T) -> list[T]:
        return gathered(value, self.group("predictions"))

    def gather_all(self, value: T) -> list[T]:
        return gathered(value, None)

    def full(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        # One dimension at a time, as PyTorch would do as well, with a warning.
        placements = list(tensor.placements)
        for number in range(len(placements)):
            placements[number] = Replicate()
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local()

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def sharded(self, local: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return local
        layout = (like.device_mesh, like.placements)
        return DTensor.from_local(local, *layout, run_check=False, shape=like.shape, stride=like.stride())

    def sum_tensor(self, tensor: Tensor, *names: GroupName) -> None:
        for name in names:
            dist.all_reduce(tensor, group=self.group(name))

    def begin_backward(self, model: nn.Module, *, is_last: bool) -> None:
        if self.dims.data_replicate == 1:
            return
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The gradients of embedding and head come one after the other: FSDP cannot add them up before the sum.
                module.set_requires_all_reduce(is_last or module is model, recurse=False)
                if self.dims.shards == 1:
                    module.set_reshard_after_backward(is_last, recurse=False)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        plain = [parameter for parameter in parameters if parameter.requires_grad and not isinstance(parameter, DTensor)]
        if not plain:
            return
        small = []
        for parameter in plain:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.numel() < _SUMMED_ALONE:
                small.append(parameter.grad)
            else:
                self.sum_tensor(parameter.grad, "predictions")
        if small:
            total = torch.cat([gradient.flatten() for gradient in small])
            self.sum_tensor(total, "predictions")
            for gradient, part in zip(small, total.split([gradient.numel() for gradient in small]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def norm(self, gradients: list[Tensor]) -> Tensor:
        # Gradients of one mesh, sharded over the same dimensions of it, are summed together.
        together: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
        for gradient in gradients:
            key: tuple[DeviceMesh | None, tuple[int, ...]] = (None, ())
            if isinstance(gradient, DTensor):
                sharded = (number for number, placement in enumerate(gradient.placements) if not placement.is_replicate())
                key = (gradient.device_mesh, tuple(sharded))
            together.setdefault(key, []).append(self.local(gradient))
        squares = []
        for (mesh, sharded_dims), shards in together.items():
            square = nn.utils.get_total_norm(shards).square()
            for number in sharded_dims:
                assert mesh is not None
                dist.all_reduce(square, group=mesh.get_group(number))
            squares.append(square)
        total = torch.stack(squares).sum()
        if self.dims.pipeline > 1:
            self.sum_tensor(total, "pipeline")
        return total.sqrt()


_ROWS = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
_DENSE = ("pipeline", "data_replicate", "shard", "tensor")
_EXPERTS = ("pipeline", "data_replicate", "expert_shard", "expert", "tensor")


def _divide(ranks: DeviceMesh, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    # By its number: PyTorch 2.11 refuses the name of a mesh's only dimension.
    return ranks._unflatten(0, shape, names)


def gathered(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """The values of all ranks of a group; None: of the default one."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def agree_on_round(store: Store, rank: int, size: int, timeout: float) -> str:
    """Agree on a name of this start of the ranks: their store keeps what earlier ones wrote, and agents count restarts apart.

    The first rank makes the name, and says when all have seen it. One of an earlier start is recognised by that somebody of
    one's own rank has seen it, or that another follows.

    Args:
        store: of all ranks, old and new.
        rank, size: of this one, of the run.
        timeout: seconds to wait for the others.

    Raises:
        LostRanksError: some have not come.
    """
    stop = time.monotonic() + timeout
    name, seen_first = uuid.uuid4().hex, False
    if rank == 0:
        store.set("round", name)
    while True:
        if rank == 0:
            missing = [other for other in range(1, size) if not store.check([f"{name}/{other}"])]
            if not missing:
                store.set(f"{name}/open", "")
                return name
        else:
            missing = [0]
            if store.check(["round"]) and (latest := store.get("round").decode()) != name:
                name, seen_first = latest, store.add(f"{latest}/{rank}", 1) == 1
            if seen_first and store.check([f"{name}/open"]):
                return name
        if time.monotonic() > stop:
            who = ", ".join(f"rank {other}" for other in missing[:8]) if rank == 0 else "another rank"
            raise LostRanksError(f"{who} has not started for {timeout:g} s; the run can go on from its last checkpoint")
        time.sleep(0.05)


def compare_recipes(store: Store, rank: int, size: int, recipe: str) -> None:
    """Raise ConfigError, on every rank, when one has another recipe than the first one.

    Args:
        store: of all ranks, of this start of them only.
        rank, size: of this one, of the run.
        recipe: of this rank, as text.
    """
    store.set(str(rank), hashlib.sha256(recipe.encode()).hexdigest())
    if rank == 0:
        digests = store.multi_get([str(other) for other in range(size)])
        store.set("others", " ".join(str(other) for other in range(size) if digests[other] != digests[0]))
    if others := store.get("others").decode():
        raise ConfigError(f"rank {others.split()[0]} has another recipe than rank 0; give all hosts the same files and options")


@contextmanager
def joined(dims: ParallelDims, device: str, timeout: float, recipe: str) -> Iterator[Ranks]:
    """The world of the processes that torchrun (or `--nproc`) started, of which this is one; left at the end.

    Args:
        dims: their product is the number of processes.
        device: type of the device that each of them computes on.
        timeout: seconds that a rank waits for the others before it gives up.
        recipe: of this rank, as text.

    Raises:
        ConfigError: other ranks have another recipe; on all of them.
        LostRanksError: other ranks are gone, hang or have failed; names them.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    store = PrefixStore(agree_on_round(store, rank, size, timeout), store)
    roll = RollCall(PrefixStore("roll", store), rank, size, timeout)
    try:
        compare_recipes(PrefixStore("recipe", store), rank, size, recipe)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
        yield Ranks(dims, device, limit)
    except BaseException as error:
        lost = roll.explain(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
