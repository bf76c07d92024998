"""Delta files: a fine-tuned model as a quantized, entropy-coded difference to its base.

Owns the delta file format. Knows tensors by name only: no model, no folder, no config.

A matrix is stored as integer levels in -m..m with one scale per row. Two levels share a byte: Huffman codes of pairs come
within 0.03 bits per weight of the entropy, codes of single levels waste a quarter of a bit (measured on Gaussian differences).
Everything else (norms) is stored exactly, as its new float32 values.

Format: magic, u32 header length, JSON header, zstd frames of levels, scales and exact values, sha256 of all before it.
Decoding is elementwise float32 arithmetic in a fixed order: the same bytes give the same bits on every machine.

Legend: R rows, C columns.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import CheckpointError

MAGIC = b"UNMASKD1"
_DIGEST_BYTES = 32
# Step sizes tried for a row, in units of its root mean square: 0.65 is best for a Gaussian row and three levels a side.
_STEPS = tuple(float(step) for step in np.geomspace(0.3, 1.6, 12))
_MAX_TRIES = 40
_LEAST_STRETCH = 1.005
_CHUNK_ROWS = 4096

Floats = NDArray[np.float32]
Levels = NDArray[np.int8]


class _Matrix(NamedTuple):
    """One quantized matrix: difference ~ levels_RC * scales_R * unit."""

    levels_RC: Levels
    scales_R: NDArray[np.float16]
    unit: float


class Delta:
    """A parsed delta file. `apply` computes one tuned tensor; check the base with `check_base` first.

    Raises:
        CheckpointError: the bytes are not a delta file, are cut short, or are damaged.
    """

    def __init__(self, encoded: bytes) -> None:
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
        return torch.from_numpy(difference_RC if base is None else _as_float32(base) + difference_RC)


def decode_delta(encoded: bytes, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tuned tensors, float32.

    Args:
        encoded: a file made by `encode_delta`.
        base: the tensors it was made from.

    Raises:
        CheckpointError: damaged bytes, or another base.
    """
    delta = Delta(encoded)
    delta.check_base(base)
    return {name: delta.apply(name, base.get(name)) for name in delta.names()}


def encode_delta(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, bits: int = 3, max_bytes: int | None = None
) -> bytes:
    """Encode `tuned - base`.

    Args:
        base: tensors by name, any floating dtype (compared and stored as float32).
        tuned: the same names and shapes, and others that the base has not, of which all is difference.
        bits: 2^bits - 1 levels, symmetric about zero (3: -3..3). At most 4.
        max_bytes: widen the steps, and so lower the entropy, until the file is no larger. None: smallest error.

    Returns:
        The delta file; the same input gives the same bytes.

    Raises:
        CheckpointError: a name is missing or a shape differs, a value is not finite, or `max_bytes` is out of reach.
    """
    if not 2 <= bits <= 4:
        raise CheckpointError(f"delta bits is {bits}; it must be 2, 3 or 4 so that two levels fit a byte")
    _check_same(base, tuned)
    max_level = 2 ** (bits - 1) - 1
    matrices = [name for name in sorted(tuned) if tuned[name].ndim == 2]
    exact = [name for name in sorted(tuned) if tuned[name].ndim != 2]
    steps = {name: best_steps(_difference(base, tuned, name), max_level) for name in matrices}
    header = {"base_sha256": fingerprint(base), "max_level": max_level}
    num_weights = sum(tuned[name].numel() for name in matrices)
    stretch = 1.0
    for _ in range(_MAX_TRIES):
        quantized = ((name, _quantize(_difference(base, tuned, name), steps[name] * stretch, max_level)) for name in matrices)
        encoded = _assemble(header, quantized, {name: _as_float32(tuned[name]) for name in exact}, max_level)
        if max_bytes is None or len(encoded) <= max_bytes:
            return encoded
        # Doubling the step saves about one bit a weight; a little less than that, so as not to overshoot.
        stretch *= max(_LEAST_STRETCH, 2 ** min(1.0, 0.9 * 8 * (len(encoded) - max_bytes) / max(num_weights, 1)))
    raise CheckpointError(f"the delta takes {len(encoded)} bytes at its coarsest, more than max_bytes={max_bytes}")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(np.ascontiguousarray(_as_float32(tensors[name]).astype("<f4", copy=False)).data)
    return digest.hexdigest()


def best_steps(difference_RC: Floats, max_level: int) -> Floats:
    """The step of each row [R] with the least squared error when rounded to -max_level..max_level."""
    steps = []
    for start in range(0, len(difference_RC), _CHUNK_ROWS):
        chunk_RC = difference_RC[start : start + _CHUNK_ROWS]
        rms_R = np.sqrt(np.mean(chunk_RC.astype(np.float64) ** 2, axis=1)).astype(np.float32)
        safe_R = np.where(rms_R > 0, rms_R, np.float32(1))
        unit_RC = chunk_RC / safe_R[:, None]
        errors = []
        for step in _STEPS:
            levels_RC = np.clip(np.rint(unit_RC / np.float32(step)), -max_level, max_level)
            errors.append(np.square(levels_RC * np.float32(step) - unit_RC).mean(axis=1, dtype=np.float64))
        best_R = np.asarray(_STEPS, dtype=np.float32)[np.argmin(np.stack(errors), axis=0)]
        steps.append(best_R * rms_R)
    return np.concatenate(steps)


