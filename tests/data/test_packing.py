from __future__ import annotations

import json
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import refused
from streams import PAD, ListStream
from unmask.data.documents import Document
from unmask.data.packing import SEGMENT_STRIDE, Overlong, PackedRows, PackingStats, RowPacker
from unmask.errors import ConfigError, DataError


def document(flags: list[bool], first: int = 0) -> Document:
    tokens = np.arange(first, first + len(flags), dtype=np.int32)
    return Document(tokens=tokens, maskable=np.array(flags, dtype=np.bool_))


def whole(length: int, first: int = 0) -> Document:
    return document([True] * length, first)


@st.composite
def documents(draw: st.DrawFn) -> list[Document]:
    """Documents whose tokens are all different, so that each can be traced."""
    made, first = [], 1000
    for flags in draw(st.lists(st.lists(st.booleans(), max_size=30), max_size=25)):
        made.append(document(flags, first))
        first += len(flags)
    return made


def expected_pieces(
    docs: list[Document], length: int, overlong: Overlong
) -> dict[tuple[int, int], tuple[list[int], list[bool]]]:
    """(epoch, ordinal) -> tokens and flags of every piece that has something maskable."""
    pieces = {}
    for ordinal, doc in enumerate(docs):
        if overlong == "drop" and len(doc) > length:
            continue
        stop = len(doc) if overlong == "split" else length
        for number, start in enumerate(range(0, min(stop, len(doc)), length)):
            part = slice(start, start + length)
            if doc.maskable[part].any():
                identity = (ordinal // 3, ordinal + number * SEGMENT_STRIDE)
                pieces[identity] = (doc.tokens[part].tolist(), doc.maskable[part].tolist())
    return pieces


def found_pieces(rows: PackedRows) -> list[tuple[tuple[int, int], tuple[list[int], list[bool]]]]:
    """Read the rows back, checking the layout of each on the way."""
    found = []
    for row in range(rows.num_rows):
        segments = rows.segment_RL[row].tolist()
        used = sum(segment > 0 for segment in segments)
        assert all(segment == 0 for segment in segments[used:]), "padding only at the end"
        assert segments[0] == 1
        assert all(b - a in (0, 1) for a, b in pairwise(segments[:used])), "contiguous and numbered"
        for segment in range(1, max(segments) + 1):
            at = rows.segment_RL[row] == segment
            assert rows.position_RL[row][at].tolist() == list(range(int(at.sum())))
            epochs, ordinals = set(rows.epoch_RL[row][at].tolist()), set(rows.ordinal_RL[row][at].tolist())
            assert len(epochs) == len(ordinals) == 1
            content = (rows.tokens_RL[row][at].tolist(), rows.maskable_RL[row][at].tolist())
            found.append(((epochs.pop(), ordinals.pop()), content))
        padding = rows.segment_RL[row] == 0
        assert (rows.tokens_RL[row][padding] == PAD).all()
        assert not rows.maskable_RL[row][padding].any()
        for other in (rows.position_RL, rows.epoch_RL, rows.ordinal_RL):
            assert (other[row][padding] == 0).all()
    return found


def same(left: PackedRows, right: PackedRows) -> bool:
    return all(torch.equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(PackedRows))


@given(
    docs=documents(),
    length=st.integers(1, 20),
    lookahead=st.integers(1, 9),
    chunk=st.integers(1, 4),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
)
def test_every_token_is_in_exactly_one_row_or_counted_as_dropped(docs, length, lookahead, chunk, overlong):
    packer = RowPacker(ListStream(docs), length, pad_id=PAD, lookahead=lookahead, overlong=overlong)
    found, num_padding = [], 0
    while (rows := packer.next_rows(chunk)).num_rows:
        found += found_pieces(rows)
        num_padding += int((rows.segment_RL == 0).sum())
    assert len(found) == len(dict(found))
    assert dict(found) == expected_pieces(docs, length, overlong)
    stats = packer.stats
    assert stats.packed_tokens + stats.dropped_tokens == sum(len(doc) for doc in docs)
    assert stats.packed_tokens == sum(len(tokens) for _, (tokens, _) in found)
    assert stats.padded_tokens == num_padding
    assert stats.rows * length == stats.packed_tokens + stats.padded_tokens
    assert stats.documents == len(docs)
    num_long = sum(len(doc) > length for doc in docs)
    assert stats.split_documents == (num_long if overlong == "split" else 0)
    kept = {ordinal for _, ordinal in dict(found)}
    num_cut = sum(len(doc) > length for ordinal, doc in enumerate(docs) if ordinal in kept)
    assert stats.truncated_documents == (num_cut if overlong == "truncate" else 0)
    if overlong != "split":
        assert stats.dropped_documents == len(docs) - len(found)


@given(docs=documents(), lookahead=st.integers(1, 9), before=st.integers(1, 6))
@settings(max_examples=50)
def test_state_restored_in_a_new_packer_gives_the_same_rows(docs, lookahead, before):
    packer = RowPacker(ListStream(docs), 16, pad_id=PAD, lookahead=lookahead)
    packer.next_rows(before)
    state = json.loads(json.dumps(packer.state_dict()))
    resumed = RowPacker(ListStream(docs), 16, pad_id=PAD, lookahead=lookahead)
    resumed.load_state_dict(state)
    assert same(resumed.next_rows(50), packer.next_rows(50))
    assert resumed.stats == packer.stats


@given(docs=documents(), chunks=st.lists(st.integers(1, 3), max_size=6))
@settings(max_examples=50)
def test_rows_do_not_depend_on_how_many_are_asked_for(docs, chunks):
    packer = RowPacker(ListStream(docs), 16, pad_id=PAD)
    parts = [packer.next_rows(chunk) for chunk in chunks] + [packer.next_rows(100)]
    at_once = RowPacker(ListStream(docs), 16, pad_id=PAD).next_rows(200)
    start = 0
    for part in parts:
        assert same(part, at_once.rows(start, start + part.num_rows))
        start += part.num_rows
    assert start == at_once.num_rows


def test_longest_fitting_document_follows_the_one_that_waited_longest():
    stream = ListStream([whole(5), whole(2), whole(4), whole(5), whole(3)])
    rows = RowPacker(stream, 10, pad_id=PAD).next_rows(2)
    assert rows.ordinal_RL[0].tolist() == [0] * 5 + [3] * 5
    assert rows.ordinal_RL[1].tolist() == [1] * 2 + [2] * 4 + [4] * 3 + [0]


def test_lookahead_of_one_keeps_the_order():
    lengths = [5, 2, 4, 5, 3, 9, 1]
    rows = RowPacker(ListStream([whole(n) for n in lengths]), 10, pad_id=PAD, lookahead=1).next_rows(9)
    order = [int(identity[1]) for identity, _ in found_pieces(rows)]
    assert order == list(range(len(lengths)))


def test_little_is_padded_with_the_default_lookahead():
    generator = np.random.default_rng(0)
    stream = ListStream([whole(int(n)) for n in generator.integers(10, 200, size=600)])
    packer = RowPacker(stream, 512, pad_id=PAD)
    rows = packer.next_rows(80)
    assert rows.num_rows == 80
    assert 1 - rows.num_tokens / rows.tokens_RL.numel() < 0.01


def test_views_and_counts():
    rows = RowPacker(ListStream([document([False, True, True]), whole(4)]), 4, pad_id=PAD).next_rows(5)
    assert rows.num_rows == 2
    assert rows.num_tokens == 7
    assert rows.num_maskable == 6
    last = rows.rows(1, 2)
    assert last.num_rows == 1
    assert last.tokens_RL.data_ptr() == rows.tokens_RL[1].data_ptr()
    assert rows.tokens_RL.dtype == torch.int64
    assert rows.maskable_RL.dtype == torch.bool


def test_piece_without_anything_maskable_is_dropped_and_counted():
    packer = RowPacker(ListStream([document([False] * 4 + [False, True]), document([False] * 3)]), 4, pad_id=PAD)
    rows = packer.next_rows(5)
    assert rows.ordinal_RL.tolist() == [[SEGMENT_STRIDE, SEGMENT_STRIDE, 0, 0]]
    assert (packer.stats.dropped_documents, packer.stats.dropped_tokens) == (2, 7)


def test_long_document_is_cut_at_the_end_of_the_row():
    answer_ends_at_the_edge = document([False] * 2 + [True] * 2, 10)
    docs = [document([False] * 3 + [True] * 3), document([False] * 4 + [True]), answer_ends_at_the_edge]
    packer = RowPacker(ListStream(docs), 4, pad_id=PAD, overlong="truncate")
    rows = packer.next_rows(5)
    assert rows.tokens_RL.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert rows.maskable_RL.tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2]
    assert rows.ordinal_RL.tolist() == [[0] * 4, [2] * 4]
    stats = packer.stats
    assert (stats.documents, stats.truncated_documents, stats.dropped_documents, stats.dropped_tokens) == (3, 1, 1, 2 + 5)


