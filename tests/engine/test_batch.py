"""The batch's metadata against its definition, token by token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.engine.batch import Batch, SequenceSlice

SLICES = st.tuples(st.integers(1, 9), st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 8, 2**40]), st.integers(0, 24))


def visible_keys(position: int, num_keys: int, each: SequenceSlice) -> int:
    size = 1 if position < each.causal_end else each.mask_block_size
    return sum(key // size <= position // size for key in range(num_keys))


@given(st.lists(SLICES, min_size=1, max_size=4), st.integers(1, 6))
def test_every_token_is_described(shapes: list[tuple[int, int, int, int]], size: int) -> None:
    blocks = iter(torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist())
    slices = [
        SequenceSlice(
            [7 * i + j for j in range(count)],
            start,
            [next(blocks) for _ in range(-(-(start + count) // size))],
            block,
            causal_end,
        )
        for i, (count, start, block, causal_end) in enumerate(shapes)
    ]
    batch = Batch(slices, size, "cpu")
    expected = []
    for each in slices:
        num_keys = each.start + len(each.tokens)
        for token, position in zip(each.tokens, range(each.start, num_keys), strict=True):
            slot = each.block_table[position // size] * size + position % size
            noisy = position >= each.causal_end
            expected.append((token, position, slot, visible_keys(position, num_keys, each), noisy))
    found = (batch.tokens_T, batch.positions_T, batch.slot_mapping_T, batch.num_visible_keys_T, batch.is_noisy_T)
    assert list(zip(*(x.tolist() for x in found), strict=True)) == expected
    assert batch.cu_seqlens_q.diff().tolist() == batch.num_queries_N.tolist() == [len(each.tokens) for each in slices]
    assert batch.cu_seqlens_k.diff().tolist() == batch.num_keys_N.tolist()
    assert batch.cu_seqlens_q.tolist()[0] == batch.cu_seqlens_k.tolist()[0] == 0
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (batch.num_queries_N.max(), batch.num_keys_N.max())
    for row, each in zip(batch.block_table_NM.tolist(), slices, strict=True):
        assert row == [*each.block_table, *[0] * (len(row) - len(each.block_table))]
    check_segments(batch, slices)


def check_segments(batch: Batch, slices: list[SequenceSlice]) -> None:
    """They cover the tokens in order, and each has one form of mask."""
    stop = 0
    for start, end, position, size, noisy, sequence in batch.segments_C6.tolist():
        assert start == stop < end
        stop = end
        assert batch.positions_T[start] == position
        assert (batch.is_noisy_T[start:end] == bool(noisy)).all()
        assert size == (slices[sequence].mask_block_size if noisy else 1)
    assert stop == len(batch.tokens_T)
    segments_of = batch.segments_C6[:, 5].tolist()
    assert set(segments_of) == set(range(len(slices)))
    assert all(segments_of.count(sequence) <= 2 for sequence in segments_of)


def test_types_are_those_of_paged_kernels() -> None:
    batch = Batch([SequenceSlice([5, 6], 3, [9, 2], 4)], 4, "cpu")
    assert batch.tokens_T.dtype == batch.positions_T.dtype == batch.slot_mapping_T.dtype == torch.int64
    assert batch.cu_seqlens_q.dtype == batch.cu_seqlens_k.dtype == batch.block_table_NM.dtype == torch.int32
    assert batch.num_visible_keys_T.dtype == torch.int32
    assert batch.is_noisy_T.dtype == torch.bool
    assert batch.slot_mapping_T.tolist() == [9 * 4 + 3, 2 * 4]
    assert not batch.is_consecutive_N[0]


def test_cache_blocks_beyond_the_last_key_do_not_matter() -> None:
    """A sequence may have allocated more than it fills."""
    batch = Batch([SequenceSlice([5], 3, [4, 9], 4), SequenceSlice([5], 8, [6, 7, 8], 4)], 4, "cpu")
    assert batch.is_consecutive_N.tolist() == [True, True]
    assert batch.sees_all_N.tolist() == [True, True]
