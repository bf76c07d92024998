"""The world of a run: its processes as one of them sees them.

Owns what a run of one process and one of many do differently outside the model: sums over ranks, agreement, who writes files.
The world of many processes is in `ranks`, which alone imports torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import Tensor, nn

from unmask.train.parallel.dims import ParallelDims

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

GroupName = Literal["data", "context", "tensor", "pipeline", "expert", "predictions"]
"""A group of ranks that differ in one dimension only: `data` (both of them), ...; `predictions`: in data and context."""


class World:
    """The world of a single process, and the interface of every world."""

    dims = ParallelDims()
    rank = 0

    @staticmethod
    def single() -> World:
        """The world of one process."""
        return World()

    @property
    def size(self) -> int:
        """Processes."""
        return self.dims.size

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def index(self, name: GroupName) -> int:
        """This process's place, from 0, in its group of that name."""
        return 0

    def group(self, name: GroupName) -> ProcessGroup:
        """The process group of that name that this process is in."""
        raise AssertionError("a single process has no groups")

    def background_group(self) -> ProcessGroup | None:
        """A new group of all ranks on the CPU, for work beside the training; None: there is one process."""
        return None

    @property
    def mesh(self) -> DeviceMesh:
        """Mesh of the dense parameters, with dimensions pipeline, data_replicate, shard (data_shard x context), tensor."""
        raise AssertionError("a single process has no mesh")

    @property
    def expert_mesh(self) -> DeviceMesh:
        """Mesh of routed experts, with dimensions pipeline, data_replicate, expert_shard, expert, tensor."""
        raise AssertionError("a single process has no mesh")

    def gather(self, value: T) -> list[T]:
        """The values (anything picklable) of the ranks that hold different predictions, in the order of the rows."""
        return [value]

    def gather_all(self, value: T) -> list[T]:
        """The values of all ranks."""
        return [value]

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor of which this rank may hold a shard; every rank that holds one must ask."""
        return tensor

    def local(self, tensor: Tensor) -> Tensor:
        """The shard of a tensor that this rank holds, in the same memory."""
        return tensor

    def sharded(self, local: Tensor, like: Tensor) -> Tensor:
        """The tensor that is laid out as `like`, of which this rank holds `local`."""
        return local

    def sum_tensor(self, tensor: Tensor, *names: GroupName) -> None:
        """Sum a tensor, in place, over the groups of these names."""

    def begin_backward(self, model: nn.Module, *, is_last: bool) -> None:
        """Prepare for the backward pass of a micro-batch: what copies of a model need once a step is done in the last one's."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of parameters that no shards are made of, over the ranks that hold different predictions."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients of all ranks, those that several ranks hold counted once."""
        return nn.utils.get_total_norm(gradients)
