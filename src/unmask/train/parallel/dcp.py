"""Sharded tensors on disk: torch.distributed.checkpoint (DCP) in terms of boxes.

Owns the planners that write and read boxes under their place in the whole tensor, so that a folder can be read by any number of
processes in any layout, one among them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from unmask.errors import CheckpointError
from unmask.models.weights.boxes import Box, BoxedTensor

# What a process reads, it reads by itself. Never taken back: other threads change the filters as well.
warnings.filterwarnings("ignore", r"torch\.distributed is .*, assuming the intent is to (save|load) in a single process")

Boxed = Mapping[str, BoxedTensor]


def write_boxes(folder: Path, tensors: Boxed, group: dist.ProcessGroup | None) -> None:
    """Write this rank's boxes; all ranks of the group take part, and boxes that several hold are written once.

    Raises:
        CheckpointError: a rank cannot write; on every rank.
    """

    def write() -> None:
        writer = FileSystemWriter(folder)
        save(dict(tensors), storage_writer=writer, planner=_SavePlanner(), process_group=group, no_dist=group is None)

    _in_one_line(write, folder)


def read_boxes(folder: Path, tensors: Boxed) -> None:
    """Fill boxes with what the folder holds of them; every process reads by itself.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or a file cannot be read.
    """

    def read() -> None:
        load(dict(tensors), storage_reader=FileSystemReader(folder), planner=_LoadPlanner(), no_dist=True)

    _in_one_line(read, folder)


def stored_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a folder.

    Raises:
        CheckpointError: it holds no complete checkpoint.
    """
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:  # A damaged pickle raises anything.
        raise CheckpointError(
            f"{folder} cannot be read ({_reason(error)}); remove the checkpoint to resume from another"
        ) from error
    return {
        name: (tuple(item.size), item.properties.dtype)
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def _in_one_line(action: Callable[[], None], folder: Path) -> None:
    """Run an action of DCP; its errors, of whichever rank, become one line."""
    try:
        action()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{folder}, rank {rank}: {_reason(cause)}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


class _SavePlanner(DefaultSavePlanner):
    """Planner of a dictionary of boxed tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(name, tensor, box) for name, tensor in self.state_dict.items() for box in tensor.boxes]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _box_at(self.state_dict[index.fqn], index)


class _LoadPlanner(DefaultLoadPlanner):
    """Planner that fills the boxes of a dictionary of boxed tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"the checkpoint holds no {name}; resume with the recipe it was started with")
            if tuple(stored.size) != tensor.shape:
                raise CheckpointError(f"{name} is {list(stored.size)} in the checkpoint and {list(tensor.shape)} in the model")
            chunks = [ChunkStorageMetadata(torch.Size(box.offsets), box.tensor.size()) for box in tensor.boxes]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _box_at(self.state_dict[index.fqn], index)


def _write_item(name: str, tensor: BoxedTensor, box: Box) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, torch.Size(box.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(box.offsets), box.tensor.size()),
            properties=TensorProperties.create_from_tensor(box.tensor),
            size=tensor.size(),
        ),
    )


def _box_at(tensor: BoxedTensor, index: MetadataIndex) -> Tensor:
    return next(box.tensor for box in tensor.boxes if torch.Size(box.offsets) == index.offset)