def test_long_document_is_dropped_whole_and_one_of_the_rows_length_is_not():
    packer = RowPacker(ListStream([whole(5), whole(4, 10)]), 4, pad_id=PAD, overlong="drop")
    assert packer.next_rows(5).tokens_RL.tolist() == [[10, 11, 12, 13]]
    assert (packer.stats.truncated_documents, packer.stats.dropped_documents, packer.stats.dropped_tokens) == (0, 1, 5)


def test_summary_tells_what_occurred_and_nothing_else():
    assert PackingStats().summary == "documents: none"
    assert PackingStats(documents=1200, rows=3, packed_tokens=4, padded_tokens=5).summary == "documents: 1,200 read"
    everything = PackingStats(documents=9, split_documents=1, truncated_documents=2, dropped_documents=3, dropped_tokens=4567)
    expected = "documents: 9 read, 1 split over rows, 2 cut at the row's end, 3 left out (4,567 tokens not used)"
    assert everything.summary == expected


def test_counts_of_an_older_state_are_read():
    packer = RowPacker(ListStream([whole(3)]), 4, pad_id=PAD)
    state = packer.state_dict()
    del state["stats"]["truncated_documents"]
    packer.load_state_dict(state)
    assert packer.stats == PackingStats()


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_endless_stream_of_prompts_that_fill_the_row_is_an_error(overlong):
    stream = ListStream([document([False] * 4 + [True])] * 20_000)
    with refused(DataError, "row", 4):
        RowPacker(stream, 4, pad_id=PAD, overlong=overlong).next_rows(1)


def test_endless_stream_without_anything_to_learn_is_an_error():
    stream = ListStream([document([False] * 3)] * 20_000)
    with refused(DataError, 10000):
        RowPacker(stream, 4, pad_id=PAD).next_rows(1)


@pytest.mark.parametrize(
    ("row_length", "pad_id", "lookahead", "names"),
    [
        (0, 1, 4, ("row length", 0)),
        (-3, 1, 4, ("row length", -3)),
        (4, -1, 4, ("pad id", -1)),
        (4, 1, 0, ("lookahead", 0)),
    ],
)
def test_bad_arguments(row_length, pad_id, lookahead, names):
    with refused(ConfigError, *names):
        RowPacker(ListStream([]), row_length, pad_id=pad_id, lookahead=lookahead)


def test_no_rows_asked_for():
    with refused(ConfigError, "num_rows", 0):
        RowPacker(ListStream([whole(3)]), 4, pad_id=PAD).next_rows(0)


def test_state_of_another_row_length_is_refused():
    state = RowPacker(ListStream([whole(3)]), 4, pad_id=PAD).state_dict()
    with refused(DataError, "rows", 4, 8):
        RowPacker(ListStream([whole(3)]), 8, pad_id=PAD).load_state_dict(state)
