"""Packed weights in a file that is mapped into memory: pages are read when they are used, and shared between processes.

Owns the file's layout: safetensors, each tensor at a multiple of 64 bytes (a cache line), with the config and what else is no
tensor in the header. Knows neither where such files lie nor how weights are packed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from unmask.files import atomic_write
from unmask.models.arch.config import ModelConfig, RopeConfig
from unmask.models.native.packing import PackedWeights
from unmask.models.native.quantize import PackedMatrix

_LINE = 64
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
# safetensors allows no holes between tensors.
_PADDING = "padding."


def write_packed(path: Path, weights: PackedWeights, facts: dict[str, str]) -> None:
    """Write packed weights, completely or not at all.

    Args:
        path: the file to make or replace.
        weights: what is written.
        facts: whatever else the header shall say.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    tensors = dict(_tensors(weights))
    header: dict[str, Any] = {_METADATA: {**facts, "weights": json.dumps(_description(weights))}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end + -end % _LINE
        if end < offset:
            header[f"{_PADDING}{name}"] = {"dtype": "U8", "shape": [offset - end], "data_offsets": [end, offset]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _LINE)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.write(bytes(-tensor.nbytes % _LINE))

    atomic_write(path, write)


def read_facts(path: Path) -> dict[str, str] | None:
    """What the header says beside the weights; None: the file is missing, cut short or damaged."""
    header = _header(path)
    return None if header is None else header[0][_METADATA]


def map_packed(path: Path) -> PackedWeights | None:
    """The packed weights in a file, mapped; None: it is missing, cut short or damaged."""
    found = _header(path)
    if found is None:
        return None
    header, start = found
    try:
        description = json.loads(header.pop(_METADATA)["weights"])
        # Copy on write: nobody writes, and PyTorch asks for memory that could be written.
        data = torch.from_numpy(np.memmap(path, np.uint8, "c", start))
        tensors = {name: _view(data, entry) for name, entry in header.items() if not name.startswith(_PADDING)}
        return _weights(description, tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


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


def _tensors(weights: PackedWeights) -> Iterator[tuple[str, Tensor]]:
    for name, matrix in weights.matrices.items():
        for part in fields(matrix):
            value = getattr(matrix, part.name)
            if isinstance(value, Tensor):
                yield f"{name}.{part.name}", value
    yield from weights.vectors.items()


def _description(weights: PackedWeights) -> dict[str, Any]:
    """All that is no tensor, for JSON."""
    numbers = {
        name: {part.name: value for part in fields(matrix) if not isinstance(value := getattr(matrix, part.name), Tensor)}
        for name, matrix in weights.matrices.items()
    }
    return {
        "config": asdict(weights.config), "bits": weights.bits, "rope_factor": weights.rope_factor,
        "is_rotated": weights.is_rotated, "matrices": numbers, "vectors": list(weights.vectors),
    }  # fmt: skip


def _weights(description: dict[str, Any], tensors: dict[str, Tensor]) -> PackedWeights:
    config = description["config"]
    config |= {"rope": RopeConfig(**config["rope"]), "eos_ids": tuple(config["eos_ids"])}
    matrices = {}
    for name, numbers in description["matrices"].items():
        parts: dict[str, Any] = {
            part.name: tensors.get(f"{name}.{part.name}") for part in fields(PackedMatrix) if part.name not in numbers
        }
        matrices[name] = PackedMatrix(**numbers, **parts)
    return PackedWeights(
        ModelConfig(**config), description["bits"], description["rope_factor"], description["is_rotated"], matrices,
        {name: tensors[name] for name in description["vectors"]},
    )  # fmt: skip


def _view(data: Tensor, entry: dict[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    return data[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
