"""Encoder of delta files: a fine-tuned model as a quantized, entropy-coded difference to its base.

A matrix is stored as integer levels in -m..m with one scale per row. Two levels share a byte: Huffman codes of pairs come
within 0.03 bits per weight of the entropy, codes of single levels waste a quarter of a bit (measured on Gaussian differences).
Everything else (norms) is stored exactly, as its new float32 values. Format and decoder: `unmask.models.weights.delta`.

Legend: R rows, C columns.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import CheckpointError
from unmask.models.weights.delta import MAGIC, Delta, Floats, Levels, as_float32, fingerprint

# Step sizes tried for a row, in units of its root mean square: 0.65 is best for a Gaussian row and three levels a side.
_STEPS = tuple(float(step) for step in np.geomspace(0.3, 1.6, 12))
_MAX_TRIES = 40
_LEAST_STRETCH = 1.005
_CHUNK_ROWS = 4096


class _Matrix(NamedTuple):
    """One quantized matrix: difference ~ levels_RC * scales_R * unit."""

    levels_RC: Levels
    scales_R: NDArray[np.float16]
    unit: float


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
        encoded = _assemble(header, quantized, {name: as_float32(tuned[name]) for name in exact}, max_level)
        if max_bytes is None or len(encoded) <= max_bytes:
            return encoded
        # Doubling the step saves about one bit a weight; a little less than that, so as not to overshoot.
        stretch *= max(_LEAST_STRETCH, 2 ** min(1.0, 0.9 * 8 * (len(encoded) - max_bytes) / max(num_weights, 1)))
    raise CheckpointError(f"the delta takes {len(encoded)} bytes at its coarsest, more than max_bytes={max_bytes}")


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
        return as_float32(tuned[name])
    difference: Floats = as_float32(tuned[name]) - as_float32(base[name])
    return difference
