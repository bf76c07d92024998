"""Hugging Face folders of sharded checkpoints: written layer by layer, so that no rank ever holds the model.

Owns which rank writes which file, and adapters folded in on the way. torch's `HuggingFaceStorageWriter` is not used: it knows
no adapters, and tensors of several dtypes in one file come out unaligned.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unmask.files import atomic_write_json, write_synced
from unmask.models.arch.transformer import Transformer
from unmask.models.dtypes import dtype_name
from unmask.models.families.registry import stored_tensors, write_config
from unmask.models.weights.adapter import folded_state
from unmask.models.weights.boxes import BoxedTensor
from unmask.models.weights.checkpoint import GENERATION_CONFIG, token_ids
from unmask.models.weights.safetensors_io import (
    CONFIG_NAME,
    DEFAULT_SHARD_BYTES,
    INDEX_NAME,
    TensorSpec,
    split_into_files,
    write_safetensors,
)
from unmask.train.parallel.dcp import read_boxes, stored_shapes

MASTER, FROZEN = "master.", "frozen."
"""Prefixes of trained and of other parameters in a checkpoint."""


class LayerReader:
    """The tensors of a Hugging Face folder, from a sharded checkpoint; one layer is in memory at a time."""

    def __init__(self, shards: Path, skeleton: Transformer) -> None:
        """Open a checkpoint.

        Args:
            shards: its folder of shards.
            skeleton: the model on the meta device, adapters included, in the dtypes to write.
        """
        self._shards, self._skeleton, self.config = shards, skeleton, skeleton.config
        self._names, self._shapes = stored_tensors(skeleton.config), stored_shapes(shards)
        self._dtypes = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
        self.specs = {name: TensorSpec(each.shape, self._dtypes[each.parameter]) for name, each in self._names.items()}
        self._layer: str | None = None
        self._state: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """The tensor of a name on disk."""
        stored = self._names[name]
        layer = _layer_of(stored.parameter)
        if layer != self._layer:
            self._state.clear()
            self._layer, self._state = layer, self._read_layer(layer)
        return stored.view(self._state)

    def load_trained(self) -> Transformer:
        """The skeleton with what was trained: of a run with adapters, these and perhaps the embedding."""
        names = [name for name in self._dtypes if f"{MASTER}{name}" in self._shapes]
        self._skeleton.load_state_dict(self._read(names), strict=False, assign=True)
        return self._skeleton

    def _read_layer(self, layer: str) -> dict[str, Tensor]:
        names = [name for name in self._dtypes if name == layer or name.startswith(f"{layer}.")]
        state = self._read(names)
        if names == [layer]:
            return state
        block = deepcopy(self._skeleton.get_submodule(layer))
        block.load_state_dict({name.removeprefix(f"{layer}."): tensor for name, tensor in state.items()}, assign=True)
        return {f"{layer}.{name}": tensor for name, tensor in folded_state(block).items()}

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        saved = {name: f"{MASTER if f'{MASTER}{name}' in self._shapes else FROZEN}{name}" for name in names}
        tensors = {key: torch.empty(self._shapes[key][0], dtype=self._shapes[key][1]) for key in saved.values()}
        read_boxes(self._shards, {name: BoxedTensor.whole(tensor) for name, tensor in tensors.items()})
        return {name: tensors.pop(key).to(self._dtypes[name]) for name, key in saved.items()}


def write_weights(folder: Path, reader: LayerReader, *, rank: int, size: int, max_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Write this rank's share of the weight files of a Hugging Face folder; the main rank writes index and configs too."""
    folder.mkdir(exist_ok=True)
    files, metadata = split_into_files(reader.specs, max_bytes)
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for number, (name, tensors) in enumerate(zip(names, files, strict=True)):
        if number % size == rank:
            write_synced(folder / name, partial(write_safetensors, specs=reader.specs, names=tensors, read=reader.read))
    if rank == 0:
        config, dtype = reader.config, next(iter(reader.specs.values())).dtype
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        atomic_write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
        atomic_write_json(folder / CONFIG_NAME, write_config(config, dtype=dtype_name(dtype)))
        atomic_write_json(folder / GENERATION_CONFIG, token_ids(config))


def _layer_of(parameter: str) -> str:
    """The block that a parameter belongs to; outside of blocks itself."""
    return ".".join(parameter.split(".")[:2]) if parameter.startswith("blocks.") else parameter
