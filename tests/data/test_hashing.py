from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unmask.data.hashing import hash_ints, hash_text, seeded_permutation


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
