"""Packed weights in a file that is mapped into memory: pages are read when they are used, and shared between processes.

Owns the file's layout: safetensors, each tensor at a multiple of 64 bytes (a cache line), with the config and what else is no
tensor in the header. Knows neither where such files lie nor how weights are packed.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import struct
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from unmask.files import atomic_write
from unmask.models.arch.config import ModelConfig, MoEConfig, RopeConfig
from unmask.models.native.packing import PackedSink, PackedWeights, weights_of

_LINE = 64
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
# safetensors allows no holes between tensors.
_PADDING = "padding."
# Of one matrix or vector.
_HEADER_BYTES = 2**10
# Of Linux 5.14 and later; Python has no name for it yet.
_MADV_POPULATE_READ = 22


class PackedFile(PackedSink):
    """Writes what it takes straight to its place in a file; `finish` writes the header, for which room is left.

    Args:
        file: new and empty.
        header_bytes: room for the header.
    """

    def __init__(self, file: BinaryIO, header_bytes: int) -> None:
        super().__init__()
        self._file, self._start = file, header_bytes
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._end = 0

    def put(self, name: str, part: Tensor, first: int, rows: int) -> None:
        shape = (rows, *part.shape[1:])
        row_bytes = math.prod(part.shape[1:]) * part.dtype.itemsize
        if name not in self._places:
            self._places[name] = (self._end, part.dtype, shape)
            self._end += _aligned(rows * row_bytes)
        offset, dtype, whole = self._places[name]
        assert (dtype, whole) == (part.dtype, shape), name
        self._file.seek(self._start + offset + first * row_bytes)
        self._file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self, description: Mapping[str, Any], facts: Mapping[str, str]) -> None:
        """Write the header.

        Args:
            description: of the weights, for JSON.
            facts: whatever else the header shall say.
        """
        self._file.truncate(self._start + self._end)
        weights = {**description, "matrices": self.numbers, "vectors": self.vectors}
        header: dict[str, Any] = {_METADATA: {**facts, "weights": json.dumps(weights)}}
        for name, (offset, dtype, shape) in self._places.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            if end < _aligned(end):
                padding = {"dtype": "U8", "shape": [_aligned(end) - end], "data_offsets": [end, _aligned(end)]}
                header[f"{_PADDING}{name}"] = padding
        encoded = json.dumps(header, separators=(",", ":")).encode()
        length = self._start - 8
        assert len(encoded) <= length, "more room is needed for the header"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", length) + encoded.ljust(length))


def write_packed(path: Path, weights: PackedWeights, facts: dict[str, str]) -> None:
    """Write packed weights, completely or not at all.

    Args:
        path: the file to make or replace.
        weights: what is written.
        facts: whatever else the header shall say.

    Raises:
        CheckpointError: the disk is full or refuses.
    """

    def write(file: BinaryIO) -> None:
        sink = PackedFile(file, _aligned(_HEADER_BYTES * (1 + len(weights.matrices) + len(weights.vectors))))
        for name, matrix in weights.matrices.items():
            sink.add_matrix(name, matrix)
        for name, vector in weights.vectors.items():
            sink.add_vector(name, vector)
        sink.finish(describe(weights), facts)

    atomic_write(path, write)


def read_facts(path: Path) -> dict[str, str] | None:
    """What the header says beside the weights; None: the file is missing, cut short or damaged."""
    header = _header(path)
    return None if header is None else header[0][_METADATA]


def map_packed(path: Path) -> PackedWeights | None:
    """The packed weights in a file, mapped; None: it is missing, cut short or damaged."""
    found = map_tensors(path)
    if found is None:
        return None
    description, tensors = found
    try:
        numbers, vectors = description.pop("matrices"), description.pop("vectors")
        return weights_of(description | {"config": _config(description["config"])}, numbers, vectors, tensors)
    except (ValueError, KeyError, TypeError):
        return None


def map_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What a file says of its weights, and its tensors, mapped; None: it is missing, cut short or damaged."""
    found = _header(path)
    if found is None:
        return None
    header, start = found
    try:
        description: dict[str, Any] = json.loads(header.pop(_METADATA)["weights"])
        # Copy on write: nobody writes, and PyTorch asks for memory that could be written.
        data = torch.from_numpy(np.memmap(path, np.uint8, "c", start))
        return description, {name: _view(data, entry) for name, entry in header.items() if not name.startswith(_PADDING)}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def prefault(weights: PackedWeights) -> Thread:
    """A thread that reads and maps all pages of the matrices, for weights that fit into memory. The first products would do so
    page by page, and take twice as long. Where the system cannot, it does nothing."""

    def run() -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for matrix in weights.matrices.values():
            beside = matrix.weight.data_ptr() % mmap.PAGESIZE
            madvise(matrix.weight.data_ptr() - beside, matrix.weight.nbytes + beside, _MADV_POPULATE_READ)

    thread = Thread(target=run if sys.platform == "linux" else None, name="unmask prefault", daemon=True)
    thread.start()
    return thread


def _header(path: Path) -> tuple[dict[str, Any], int] | None:
    """The header and where the data begins, if the file is as long as the header says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            header = json.loads(file.read(length)) if length <= size else {}
        ends = (entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA)
        is_whole = max(ends, default=-1) == size - 8 - length and "weights" in header[_METADATA]
        return (header, 8 + length) if is_whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def describe(weights: PackedWeights) -> dict[str, Any]:
    """What a file says of the weights beside matrices and vectors, for JSON."""
    return {
        "config": asdict(weights.config), "bits": weights.bits, "rope_factor": weights.rope_factor,
        "is_rotated": weights.is_rotated,
    }  # fmt: skip


def _config(stored: dict[str, Any]) -> ModelConfig:
    moe = stored.get("moe")
    return ModelConfig(
        **stored | {
            "rope": RopeConfig(**stored["rope"]), "eos_ids": tuple(stored["eos_ids"]),
            "moe": None if moe is None else MoEConfig(**moe),
        }
    )  # fmt: skip


def _aligned(size: int) -> int:
    return size + -size % _LINE


def _view(data: Tensor, entry: dict[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    return data[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
