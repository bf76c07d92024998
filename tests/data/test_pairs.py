from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from streams import PAD, ListStream
from unmask.data.documents import Document
from unmask.data.packing import Overlong, PackedRows
from unmask.data.pairs import PairPacker
from unmask.errors import ConfigError, DataError


def side(num_given: int, answer: list[int]) -> Document:
    tokens = np.array([*range(num_given), *answer], dtype=np.int32)
    return Document(tokens, np.array([False] * num_given + [True] * len(answer)))


def pair(num_given: int, chosen: list[int], rejected: list[int]) -> Document:
    left, right = side(num_given, chosen), side(num_given, rejected)
    return Document(left.tokens, left.maskable, rejected=right)


answers = st.lists(st.integers(100, 102), max_size=6)
pairs = st.lists(st.builds(pair, st.integers(0, 8), answers, answers), max_size=12)
overlongs = st.sampled_from(["truncate", "drop"])


def read(rows: PackedRows, row: int) -> tuple[list[int], list[bool]]:
    used = rows.segment_RL[row] == 1
    length = int(used.sum())
    assert used[:length].all(), "padding only at the end"
    assert rows.position_RL[row].tolist() == [*range(length)] + [0] * (8 - length)
    assert rows.tokens_RL[row, length:].tolist() == [PAD] * (8 - length)
    assert not rows.maskable_RL[row, length:].any()
    return rows.tokens_RL[row, :length].tolist(), rows.maskable_RL[row, :length].tolist()


def expected(documents: list[Document], overlong: Overlong) -> list[tuple[int, list[tuple[list[int], list[bool]]]]]:
    """Ordinal and both sides of every pair that stays."""
    kept = []
    for ordinal, document in enumerate(documents):
        assert document.rejected is not None
        sides = [(one.tokens[:8].tolist(), one.maskable[:8].tolist()) for one in (document, document.rejected)]
        is_long = max(len(document), len(document.rejected)) > 8
        if all(any(flags) for _, flags in sides) and sides[0] != sides[1] and not (is_long and overlong == "drop"):
            kept.append((ordinal, sides))
    return kept


@given(documents=pairs, overlong=overlongs, chunk=st.sampled_from([2, 4, 6]))
def test_each_pair_is_two_rows_or_counted_as_dropped(documents, overlong, chunk):
    packer = PairPacker(ListStream(documents), 8, pad_id=PAD, overlong=overlong)
    found = []
    while (rows := packer.next_rows(chunk)).num_rows:
        assert rows.num_rows % 2 == 0
        for row in range(0, rows.num_rows, 2):
            epochs, ordinals = rows.epoch_RL[row : row + 2], rows.ordinal_RL[row : row + 2]
            used = rows.segment_RL[row : row + 2] > 0
            ordinal = int(ordinals[0, 0])
            assert ordinals[used].unique().tolist() == [ordinal]
            assert epochs[used].unique().tolist() == [ordinal // 3]
            found.append((ordinal, [read(rows, row), read(rows, row + 1)]))
    kept = expected(documents, overlong)
    assert found == kept
    stats = packer.stats
    sides = [one for document in documents for one in (document, document.rejected)]
    assert stats.documents == len(sides)
    assert stats.dropped_documents == len(sides) - 2 * len(kept)
    assert stats.packed_tokens + stats.dropped_tokens == sum(len(one) for one in sides)
    assert stats.truncated_documents == sum(len(sides[2 * number + i]) > 8 for number, _ in kept for i in (0, 1))
    assert stats.rows == 2 * len(kept)


@given(documents=pairs, overlong=overlongs, before=st.sampled_from([2, 4]))
def test_state_restored_in_a_new_packer_gives_the_same_rows(documents, overlong, before):
    packer = PairPacker(ListStream(documents), 8, pad_id=PAD, overlong=overlong)
    packer.next_rows(before)
    resumed = PairPacker(ListStream(documents), 8, pad_id=PAD, overlong=overlong)
    resumed.load_state_dict(json.loads(json.dumps(packer.state_dict())))
    ours, theirs = packer.next_rows(40), resumed.next_rows(40)
    assert torch.equal(ours.tokens_RL, theirs.tokens_RL)
    assert torch.equal(ours.ordinal_RL, theirs.ordinal_RL)
    assert torch.equal(ours.maskable_RL, theirs.maskable_RL)
    assert packer.stats == resumed.stats


def test_pairs_that_teach_nothing_are_dropped_and_counted():
    documents = [
        pair(8, [1], [2]),  # the prompt fills the row
        pair(6, [1, 2, 3], [1, 2, 4]),  # equal once they are cut
        pair(2, [], [5]),  # nothing to learn on one side
        pair(2, [7], [7]),  # equal as tokens
        pair(6, [1, 2, 3], [9, 2, 4]),
    ]
    packer = PairPacker(ListStream(documents), 8, pad_id=PAD)
    assert packer.next_rows(6).tokens_RL.tolist() == [[0, 1, 2, 3, 4, 5, 1, 2], [0, 1, 2, 3, 4, 5, 9, 2]]
    stats = packer.stats
    assert (stats.documents, stats.dropped_documents, stats.truncated_documents) == (10, 8, 2)
    assert "2 cut at the row's end, 8 left out" in stats.summary


def test_pairs_of_one_text_with_other_flags_are_not_equal():
    left, right = side(2, [5, 6]), side(3, [6])
    document = Document(left.tokens, left.maskable, rejected=Document(left.tokens, right.maskable[:4]))
    assert PairPacker(ListStream([document]), 8, pad_id=PAD).next_rows(2).num_rows == 2


def test_endless_stream_of_equal_sides_is_an_error():
    with refused(DataError, 10000):
        PairPacker(ListStream([pair(1, [1], [1])] * 20_000), 8, pad_id=PAD).next_rows(2)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_rows_come_in_twos(num_rows):
    with refused(ConfigError, "num_rows", num_rows):
        PairPacker(ListStream([]), 8, pad_id=PAD).next_rows(num_rows)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"overlong": "split"}, ("split", "truncate", "drop")),
        ({"row_length": 0}, ("row length", 0)),
        ({"pad_id": -1}, ("pad id", -1)),
    ],
)
def test_bad_arguments(options, names):
    with refused(ConfigError, *names):
        PairPacker(ListStream([]), **{"row_length": 8, "pad_id": PAD} | options)
