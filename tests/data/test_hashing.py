from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.data.hashing import file_digest, hash_ints, hash_text, seeded_permutation


@given(length=st.integers(0, 200), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 9))
def test_permutation_holds_every_number_once(length, seed, epoch):
    assert sorted(seeded_permutation(length, seed, epoch)) == list(range(length))


def test_values_are_written_down_for_ever():
    assert hash_ints(1, 2, 3) == 9666406879569478978
    assert hash_text("chain_sum") == 12825452197707631879
    assert seeded_permutation(8, 1, 0).tolist() == [6, 3, 2, 7, 4, 0, 5, 1]


def test_order_and_number_of_keys_count():
    assert len({hash_ints(), hash_ints(0), hash_ints(0, 0), hash_ints(1, 2), hash_ints(2, 1), hash_ints(12)}) == 6
    assert hash_text("ab") != hash_text("ba") != hash_text("ab\0")


def test_places_are_uniform_over_seeds():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), seeded_permutation(5, seed, 0)] += 1
    assert (np.abs(counts - 400) < 90).all()


def test_digest_of_files_is_that_of_their_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    digest = file_digest([first, second])
    assert file_digest([second, first]) != digest
    moved = first.rename(tmp_path / "c")
    assert file_digest([moved, second]) == digest
    second.write_bytes(b"twO")
    assert file_digest([moved, second]) != digest
    monkeypatch.setattr("unmask.data.hashing._PIECE", 4)
    monkeypatch.setattr("unmask.data.hashing._MAX_PIECES", 3)
    for size, read in ((12, range(12)), (40, [0, 3, 18, 21, 36, 39])):
        content = bytearray(size)
        moved.write_bytes(content)
        digest = file_digest([moved])
        for place in read:
            content[place] = 1
            moved.write_bytes(content)
            assert file_digest([moved]) != digest, place
            content[place] = 0
        moved.write_bytes(content + b"\0")
        assert file_digest([moved]) != digest
