"""Delta files: a fine-tuned model as a quantized, entropy-coded difference to its base.

Owns the file format and decoding (the encoder is scripts/embedded/delta_encoder.py). Knows tensors by name only: no model, no
folder, no config.

A matrix is stored as integer levels in -m..m with one scale per row, two levels a byte; everything else (norms) exactly, as its
new float32 values.

Format: magic, u32 header length, JSON header, zstd frames of levels, scales and exact values, sha256 of all before it.
Decoding is elementwise float32 arithmetic in a fixed order: the same bytes give the same bits on every machine.

Legend: R rows, C columns.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import CheckpointError

MAGIC = b"UNMASKD1"
DIGEST_BYTES = 32

Floats = NDArray[np.float32]
Levels = NDArray[np.int8]


class Delta:
    """A parsed delta file. `apply` computes one tuned tensor; check the base with `check_base` first.

    Raises:
        CheckpointError: the bytes are not a delta file, are cut short, or are damaged.
    """

    def __init__(self, encoded: bytes) -> None:
        import zstandard

        header, body = _split(encoded)
        self.base_sha256: str = header["base_sha256"]
        self._max_level: int = header["max_level"]
        self._entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in header["tensors"]}
        sizes: list[int] = header["frame_bytes"]
        frames, start = [], 0
        for size in sizes:
            frames.append(zstandard.ZstdDecompressor().decompress(body[start : start + size]))
            start += size
        self._pairs = np.frombuffer(frames[0], dtype=np.uint8)
        self._scales = np.frombuffer(frames[1], dtype="<f2")
        self._exact = np.frombuffer(frames[2], dtype="<f4")

    def names(self) -> list[str]:
        """Tensors of the tuned model."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._entries[name]["shape"])

    def check_base(self, base: Mapping[str, Tensor]) -> None:
        """Check that `base` is the model this delta was made from.

        Raises:
            CheckpointError: the fingerprints differ.
        """
        sha256 = fingerprint(base)
        if sha256 != self.base_sha256:
            raise CheckpointError(
                f"this delta belongs to the base with sha256 {self.base_sha256[:12]}, not {sha256[:12]}; use that base"
            )

    def apply(self, name: str, base: Tensor | None) -> Tensor:
        """The tuned float32 tensor of `name`; `base` is the base's tensor of that name (None: it has none)."""
        entry = self._entries[name]
        shape, start = self.shape(name), entry["start"]
        if entry["kind"] == "exact":
            stop = start + int(np.prod(shape))
            return torch.from_numpy(self._exact[start:stop].astype(np.float32).reshape(shape))
        rows, columns = shape
        pairs = self._pairs[start : start + (rows * columns + 1) // 2]
        levels_RC = unpack_pairs(pairs, rows * columns, self._max_level).reshape(shape)
        first = entry["first_row"]
        scales_R = self._scales[first : first + rows].astype(np.float32) * np.float32(entry["unit"])
        difference_RC = levels_RC.astype(np.float32) * scales_R[:, None]
        return torch.from_numpy(difference_RC if base is None else as_float32(base) + difference_RC)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(np.ascontiguousarray(as_float32(tensors[name]).astype("<f4", copy=False)).data)
    return digest.hexdigest()


def unpack_pairs(pairs: NDArray[np.uint8], count: int, max_level: int) -> Levels:
    """The first `count` levels of bytes that hold two each, in base 2 * max_level + 1."""
    base = np.uint8(2 * max_level + 1)
    symbols = np.empty(2 * len(pairs), dtype=np.int8)
    symbols[0::2], symbols[1::2] = pairs // base, pairs % base
    return symbols[:count] - np.int8(max_level)


def _split(encoded: bytes) -> tuple[dict[str, Any], bytes]:
    if not encoded.startswith(MAGIC):
        raise CheckpointError(f"not a delta file: it starts with {encoded[:8]!r}, not {MAGIC!r}; install unmask again")
    content, digest = encoded[:-DIGEST_BYTES], encoded[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"the delta file is damaged or cut short ({len(encoded)} bytes); install unmask again")
    start = len(MAGIC) + 4
    (length,) = struct.unpack("<I", content[len(MAGIC) : start])
    return json.loads(content[start : start + length]), content[start + length :]


def as_float32(tensor: Tensor) -> Floats:
    """The tensor's values as a float32 array on the CPU."""
    array: Floats = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
