"""Hashes and permutations that never change: integers hashed to 64 bits, orders sorted by such hashes, digests of files.

Owns arithmetic, and which part of a file counts. A library's generator may give other numbers in its next release, and a
resumed run would then see other documents; a hash that is written out here cannot change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MASK_64 = (1 << 64) - 1
_INCREMENT = 0x9E3779B97F4A7C15
_PIECE = 1 << 20
_MAX_PIECES = 256


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 on one Python integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def hash_ints(*values: int) -> int:
    """Hash a sequence of integers to 64 bits.

    Args:
        values: any integers; their order counts.

    Returns:
        An integer in `0 .. 2**64 - 1`, the same on every machine and in every release.
    """
    state = 0
    for value in values:
        state = _mix((state + _INCREMENT + _mix(value & _MASK_64)) & _MASK_64)
    return state


def hash_text(text: str) -> int:
    """Hash a string to 64 bits (`hash()` differs from process to process)."""
    data = text.encode()
    return hash_ints(len(data), *(int.from_bytes(data[i : i + 7], "little") for i in range(0, len(data), 7)))


def seeded_permutation(length: int, *keys: int) -> NDArray[np.int64]:
    """A permutation of `0 .. length - 1` that is a function of `keys` (a seed, an epoch) alone.

    Args:
        length: how many numbers to permute.
        keys: integers naming the permutation.

    Returns:
        int64 `[length]`.
    """
    with np.errstate(over="ignore"):
        value = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_INCREMENT) + np.uint64(hash_ints(*keys))
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return np.argsort(value, kind="stable").astype(np.int64)


def file_digest(files: Iterable[Path]) -> str:
    """A digest of the contents of files, in their order; where they are and when they were written does not count.

    Of a file of more than 256 MiB its size and 256 pieces of 1 MiB count, its beginning and its end among them, so that none
    takes more than a second or so.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            size = file.stat().st_size
            count = min(_MAX_PIECES, -(-size // _PIECE))
            digest.update(f"{size}:".encode())
            for number in range(count):
                last = max(size - _PIECE, 0)
                stream.seek(number * _PIECE if size <= count * _PIECE else number * last // (count - 1))
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()