def pack_pairs(levels: Levels, max_level: int) -> NDArray[np.uint8]:
    """Two levels a byte, in base 2 * max_level + 1; an odd count is filled with a zero level."""
    base = 2 * max_level + 1
    symbols = (levels.reshape(-1) + np.int8(max_level)).astype(np.uint8)
    if len(symbols) % 2:
        symbols = np.append(symbols, np.uint8(max_level))
    packed: NDArray[np.uint8] = symbols[0::2] * np.uint8(base) + symbols[1::2]
    return packed


def unpack_pairs(pairs: NDArray[np.uint8], count: int, max_level: int) -> Levels:
    """The first `count` levels of `pack_pairs`."""
    base = np.uint8(2 * max_level + 1)
    symbols = np.empty(2 * len(pairs), dtype=np.int8)
    symbols[0::2], symbols[1::2] = pairs // base, pairs % base
    return symbols[:count] - np.int8(max_level)


def _quantize(difference_RC: Floats, steps_R: Floats, max_level: int) -> _Matrix:
    safe_R = np.where(steps_R > 0, steps_R, np.float32(1))
    levels_RC = np.clip(np.rint(difference_RC / safe_R[:, None]), -max_level, max_level).astype(np.int8)
    # Given the levels, least squares beats the step itself as the scale: wide steps leave points off their cells' middle.
    wide_RC = levels_RC.astype(np.float64)
    products_R = np.einsum("rc,rc->r", wide_RC, difference_RC.astype(np.float64))
    squares_R = np.einsum("rc,rc->r", wide_RC, wide_RC)
    scales_R = np.divide(products_R, squares_R, out=np.zeros_like(products_R), where=squares_R > 0)
    # float16 would lose small scales: it holds each row's share of the largest one.
    unit = float(np.float32(scales_R.max(initial=0.0)))
    shares_R = scales_R / unit if unit > 0 else np.zeros_like(scales_R)
    return _Matrix(levels_RC, shares_R.astype("<f2"), unit)


def _assemble(
    header: dict[str, Any], matrices: Iterable[tuple[str, _Matrix]], exact: Mapping[str, Floats], max_level: int
) -> bytes:
    entries: list[dict[str, Any]] = []
    pairs, scales, values = [], [], []
    start = first_row = 0
    for name, matrix in matrices:
        packed = pack_pairs(matrix.levels_RC, max_level)
        position = {"kind": "levels", "start": start, "first_row": first_row, "unit": matrix.unit}
        entries.append({"name": name, "shape": list(matrix.levels_RC.shape), **position})
        pairs.append(packed.tobytes())
        scales.append(matrix.scales_R.tobytes())
        start += len(packed)
        first_row += len(matrix.scales_R)
    start = 0
    for name, array in exact.items():
        entries.append({"name": name, "shape": list(array.shape), "kind": "exact", "start": start})
        values.append(array.astype("<f4").tobytes())
        start += array.size
    # Level 1 codes these bytes as literals; higher levels look for repetitions in noise and end up larger.
    frames = [zstandard.ZstdCompressor(level=1).compress(b"".join(parts)) for parts in (pairs, scales, values)]
    text = json.dumps({**header, "tensors": entries, "frame_bytes": [len(frame) for frame in frames]}).encode()
    content = MAGIC + struct.pack("<I", len(text)) + text + b"".join(frames)
    return content + hashlib.sha256(content).digest()


def _split(encoded: bytes) -> tuple[dict[str, Any], bytes]:
    if not encoded.startswith(MAGIC):
        raise CheckpointError(f"not a delta file: it starts with {encoded[:8]!r}, not {MAGIC!r}; install unmask again")
    content, digest = encoded[:-_DIGEST_BYTES], encoded[-_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"the delta file is damaged or cut short ({len(encoded)} bytes); install unmask again")
    start = len(MAGIC) + 4
    (length,) = struct.unpack("<I", content[len(MAGIC) : start])
    return json.loads(content[start : start + length]), content[start + length :]


def _check_same(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    missing = sorted(base.keys() - tuned.keys())
    if missing:
        raise CheckpointError(f"the tuned model lacks tensors of the base: {', '.join(missing)}")
    for name, tensor in tuned.items():
        if name in base and tensor.shape != base[name].shape:
            raise CheckpointError(f"{name} is {list(tensor.shape)} but {list(base[name].shape)} in the base; they must agree")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} of the tuned model holds values that are not finite; use another checkpoint")


def _difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], name: str) -> Floats:
    if name not in base:
        return _as_float32(tuned[name])
    difference: Floats = _as_float32(tuned[name]) - _as_float32(base[name])
    return difference


def _as_float32(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
