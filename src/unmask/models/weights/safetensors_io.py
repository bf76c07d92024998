"""Folders of safetensors files: the index, reading one tensor at a time, and writing whole or not at all.

Owns the layout of weight files and their headers. Knows tensors by name only: what the names mean is `families`' matter, which
of them a model needs `checkpoint`'s.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmask.errors import CheckpointError, UnmaskWarning
from unmask.files import Writer, bytes_writer, disk_errors, json_writer, read_json, staging_folder, sync_folder, write_folder
from unmask.models.weights.boxes import BoxedTensor
from unmask.models.weights.manifest import float_model

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
DEFAULT_SHARD_BYTES = 5 * 2**30
_WEIGHT_FILE = re.compile(r"model(-v\d+)?(-\d{5}-of-\d{5})?\.safetensors")
_COMPARED_BYTES = 2**22
_MEAN_COLUMNS = 256
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The specs of tensors in memory."""
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class TensorFiles:
    """The weights of a folder, any tensor at any time; its files stay open as long as `stack`.

    Args:
        weights: the folder; or a part of its `tensor_index`, of which no other files are opened.
        stack: closes them.

    Raises:
        CheckpointError: as of `tensor_index`.
    """

    def __init__(self, weights: Path | Mapping[str, Path], stack: ExitStack) -> None:
        index = tensor_index(weights) if isinstance(weights, Path) else weights
        files = {path: stack.enter_context(_open(path)) for path in sorted(set(index.values()))}
        self._file_of = {name: files[path] for name, path in index.items()}
        self.names = index.keys()

    def header(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Shape and dtype, from the file's header alone; a dtype that no weight may have stays a string."""
        header = self._file_of[name].get_slice(name)
        return tuple(header.get_shape()), _DTYPES.get(header.get_dtype(), header.get_dtype())

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a weight.

        Raises:
            CheckpointError: it is not floating point.
        """
        shape, dtype = self.header(name)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{name} is {dtype}; a weight must be floating point")
        return TensorSpec(shape, dtype)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def fill(self, name: str, tensor: BoxedTensor) -> None:
        """Fill boxes with what the tensor holds of them; nothing else of it is read."""
        _fill(self._file_of[name], name, tensor)

    def mean_row(self, name: str, columns: slice) -> Tensor:
        """The mean of a matrix's rows in some columns, at least float32; read some columns at a time."""
        matrix, means = self._file_of[name].get_slice(name), []
        wide = torch.promote_types(self.spec(name).dtype, torch.float32)
        for start in range(columns.start, columns.stop, _MEAN_COLUMNS):
            part = matrix[:, start : min(start + _MEAN_COLUMNS, columns.stop)]
            means.append(part.mean(0, dtype=wide))
        return torch.cat(means)

    def equal(self, first: str, second: str) -> bool:
        """Whether two matrices hold the same numbers; they are read some rows at a time, up to the first difference."""
        if self.header(first)[0] != self.header(second)[0]:
            return False
        slices = [self._file_of[name].get_slice(name) for name in (first, second)]
        spec = self.spec(first)
        rows = max(_COMPARED_BYTES * spec.shape[0] // max(spec.num_bytes, 1), 1)
        parts = ([matrix[start : start + rows].double() for matrix in slices] for start in range(0, spec.shape[0], rows))
        return all(torch.equal(*pair) for pair in parts)


def tensor_index(folder: Path) -> dict[str, Path]:
    """Which file of `folder` holds each tensor, after opening every file: a truncated one is found here.

    The index decides: copies of a tensor in other shards, and shards it does not name, are what an earlier save left behind.
    A single file is preferred to an index, as by transformers.

    Raises:
        CheckpointError: no weights, an index that names an absent file or tensor, or a corrupt file.
    """
    single, index_path = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        if index_path.exists() and any(folder.glob("model-*-of-*.safetensors")):
            warnings.warn(
                f"{folder} holds both {SINGLE_NAME} and shards with an index; {SINGLE_NAME} is read, remove what is stale",
                UnmaskWarning,
                stacklevel=1,
            )
        return dict.fromkeys(names_in(single), single)
    if not index_path.exists():
        raise CheckpointError(_no_weights(folder))
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path} has no valid 'weight_map'; fetch or save the checkpoint again")
    present: dict[str, set[str]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index_path} names {file!r}; shards must lie in the same folder")
        if not (folder / file).exists():
            raise CheckpointError(f"{index_path} names {file}, which does not exist; fetch or save the checkpoint again")
        present[file] = set(names_in(folder / file))
    missing = sorted(f"{name} in {file}" for name, file in weight_map.items() if name not in present[file])
    if missing:
        raise CheckpointError(f"{index_path} lists tensors that their file lacks: {', '.join(missing)}")
    paths = {file: folder / file for file in present}
    return {name: paths[file] for name, file in weight_map.items()}


def iter_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream (name on disk, CPU tensor), one tensor in memory at a time."""
    with ExitStack() as stack:
        files = TensorFiles(folder, stack)
        for name in files.names:
            yield name, files.read(name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    with _open_existing(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def names_in(path: Path) -> list[str]:
    """Names of the tensors in one safetensors file; raises CheckpointError when it is missing or corrupt."""
    with _open_existing(path) as file:
        return list(file.keys())


def fill_boxes(path: Path, tensors: Mapping[str, BoxedTensor]) -> None:
    """Fill boxes with what one safetensors file holds of them; nothing else of it is read.

    Raises:
        CheckpointError: the file is missing or corrupt, or a tensor is missing or of another shape.
    """
    with _open_existing(path) as file:
        present = set(file.keys())
        for name, tensor in tensors.items():
            if name not in present:
                raise CheckpointError(f"{path} holds no {name}; save the checkpoint again")
            _fill(file, name, tensor)


def _fill(file: Any, name: str, tensor: BoxedTensor) -> None:
    stored = file.get_slice(name)
    if tuple(stored.get_shape()) != tensor.shape:
        raise CheckpointError(f"{name} is {list(stored.get_shape())} on disk and {list(tensor.shape)} in the model")
    for offsets, box in tensor.boxes:
        part = tuple(slice(start, start + size) for start, size in zip(offsets, box.shape, strict=True))
        box.copy_(stored[part] if part else file.get_tensor(name))


def stored_shape(path: Path, name: str) -> tuple[int, ...] | None:
    """Shape of a tensor in one safetensors file, from the header alone; None: it is not there.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    with _open_existing(path) as file:
        return tuple(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118  (not a mapping)


def write_checkpoint(
    folder: Path, hf_config: Mapping[str, Any], specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES, extra_files: Iterable[Path] = (), extra_jsons: Mapping[str, Any] | None = None,
    extra_texts: Mapping[str, str] | None = None, always_index: bool = False,
) -> None:  # fmt: skip
    """Write a checkpoint from tensors made on demand, one in memory at a time.

    Everything is written to a staging folder and synced before the first old file is touched; then files are renamed into
    place, in an order in which whoever opens the folder at any moment reads all old or all new weights.

    Args:
        folder: new, or an existing checkpoint to replace.
        hf_config: content of config.json.
        specs: the tensors to store, under their names on disk.
        read: gives the tensor of a name, in the spec's shape and dtype, on any device.
        max_shard_bytes: weights of more bytes are split into numbered shards of at most so many, plus an index.
        extra_files: copied into the folder under their own names (tokenizer files).
        extra_jsons: more files, by name; they replace extra files of the same name.
        extra_texts: text files, by name.
        always_index: write numbered shards and an index even where one file would do.

    Raises:
        CheckpointError: the disk is full or refuses; nothing is left behind.
    """
    extra = {path.name: bytes_writer(_read_extra(path)) for path in extra_files}
    extra |= {name: bytes_writer(text.encode()) for name, text in (extra_texts or {}).items()}
    shards, metadata = split_into_files(specs, max_shard_bytes)
    indexed = always_index or len(shards) > 1
    names = _shard_names(folder, len(shards)) if indexed else [SINGLE_NAME]
    weights = dict(zip(names, shards, strict=True))
    jsons = {**(extra_jsons or {}), CONFIG_NAME: dict(hf_config)}
    if indexed:
        file_of = {tensor: name for name, shard in weights.items() for tensor in shard}
        jsons[INDEX_NAME] = {"metadata": metadata, "weight_map": dict(sorted(file_of.items()))}
    writers: dict[str, Writer] = {
        **{name: partial(write_safetensors, specs=specs, names=shard, read=read) for name, shard in weights.items()},
        **extra,
        **{name: json_writer(value) for name, value in jsons.items()},
    }
    write_folder(folder, writers, exchange=lambda stage: _replace(folder, stage, set(names)))


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copy a checkpoint with an index to a folder that is there; weight files, never changed in place, become hard links.

    Where the file system has no links they are copied.

    Raises:
        CheckpointError: the disk is full or refuses; nothing is left behind.
    """
    with staging_folder(folder) as stage, disk_errors(folder):
        for path in sorted(source.iterdir()):
            if _WEIGHT_FILE.fullmatch(path.name):
                try:
                    os.link(path, stage / path.name)
                    continue
                except OSError:
                    pass
            shutil.copyfile(path, stage / path.name)
        sync_folder(stage)
        _replace(folder, stage, {path.name for path in source.iterdir()})


def split_into_files(specs: Mapping[str, TensorSpec], max_bytes: int) -> tuple[list[list[str]], dict[str, Any]]:
    """The tensors of each file of at most so many bytes, and the metadata of their index."""
    from huggingface_hub import split_state_dict_into_shards_factory  # here: reading needs nothing of it, and it takes long

    split = split_state_dict_into_shards_factory(
        dict(specs), get_storage_size=lambda spec: spec.num_bytes, filename_pattern="{suffix}", max_shard_size=max_bytes
    )
    return list(split.filename_to_tensors.values()), split.metadata


def write_safetensors(
    file: BinaryIO, specs: Mapping[str, TensorSpec], names: Iterable[str], read: Callable[[str], Tensor]
) -> None:
    """Write one safetensors file tensor by tensor (the library would hold the whole file in memory)."""
    # Wide dtypes first: readers view the bytes in place, so every tensor must start at a multiple of its item size.
    ordered = sorted(names, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        spec = specs[name]
        end = offset + spec.num_bytes
        header[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for name in ordered:
        tensor = read(name).detach()
        assert (tuple(tensor.shape), tensor.dtype) == specs[name], f"{name}: {tensor.shape} {tensor.dtype} != {specs[name]}"
        file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _open_existing(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; save the tensors as safetensors")
    return _open(path)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}); fetch or save it again") from error


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give one in the Hugging Face layout"
    if quantized := float_model(folder):
        return quantized
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return f"{folder} holds {pickled[0]} but no safetensors weights; convert it to safetensors first"
    return f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; give a folder in the Hugging Face layout"


def _read_extra(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} to copy it: {error.strerror or error}; save without it") from error


def _shard_names(folder: Path, count: int) -> list[str]:
    """Names that collide with no present shard, so that old and new weights can lie side by side during the exchange."""
    generation = 1
    while True:
        stem = "model" if generation == 1 else f"model-v{generation}"
        names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if not any((folder / name).exists() for name in names):
            return names
        generation += 1


def _replace(folder: Path, stage: Path, weights: set[str]) -> None:
    """Exchange the checkpoint in `folder` for the one in `stage`; a reader prefers the single file to the index."""
    old = {path for path in folder.iterdir() if _WEIGHT_FILE.fullmatch(path.name) and path.name not in weights}
    staged = {path.name for path in stage.iterdir()}
    last = [SINGLE_NAME] if SINGLE_NAME in staged else [INDEX_NAME]
    for name in [*sorted(staged - set(last)), *last]:
        os.replace(stage / name, folder / name)
    if SINGLE_NAME in staged:
        (folder / INDEX_NAME).unlink(missing_ok=True)
    # An old single file hides the new index until it is gone: its removal is then the moment of exchange.
    for path in sorted(old):
        path.unlink()
    sync_folder(folder)
